from __future__ import annotations

import pytest
import torch

from ssync_pl.errors import ConfigError, ShapeError
from ssync_pl.hosts.nn.slot_merger import SlotMerger, agglomerate, cosine_distances


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


def test_gradient_flows_to_members() -> None:
    slots = torch.tensor([[[[0.0, 1.0], [2.0, 0.0], [0.0, 3.0]]]], requires_grad=True)
    SlotMerger(0.1, min_slots=1)(slots).slots[0, 0, 0].sum().backward()
    assert slots.grad is not None
    assert slots.grad[0, 0].tolist() == [[0.5, 0.5], [0.0, 0.0], [0.5, 0.5]]


def test_the_graph_has_no_break() -> None:
    merger = SlotMerger(0.5, min_slots=1)
    slots = torch.randn(2, 1, 6, 4)
    compiled = torch.compile(merger, backend="eager", fullgraph=True)
    assert torch.equal(compiled(slots).members, merger(slots).members)


def test_wrong_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="`threshold`"):
        SlotMerger(3.0)
    with pytest.raises(ConfigError, match="`linkage`"):
        SlotMerger(0.1, "single")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="`linkage`"):
        agglomerate(torch.zeros(2, 2), 0.1, "single")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="`min_slots`"):
        SlotMerger(0.1, min_slots=0)
    with pytest.raises(ShapeError, match=r"\(\.\.\., S, S\)"):
        agglomerate(torch.zeros(2, 3), 0.1)
    with pytest.raises(ShapeError, match=r"\(B, P, S, D\)"):
        SlotMerger()(torch.zeros(2, 3, 4))
