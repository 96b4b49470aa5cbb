import math
from typing import Any

import pytest
import torch
from tiny_models import tiny, window_clips
from torch.nn.functional import normalize

from ssync_pl.hosts import SOLV
from ssync_pl.hosts import solv as module
from ssync_pl.hosts.linking import link_slots, relabel_slots
from ssync_pl.hosts.nn.binders import TemporalBinder
from ssync_pl.hosts.nn.slot_merger import SlotMerger, agglomerate, cosine_distances


def test_the_defaults_are_the_published_sizes() -> None:
    model = SOLV(backbone=None, feature_dim=768, grid=(24, 36))
    assert model.spatial_binder.slots.shape == (8, 128)
    assert model.spatial_binder.iterations == 3
    assert model.temporal_binder.window == 5
    assert len(model.temporal_binder.blocks.layers) == 3
    assert model.merger.threshold == 0.12
    assert model._drop_tokens(torch.zeros(1, 1, 864, 1))[0].shape[2] == 432
    assert model.decoder.to_features.out_features == 768


def test_evaluation_of_a_frame_is_training_on_its_window(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(SOLV, token_drop=0.0, merge_threshold=0.3, merge_min_slots=1)
    features = window_clips(frames=5)["features"]
    whole = model.eval()(features)
    for frame in range(1, 4):
        part = model.train()(features[:, frame - 1 : frame + 2])
        for name in ("slots", "members", "reconstruction", "mask_logits", "targets"):
            torch.testing.assert_close(getattr(whole, name)[:, frame : frame + 1], getattr(part, name), msg=name)
    # At the ends, what is missing is hidden.
    valid = torch.tensor([[False, True, True]] * 2)
    start = model(torch.cat([torch.full_like(features[:, :1], 3.0), features[:, :2]], 1), valid)
    torch.testing.assert_close(whole.mask_logits[:, :1], start.mask_logits)
    monkeypatch.setattr(module, "_FRAMES_AT_A_TIME", 4)
    for one, other in zip(whole, model.eval()(features), strict=True):
        torch.testing.assert_close(one, other)


def test_masks_are_linked_over_time_by_slots_or_by_what_they_cover() -> None:
    batch = window_clips(frames=5)
    features = batch["features"]
    for link_by in ("slots", "features"):
        model = tiny(SOLV, merge_threshold=0.2, merge_min_slots=1, link_by=link_by).eval()
        with torch.no_grad():
            masks, out = model.segment(batch), model(features)
        looks = out.slots
        if link_by == "features":
            apart = features - features.mean((1, 2), keepdim=True)
            looks = out.masks @ apart / out.masks.sum(-1, keepdim=True).clamp_min(1e-8)
        expected = relabel_slots(out.masks, link_slots(looks, out.slot_valid))
        torch.testing.assert_close(masks, expected.unflatten(-1, (2, 4)))
        torch.testing.assert_close(masks.sum(2), torch.ones(2, 5, 2, 4))


def test_merging_grows_with_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(SOLV, merge_rise=180.0, merge_threshold=1.9, merge_min_slots=1)
    model._total_steps, counts = 180, []
    model.merger.register_forward_hook(lambda _m, _a, out: counts.append(int(out.valid.sum())))
    for step, expected in {0: 0.0, 9: math.log(1 + 179 / 20) / math.log(180), 180: 1.0}.items():
        monkeypatch.setattr(SOLV, "global_step", property(lambda self, step=step: step))
        assert model._merge_probability() == pytest.approx(expected)
        model.training_step(window_clips(), 0)
    assert counts[0] == 8
    assert counts[2] < 8
    assert tiny(SOLV, merge_rise=1.0)._merge_probability() == 1.0


def test_clips_at_the_edge_of_a_video_hide_one_side() -> None:
    def hidden(share: float, length: int = 5) -> torch.Tensor:
        model = tiny(SOLV, clip_length=length, edge_probability=share)
        return model._hidden_neighbours(torch.ones(2000, length, dtype=torch.bool))

    patterns = {tuple(row) for row in hidden(1.0).int().tolist()}
    assert patterns == {(1, 1, 0, 0, 0), (1, 0, 0, 0, 0), (0, 0, 0, 1, 1), (0, 0, 0, 0, 1)}
    assert hidden(0.25).any(1).float().mean().item() == pytest.approx(0.25, abs=0.05)
    assert not hidden(0.0).any()
    assert not hidden(1.0, 1).any()


def test_the_step_compiles_to_one_graph() -> None:
    model, features = tiny(SOLV), window_clips()["features"]
    torch.manual_seed(5)
    expected = model(features).mask_logits
    torch.manual_seed(5)
    out = torch.compile(model.forward, backend="eager", fullgraph=True)(features)
    torch.testing.assert_close(out.mask_logits, expected)


def test_a_random_part_of_the_tokens_is_kept_in_training() -> None:
    model, features = tiny(SOLV, token_drop=0.75), torch.randn(500, 1, 8, 6)
    tokens, indices = model._drop_tokens(features)
    assert tokens.shape == (500, 1, 2, 6)
    assert (indices.diff(dim=-1) > 0).all()
    assert torch.equal(tokens[3, 0], features[3, 0, indices[3, 0]])
    assert (torch.bincount(indices.flatten(), minlength=8) / 500 - 0.25).abs().max() < 0.08
    assert torch.equal(model.eval()._drop_tokens(features)[0], features)


ONE, TWO, THREE = torch.eye(3)
MIXED, LIKE_TWO = normalize(ONE + 0.3 * THREE, dim=0), normalize(TWO + 0.1 * ONE, dim=0)


@pytest.mark.parametrize("training", [True, False])
def test_over_time_hidden_frames_do_not_matter_and_slots_do_not_mix(training: bool) -> None:
    binder = TemporalBinder(8, 3, blocks=2, heads=2, dropout=0.0).train(training)
    slots, valid = torch.randn(2, 1, 3, 4, 8), torch.tensor([[[True, True, False]], [[False, True, True]]])
    other, every = torch.where(valid[..., None, None], slots, torch.full((), 7.0)), torch.ones_like(valid)
    torch.testing.assert_close(binder(slots, valid), binder(other, valid))
    assert not torch.allclose(binder(slots, valid), binder(slots, every), atol=1e-3)
    changed = slots.clone()
    changed[:, :, :, 2] += 1
    same = (binder(slots, every) - binder(changed, every)).abs().amax(-1)[0, 0]
    assert same[[0, 1, 3]].max() < 1e-6
    assert same[2] > 1e-3


@pytest.mark.parametrize("count", [1, 2, 8, 13])
def test_clusters_equal_those_of_scikit_learn(count: int) -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    torch.manual_seed(count)
    slots, sizes = torch.randn(24, count, 5), set()
    for own, vectors in zip(agglomerate(cosine_distances(slots), 0.8), slots, strict=True):
        if count == 1:
            assert own.tolist() == [0]
            continue
        options: dict[str, Any] = {"metric": "cosine", "compute_full_tree": True, "distance_threshold": 0.8}
        theirs = cluster.AgglomerativeClustering(n_clusters=None, linkage="complete", **options).fit(vectors.numpy())
        same = torch.from_numpy(theirs.labels_)
        assert torch.equal(own[:, None] == own[None, :], same[:, None] == same[None, :])
        # Each cluster goes by its lowest index.
        assert all(label == min(i for i in range(count) if own[i] == label) for label in own.tolist())
        sizes.add(len(own.unique()))
    assert count < 8 or len(sizes) > 1


def test_merged_slots_are_means_at_the_lowest_index() -> None:
    slots = torch.tensor([[[[0.0, 1.0], [2.0, 0.0], [0.0, 3.0], [1.0, 0.0]]]])
    merged = SlotMerger(0.1, min_slots=2)(slots)
    assert merged.valid.tolist() == [[[True, True, False, False]]]
    torch.testing.assert_close(merged.slots[0, 0], torch.tensor([[0.0, 2.0], [1.5, 0.0], [0.0, 0.0], [0.0, 0.0]]))
    assert merged.members[0, 0].int().tolist() == [[1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    attention = torch.tensor([[[[0.5, 0.5, 0.0], [0.0, 1.0, 0.0], [0.1, 0.2, 0.7], [0.0, 0.0, 1.0]]]])
    expected = torch.tensor([[0.3, 0.35, 0.35], [0.0, 0.5, 0.5]])
    torch.testing.assert_close(merged.merge_attention(attention)[0, 0, :2], expected)
    assert SlotMerger(0.1, min_slots=3)(slots).valid.all()  # too few slots keep all
    torch.testing.assert_close(SlotMerger(None)(slots).slots, slots)
    some = SlotMerger(0.1, min_slots=1)(torch.ones(2, 2, 3, 4), torch.tensor([[True, False], [False, True]]))
    assert some.valid.sum(-1).tolist() == [[1, 3], [3, 1]]  # only wanted frames are merged


# Frames of slots, None where there is none; how they are linked; the identities from a frame on.
MOVED = ([ONE, TWO, THREE], [THREE, ONE, TWO], [2 * TWO, THREE, 0.5 * ONE])
RETURNS = ([ONE, TWO, THREE], [ONE, None, THREE])
NEW = ([None, ONE, TWO], [MIXED, ONE, TWO], [TWO, MIXED, ONE])
EMPTY = ([ONE, TWO], [None, None], [TWO, ONE])


@pytest.mark.parametrize(
    ("frames", "linking", "start", "expected"),
    [
        (MOVED, "memory", 0, [[0, 1, 2], [2, 0, 1], [1, 2, 0]]),
        (MOVED, "previous", 0, [[0, 1, 2], [2, 0, 1], [1, 2, 0]]),
        (MOVED, "index", 0, [[0, 1, 2]] * 3),
        # The memory brings back what a frame lacked; else the third slot takes the one that it is most alike.
        ((*RETURNS, [THREE, TWO, ONE]), "memory", 2, [[2, 1, 0]]),
        ((*RETURNS, [THREE, LIKE_TWO, ONE]), "previous", 2, [[2, 0, 0]]),
        # The memory gives a new slot a name of its own.
        (NEW, "memory", 1, [[0, 1, 2], [2, 0, 1]]),
        (NEW, "previous", 1, [[1, 1, 2], [2, 1, 1]]),
        # Both slots are most alike to ONE, and the second loses less by taking TWO: the best in total.
        (([ONE, TWO], [normalize(ONE + 0.8 * TWO, dim=0), ONE]), "memory", 0, [[0, 1], [1, 0]]),
        # Frames without slots are passed over.
        (EMPTY, "memory", 2, [[1, 0]]),
        (EMPTY, "previous", 2, [[1, 0]]),
    ],
)
def test_identities_are_linked(frames: Any, linking: Any, start: int, expected: list[list[int]]) -> None:
    slots = torch.stack([torch.stack([torch.zeros(3) if slot is None else slot for slot in frame]) for frame in frames])
    valid = torch.tensor([[slot is not None for slot in frame] for frame in frames])
    other = torch.stack([slots, slots[:1].expand_as(slots)])  # videos are linked by themselves
    linked = link_slots(other, torch.stack([valid, valid]), linking)
    assert linked[0, start:].tolist() == expected


def test_identities_are_one_to_one_and_masks_follow_them() -> None:
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        slots = torch.randn(2, 6, 5, 3, generator=generator)
        valid = torch.rand(2, 6, 5, generator=generator) < 0.6
        for names, there in zip(link_slots(slots, valid).flatten(0, 1), valid.flatten(0, 1), strict=True):
            assert len(names[there].unique()) == int(there.sum())
    masks = torch.rand(1, 2, 3, 4).softmax(2)
    moved = relabel_slots(masks, torch.tensor([[[2, 0, 1], [1, 1, 0]]]))
    assert torch.equal(moved[0, 0], masks[0, 0, [1, 2, 0]])
    expected = torch.stack([masks[0, 1, 2], masks[0, 1, 0] + masks[0, 1, 1], torch.zeros(4)])
    torch.testing.assert_close(moved[0, 1], expected)
