from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ssync_pl.errors import ConfigError, ShapeError
from ssync_pl.hosts.linking import link_slots, relabel_slots

A, B, C = torch.eye(3)


def _video(*frames: list[Tensor | None]) -> tuple[Tensor, Tensor]:
    slots = torch.stack([torch.stack([torch.zeros(3) if slot is None else slot for slot in frame]) for frame in frames])
    valid = torch.tensor([[slot is not None for slot in frame] for frame in frames])
    return slots.unsqueeze(0), valid.unsqueeze(0)


def test_slots_that_change_places_keep_their_identity() -> None:
    slots, valid = _video([A, B, C], [C, A, B], [2 * B, C, 0.5 * A])
    assert link_slots(slots, valid).tolist() == [[[0, 1, 2], [2, 0, 1], [1, 2, 0]]]
    assert link_slots(slots, valid, "previous").tolist() == [[[0, 1, 2], [2, 0, 1], [1, 2, 0]]]
    assert link_slots(slots, valid, "index").tolist() == [[[0, 1, 2]] * 3]


def test_memory_brings_back_what_a_frame_lacked() -> None:
    slots, valid = _video([A, B, C], [A, None, C], [C, B, A])
    assert link_slots(slots, valid, "memory")[0, 2].tolist() == [2, 1, 0]
    # The frame before has two identities only: the third slot takes the one that it is most alike.
    third = torch.nn.functional.normalize(B + 0.1 * A, dim=0)
    slots, valid = _video([A, B, C], [A, None, C], [C, third, A])
    assert link_slots(slots, valid, "previous")[0, 2].tolist() == [2, 0, 0]


def test_memory_gives_a_new_slot_a_name_of_its_own() -> None:
    like_a = torch.nn.functional.normalize(A + 0.3 * C, dim=0)
    slots, valid = _video([None, A, B], [like_a, A, B], [B, like_a, A])
    assert link_slots(slots, valid, "memory")[0, 1:].tolist() == [[0, 1, 2], [2, 0, 1]]
    assert link_slots(slots, valid, "previous")[0, 1:].tolist() == [[1, 1, 2], [2, 1, 1]]
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        slots = torch.randn(2, 6, 5, 3, generator=generator)
        valid = torch.rand(2, 6, 5, generator=generator) < 0.6
        linked = link_slots(slots, valid)
        for names, there in zip(linked.flatten(0, 1), valid.flatten(0, 1), strict=True):
            assert len(names[there].unique()) == int(there.sum())


def test_the_matching_is_one_to_one_and_the_best_in_total() -> None:
    # Both slots are most alike to A, and the second loses less by taking B.
    first = torch.tensor([1.0, 0.0, 0.0])
    second = torch.nn.functional.normalize(torch.tensor([1.0, 0.8, 0.0]), dim=0)
    slots, valid = _video([A, B], [second, first])
    assert link_slots(slots, valid).tolist() == [[[0, 1], [1, 0]]]


def test_frames_without_slots_are_passed_over() -> None:
    slots, valid = _video([A, B], [None, None], [B, A])
    for linking in ("memory", "previous"):
        assert link_slots(slots, valid, linking)[0, 2].tolist() == [1, 0]  # type: ignore[arg-type]


def test_videos_are_linked_by_themselves() -> None:
    one, valid = _video([A, B], [B, A])
    two, _ = _video([A, B], [A, B])
    linked = link_slots(torch.cat([one, two]), torch.cat([valid, valid]))
    assert linked.tolist() == [[[0, 1], [1, 0]], [[0, 1], [0, 1]]]


def test_masks_follow_their_identities_and_keep_their_sum() -> None:
    masks = torch.rand(1, 2, 3, 4).softmax(2)
    identities = torch.tensor([[[2, 0, 1], [1, 1, 0]]])
    moved = relabel_slots(masks, identities)
    assert torch.equal(moved[0, 0], masks[0, 0, [1, 2, 0]])
    torch.testing.assert_close(
        moved[0, 1], torch.stack([masks[0, 1, 2], masks[0, 1, 0] + masks[0, 1, 1], torch.zeros(4)])
    )
    torch.testing.assert_close(moved.sum(2), torch.ones(1, 2, 4))


def test_wrong_input_is_refused() -> None:
    slots, valid = _video([A, B])
    with pytest.raises(ConfigError, match="`linking`"):
        link_slots(slots, valid, "never")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"\(B, T, S\)"):
        link_slots(slots, valid[0])
