"""What SOLV is made of: binders, merging and linking of slots."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from ssync_pl.hosts.linking import link_slots, relabel_slots
from ssync_pl.hosts.nn.binders import RelativeSlotAttention, SlotPose, TemporalBinder, attention_pose, frame_windows
from ssync_pl.hosts.nn.slot_merger import SlotMerger, agglomerate, cosine_distances

GRID, S, D, C = (3, 4), 3, 8, 5
ONE, TWO, THREE = torch.eye(3)


def _binder(**changes: object) -> RelativeSlotAttention:
    torch.manual_seed(0)
    options = {"num_slots": S, "slot_dim": D, "feature_dim": C, "iterations": 2, "dropout": 0.0}
    binder = RelativeSlotAttention(GRID, **(options | changes))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in binder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return binder


def _pair(binder: RelativeSlotAttention, projected: Tensor, relative: Tensor) -> Tensor:
    """The published order: the whole MLP on one pair of slot and patch."""
    inner = projected + binder.from_position(relative)
    return binder.pair_out(binder.pair_in(inner).clamp(min=0))


def _by_hand(binder: RelativeSlotAttention, tokens: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One frame, pair by pair."""
    embedded = binder.embed(tokens)
    points = binder.points[places]
    slots, position, spread = binder.slots, binder.position, binder.log_spread.exp()
    count = len(tokens)
    for iteration in range(binder.iterations + 1):
        norm = binder.norm_slots
        normed = layer_norm(slots, (D,), norm.weight, norm.bias)
        logits, values = torch.zeros(S, count), torch.zeros(S, count, D)
        for s in range(S):
            for n in range(count):
                relative = (points[n] - position[s]) / (5.0 * spread[s])
                key = _pair(binder, binder.to_k(embedded[n]), relative)
                logits[s, n] = (binder.to_q(normed[s]) * key).sum() * D**-0.5
                values[s, n] = _pair(binder, binder.to_v(embedded[n]), relative)
        attention = logits.softmax(0) + 1e-8
        attention = attention / attention.sum(1, keepdim=True)
        if iteration == binder.iterations:
            break
        position = attention @ points
        spread = torch.stack([(attention[s] @ (points - position[s]).square() + 1e-4).sqrt() for s in range(S)])
        updates = torch.stack([attention[s] @ values[s] for s in range(S)])
        slots = binder.gru(updates, slots)
        slots = slots + binder.mlp(slots)
    return binder.to_output(binder.norm_slots(slots)), logits, attention


def test_equals_the_published_order_pair_by_pair() -> None:
    binder = _binder()
    tokens = torch.randn(2, 2, 7, C)
    indices = torch.stack([torch.randperm(12)[:7].sort().values for _ in range(4)]).view(2, 2, 7)
    bound = binder(tokens, indices)
    for b in range(2):
        for t in range(2):
            slots, logits, attention = _by_hand(binder, tokens[b, t], indices[b, t])
            torch.testing.assert_close(bound.slots[b, t], slots, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(bound.logits[b, t], logits, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(bound.attention[b, t], attention, rtol=1e-4, atol=1e-6)


def test_pose_is_mean_and_spread_of_what_is_attended_to() -> None:
    points = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    pose = attention_pose(torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]), points)
    torch.testing.assert_close(pose.position, torch.tensor([[0.0, 0.0], [0.0, 1.0]]))
    torch.testing.assert_close(pose.spread, torch.tensor([[1.0001**0.5, 0.01], [0.01, 0.01]]))
    relative = SlotPose(pose.position, pose.spread).relative(points)
    torch.testing.assert_close(relative[0, 1], torch.tensor([1.0 / (5 * 1.0001**0.5), 0.0]))


