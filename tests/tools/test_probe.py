"""The probe finds what was planted, finds nothing in noise, and never predicts a video that it has seen."""

from __future__ import annotations

import math

import pytest
import torch

from ssync_pl.errors import ConfigError, ShapeError
from ssync_pl.metrics.functional import labels_to_masks
from ssync_pl.tools.probe import (
    ProbeSamples,
    join_samples,
    match_slots,
    object_facts,
    probe_slots,
    sample_slots,
)


def planted(noise: float = 0.0, videos: int = 20, each: int = 15, size: int = 12, seed: int = 0) -> ProbeSamples:
    """Slots that are a linear mixture of position, colour and a class, in their own units."""
    generator = torch.Generator().manual_seed(seed)
    count = videos * each
    positions, colors = torch.rand(count, 2, generator=generator), torch.rand(count, 3, generator=generator)
    shapes = torch.randint(3, (count,), generator=generator)
    kinds = torch.nn.functional.one_hot(shapes, 3)
    mixing = torch.randn(8, size, generator=generator)
    slots = torch.cat([positions, colors, kinds], dim=1) @ mixing * 50 + 7
    slots = slots + noise * slots.std() * torch.randn(slots.shape, generator=generator)
    return ProbeSamples(slots, torch.arange(count) // each, positions, colors, shapes)


def noise_only(seed: int) -> ProbeSamples:
    good = planted(seed=seed)
    return ProbeSamples(
        torch.randn(good.slots.shape, generator=torch.Generator().manual_seed(seed + 100)),
        good.videos,
        good.positions,
        good.colors,
        good.shapes,
    )


def test_planted_maps_are_recovered() -> None:
    scores = probe_slots(planted())
    assert scores["position_r2"] == pytest.approx(1.0, abs=1e-4)
    assert scores["color_r2"] == pytest.approx(1.0, abs=1e-4)
    assert scores["shape_accuracy"] == 1.0
    noisy = probe_slots(planted(noise=0.2))
    assert 0.2 < noisy["position_r2"] < 0.99


@pytest.mark.parametrize("seed", range(3))
def test_random_slots_say_nothing(seed: int) -> None:
    scores = probe_slots(noise_only(seed))
    assert -0.2 < scores["position_r2"] < 0.05
    assert -0.2 < scores["color_r2"] < 0.05
    assert scores["shape_accuracy"] < 0.45  # three classes


def test_more_features_than_samples_are_no_licence() -> None:
    generator = torch.Generator().manual_seed(0)
    samples = ProbeSamples(
        torch.randn(60, 300, generator=generator), torch.arange(60) // 6, torch.rand(60, 2, generator=generator)
    )
    assert probe_slots(samples)["position_r2"] < 0.1


def test_what_only_names_the_video_does_not_help() -> None:
    """A slot that tells videos apart would predict any fact that is fixed in a video, if folds shared videos."""
    generator = torch.Generator().manual_seed(0)
    videos = torch.arange(200) // 10
    names, colors = torch.eye(20)[videos], torch.rand(20, 3, generator=generator)[videos]
    scores = probe_slots(ProbeSamples(names, videos, torch.rand(200, 2, generator=generator), colors))
    assert scores["color_r2"] < 0.05


def test_scores_are_the_same_again_and_do_not_depend_on_units() -> None:
    samples = planted(noise=0.2)
    assert probe_slots(samples) == probe_slots(samples)
    scaled = ProbeSamples(samples.slots * 1e3 - 5, samples.videos, samples.positions, samples.colors, samples.shapes)
    for name, value in probe_slots(scaled).items():
        assert value == pytest.approx(probe_slots(samples)[name], abs=1e-3), name


def test_what_is_missing_is_left_out() -> None:
    samples = planted()
    bare = ProbeSamples(samples.slots, samples.videos, samples.positions)
    assert set(probe_slots(bare)) == {"position_r2"}
    unknown = ProbeSamples(samples.slots, samples.videos, samples.positions, shapes=torch.full_like(samples.videos, -1))
    assert set(probe_slots(unknown)) == {"position_r2"}
    few = samples.videos < 2
    assert probe_slots(ProbeSamples(samples.slots[few], samples.videos[few], samples.positions[few])) == {}
    assert probe_slots(ProbeSamples(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), torch.zeros(0, 2))) == {}