def test_a_slot_on_one_patch_has_a_finite_gradient() -> None:
    logits = torch.tensor([[60.0, 0.0, 0.0]], requires_grad=True)
    pose = attention_pose(logits.softmax(1), torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
    (grad,) = torch.autograd.grad(pose.spread.sum(), logits)
    assert grad.isfinite().all()


def test_logits_are_float32_under_autocast() -> None:
    binder = _binder()
    tokens, indices = torch.randn(1, 1, 12, C), torch.arange(12).expand(1, 1, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        bound = binder(tokens, indices)
    assert bound.logits.dtype == bound.attention.dtype == torch.float32
    torch.testing.assert_close(bound.logits, binder(tokens, indices).logits, rtol=0.2, atol=0.1)


def test_an_untrained_binder_can_be_soft_k_means() -> None:
    torch.manual_seed(0)
    centres = 3 * torch.randn(3, 16)
    truth = torch.arange(3).repeat_interleave(16)
    tokens = (centres[truth] + 0.3 * torch.randn(48, 16)).view(1, 1, 48, 16)
    binder = RelativeSlotAttention((6, 8), 3, 32, 16, iterations=3, dropout=0.0, init="kmeans")
    with torch.no_grad():
        binder.from_position.weight.zero_()
        binder.slots.copy_(binder.embed(tokens[0, 0, [0, 16, 32]]) + 0.5 * torch.randn(3, 32))
        bound = binder(tokens, torch.arange(48).expand(1, 1, 48))
        assert torch.equal(bound.logits[0, 0].argmax(0), truth)
        # The MLP of pairs passes what it gets, but for the far negative tail.
        keys = binder.to_k(binder.embed(tokens[0, 0]))
        passed = binder.pair_out(binder.pair_in(keys).relu())
        assert (keys.std() - 1.5).abs() < 0.2
        torch.testing.assert_close(passed, keys.clamp(min=-3.0))


def _temporal(window: int = 3) -> TemporalBinder:
    torch.manual_seed(0)
    return TemporalBinder(8, window, blocks=2, heads=2, dropout=0.0)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_hidden_frames_do_not_matter(mode: str) -> None:
    binder = _temporal().train(mode == "train")
    slots = torch.randn(2, 1, 3, 4, 8)
    valid = torch.tensor([[[True, True, False]], [[False, True, True]]])
    other = torch.where(valid[..., None, None], slots, torch.full((), 7.0))
    torch.testing.assert_close(binder(slots, valid), binder(other, valid))
    assert not torch.allclose(binder(slots, valid), binder(slots, torch.ones_like(valid)), atol=1e-3)


def test_slots_of_different_index_do_not_mix() -> None:
    binder, slots = _temporal().eval(), torch.randn(1, 1, 3, 4, 8)
    valid = torch.ones(1, 1, 3, dtype=torch.bool)
    changed = slots.clone()
    changed[:, :, :, 2] += 1
    same = (binder(slots, valid) - binder(changed, valid)).abs().amax(-1)[0, 0]
    assert same[[0, 1, 3]].max() < 1e-6
    assert same[2] > 1e-3


def test_windows_reach_over_the_edges() -> None:
    values = torch.arange(1, 5).view(1, 4, 1).expand(2, 4, 3)
    windows = frame_windows(values, 2)
    assert windows.shape == (2, 4, 5, 3)
    assert windows[0, :, :, 0].tolist() == [[0, 0, 1, 2, 3], [0, 1, 2, 3, 4], [1, 2, 3, 4, 0], [2, 3, 4, 0, 0]]
    assert frame_windows(torch.ones(1, 2, dtype=torch.bool), 1).tolist() == [[[False, True, True], [True, True, False]]]
    assert torch.equal(frame_windows(values, 0).squeeze(2), values)


@pytest.mark.parametrize("linkage", ["complete", "average"])
@pytest.mark.parametrize("count", [1, 2, 8, 13])
def test_clusters_equal_those_of_scikit_learn(linkage: str, count: int) -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    torch.manual_seed(count)
    slots = torch.randn(24, count, 5)
    threshold = 0.8
    labels = agglomerate(cosine_distances(slots), threshold, linkage)  # type: ignore[arg-type]
    sizes = set()
    for own, vectors in zip(labels, slots, strict=True):
        if count == 1:
            assert own.tolist() == [0]
            continue
        theirs = cluster.AgglomerativeClustering(
            n_clusters=None, metric="cosine", compute_full_tree=True, distance_threshold=threshold, linkage=linkage
        ).fit(vectors.numpy())
        same = torch.from_numpy(theirs.labels_)
        assert torch.equal(own[:, None] == own[None, :], same[:, None] == same[None, :])
        # Each cluster goes by its lowest index.
        assert all(label == min(i for i in range(count) if own[i] == label) for label in own.tolist())
        sizes.add(len(own.unique()))
    assert count < 8 or len(sizes) > 1


def test_complete_linkage_stops_where_average_goes_on() -> None:
    # On a line at 0, 1 and 2.6: {0, 1} and 2.6 are 2.6 apart at most and 2.1 on average.
    places = torch.tensor([0.0, 1.0, 2.6])
    distances = (places[:, None] - places[None, :]).abs()
    assert agglomerate(distances, 2.3, "complete").tolist() == [0, 0, 2]
    assert agglomerate(distances, 2.3, "average").tolist() == [0, 0, 0]
    assert agglomerate(distances, 1.0).tolist() == [0, 1, 2]  # at the threshold they stay apart


def test_merged_slots_are_means_at_the_lowest_index() -> None:
    slots = torch.tensor([[[[0.0, 1.0], [2.0, 0.0], [0.0, 3.0], [1.0, 0.0]]]])
    merged = SlotMerger(0.1, min_slots=2)(slots)
    assert merged.valid.tolist() == [[[True, True, False, False]]]
    torch.testing.assert_close(merged.slots[0, 0], torch.tensor([[0.0, 2.0], [1.5, 0.0], [0.0, 0.0], [0.0, 0.0]]))
    assert merged.members[0, 0].int().tolist() == [[1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    attention = torch.tensor([[[[0.5, 0.5, 0.0], [0.0, 1.0, 0.0], [0.1, 0.2, 0.7], [0.0, 0.0, 1.0]]]])
    expected = torch.tensor([[0.3, 0.35, 0.35], [0.0, 0.5, 0.5]])
    torch.testing.assert_close(merged.merge_attention(attention)[0, 0, :2], expected)


def test_too_few_slots_keep_all() -> None:
    slots = torch.tensor([[[[0.0, 1.0], [2.0, 0.0], [0.0, 3.0], [1.0, 0.0]]]])
    assert SlotMerger(0.1, min_slots=3)(slots).valid.all()
    assert SlotMerger(None)(slots).valid.all()
    torch.testing.assert_close(SlotMerger(None)(slots).slots, slots)


def test_only_wanted_frames_are_merged() -> None:
    slots = torch.ones(2, 2, 3, 4)
    merged = SlotMerger(0.1, min_slots=1)(slots, torch.tensor([[True, False], [False, True]]))
    assert merged.valid.sum(-1).tolist() == [[1, 3], [3, 1]]


def _video(*frames: list[Tensor | None]) -> tuple[Tensor, Tensor]:
    slots = torch.stack([torch.stack([torch.zeros(3) if slot is None else slot for slot in frame]) for frame in frames])
    valid = torch.tensor([[slot is not None for slot in frame] for frame in frames])
    return slots.unsqueeze(0), valid.unsqueeze(0)


def test_slots_that_change_places_keep_their_identity() -> None:
    slots, valid = _video([ONE, TWO, THREE], [THREE, ONE, TWO], [2 * TWO, THREE, 0.5 * ONE])
    assert link_slots(slots, valid).tolist() == [[[0, 1, 2], [2, 0, 1], [1, 2, 0]]]
    assert link_slots(slots, valid, "previous").tolist() == [[[0, 1, 2], [2, 0, 1], [1, 2, 0]]]
    assert link_slots(slots, valid, "index").tolist() == [[[0, 1, 2]] * 3]


def test_memory_brings_back_what_a_frame_lacked() -> None:
    slots, valid = _video([ONE, TWO, THREE], [ONE, None, THREE], [THREE, TWO, ONE])
    assert link_slots(slots, valid, "memory")[0, 2].tolist() == [2, 1, 0]
    # The frame before has two identities only: the third slot takes the one that it is most alike.
    third = torch.nn.functional.normalize(TWO + 0.1 * ONE, dim=0)
    slots, valid = _video([ONE, TWO, THREE], [ONE, None, THREE], [THREE, third, ONE])
    assert link_slots(slots, valid, "previous")[0, 2].tolist() == [2, 0, 0]


def test_memory_gives_a_new_slot_a_name_of_its_own() -> None:
    like_a = torch.nn.functional.normalize(ONE + 0.3 * THREE, dim=0)
    slots, valid = _video([None, ONE, TWO], [like_a, ONE, TWO], [TWO, like_a, ONE])
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
    # Both slots are most alike to ONE, and the second loses less by taking TWO.
    first = torch.tensor([1.0, 0.0, 0.0])
    second = torch.nn.functional.normalize(torch.tensor([1.0, 0.8, 0.0]), dim=0)
    slots, valid = _video([ONE, TWO], [second, first])
    assert link_slots(slots, valid).tolist() == [[[0, 1], [1, 0]]]


def test_frames_without_slots_are_passed_over() -> None:
    slots, valid = _video([ONE, TWO], [None, None], [TWO, ONE])
    for linking in ("memory", "previous"):
        assert link_slots(slots, valid, linking)[0, 2].tolist() == [1, 0]  # type: ignore[arg-type]


def test_videos_are_linked_by_themselves() -> None:
    one, valid = _video([ONE, TWO], [TWO, ONE])
    two, _ = _video([ONE, TWO], [ONE, TWO])
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