def test_slots_that_are_not_finite_are_left_out() -> None:
    samples = planted()
    slots = samples.slots.clone()
    slots[::7, 3] = torch.inf
    slots[1::7] = torch.nan
    score = probe_slots(ProbeSamples(slots, samples.videos, samples.positions))["position_r2"]
    assert score == pytest.approx(1.0, abs=1e-4)
    assert probe_slots(ProbeSamples(slots * torch.nan, samples.videos, samples.positions)) == {}


def test_a_coordinate_that_never_changes_is_left_out() -> None:
    samples = planted()
    positions = samples.positions.clone()
    positions[:, 1] = 0.5
    score = probe_slots(ProbeSamples(samples.slots, samples.videos, positions))["position_r2"]
    assert score == pytest.approx(1.0, abs=1e-4)


def test_slots_are_matched_one_to_one_in_each_frame() -> None:
    truth = torch.tensor([[[[1, 1, 1, 2, 2, 0]], [[0, 1, 1, 0, 0, 0]]]])
    pred = torch.tensor([[[[3, 3, 3, 3, 4, 0]], [[4, 4, 4, 0, 0, 0]]]])
    pairs = match_slots(pred, labels_to_masks(truth, 3))
    assert pairs.tolist() == [[0, 0, 1, 3], [0, 0, 2, 4], [0, 1, 1, 4]]
    hidden = match_slots(pred, labels_to_masks(truth, 3), torch.tensor([[True, False]]))
    assert hidden.tolist() == pairs[:2].tolist()
    bare = match_slots(pred, labels_to_masks(truth, 3)[:, :, 1:], has_background=False)
    assert bare[:, 2].tolist() == [0, 1, 0]


def test_positions_and_colours_are_those_of_the_masks() -> None:
    true = torch.zeros(1, 2, 2, 4, 8, dtype=torch.bool)
    true[0, 0, 1, 1:3, 2:4] = True
    true[:, :, 0] = ~true[:, :, 1]
    frames = torch.rand(1, 2, 3, 4, 8, generator=torch.Generator().manual_seed(0))
    centres, colors = object_facts(true, frames)
    assert centres[0, 0, 1].tolist() == [3 / 8, 2 / 4]
    assert colors is not None
    torch.testing.assert_close(colors[0, 0, 1], frames[0, 0, :, 1:3, 2:4].double().mean((1, 2)))
    assert colors[0, 1, 1].tolist() == [0.0, 0.0, 0.0]
    slots = torch.arange(1 * 2 * 3 * 2).view(1, 2, 3, 2).float()
    labels = (true[:, :, 1] * 2).long()
    samples = sample_slots(slots, labels, true, frames=frames, shapes=torch.tensor([[-1, 5]]), first_video=10)
    assert samples.slots.tolist() == [slots[0, 0, 2].tolist()]
    assert samples.videos.tolist() == [10]
    assert samples.shapes is not None
    assert samples.shapes.tolist() == [5]


def test_a_perfect_host_of_positions_scores_one() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.zeros(12, 3, 16, 16, dtype=torch.long)
    for video in range(12):
        for t in range(3):
            y, x = torch.randint(0, 12, (2,), generator=generator).tolist()
            truth[video, t, y : y + 4, x : x + 4] = 1
    true = labels_to_masks(truth, 2)
    centres, _ = object_facts(true)
    slots = torch.cat([centres * torch.tensor([3.0, -2.0]), torch.ones(12, 3, 2, 1)], dim=-1)
    scores = probe_slots(sample_slots(slots, truth, true))
    assert scores["position_r2"] == pytest.approx(1.0, abs=1e-4)
    assert not math.isnan(scores["position_r2"])


def test_joining() -> None:
    samples = planted()
    both = join_samples([samples, ProbeSamples(samples.slots, samples.videos, samples.positions, samples.colors)])
    assert len(both.slots) == 2 * len(samples.slots)
    assert both.shapes is None
    assert both.colors is not None


def test_refusals() -> None:
    with pytest.raises(ShapeError, match="as many facts"):
        ProbeSamples(torch.zeros(3, 2), torch.zeros(2, dtype=torch.long), torch.zeros(3, 2))
    with pytest.raises(ConfigError, match="at least one batch"):
        join_samples([])
    true = torch.ones(1, 1, 1, 4, 4, dtype=torch.bool)
    with pytest.raises(ShapeError, match="slots"):
        sample_slots(torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 2, 4, 4), true)
    with pytest.raises(ShapeError, match="frames"):
        object_facts(true, torch.zeros(1, 1, 3, 8, 8))
