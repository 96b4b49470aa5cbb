import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from metric_helpers import SCENE, items
from torch import Tensor

from ssync_pl.errors import ConfigError, ShapeError
from ssync_pl.metrics.functional import boundary_f, contingency, labels_to_masks, read_scene, slot_identity
from ssync_pl.metrics.functional.slots import slots_per_object, used_slots

Scene = tuple[Tensor, Tensor]


def naive_borders(labels: Tensor) -> set[tuple[int, int]]:
    pixels = {(y, x): int(labels[y, x]) for y in range(labels.shape[0]) for x in range(labels.shape[1])}
    steps = (0, 1), (1, 0), (1, 1)
    return {(y, x) for (y, x), one in pixels.items() if any(pixels.get((y + j, x + i), one) != one for j, i in steps)}


def naive_boundary_f(pred: Tensor, true: Tensor, tolerance: float) -> float | None:
    found, wanted = naive_borders(pred), naive_borders(true)
    radius = max(1, math.ceil(tolerance * math.hypot(*pred.shape)))

    def share(ones: set[tuple[int, int]], others: set[tuple[int, int]]) -> float:
        hits = sum(any(abs(y - j) <= radius and abs(x - i) <= radius for j, i in others) for y, x in ones)
        return hits / len(ones) if ones else 0.0

    if not wanted:
        return None
    precision, recall = share(found, wanted), share(wanted, found)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def naive_slots_per_object(pred: Tensor, true: Tensor, min_share: float) -> float | None:
    counts = []
    for number in range(1, int(true.max()) + 1):
        own = 0
        for slot in range(int(pred.max()) + 1):
            won = true[pred == slot].tolist()
            pixels = {segment: won.count(segment) for segment in set(won)}
            mine = pixels.pop(number, 0)
            first = all(mine > other if segment <= number else mine >= other for segment, other in pixels.items())
            own += bool(mine and first and mine >= min_share * int((true == number).sum()))
        if own:
            counts.append(own)
    return sum(counts) / len(counts) if counts else None


def naive_identity(pred: Tensor, true: Tensor) -> float | None:
    kept = steps = 0
    for number in range(1, int(true.max()) + 1):
        for t in range(len(true) - 1):
            firsts = []
            for frame in (t, t + 1):
                won = pred[frame][true[frame] == number].tolist()
                most = max((won.count(slot) for slot in set(won)), default=0)
                firsts.append({slot for slot in set(won) if won.count(slot) == most})
            if all(firsts):
                steps += 1
                kept += bool(firsts[0] & firsts[1])
    return kept / steps if steps else None


def random_scenes(seed: int, videos: int = 2) -> Scene:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 4, (videos, 3, 3, 5), generator=generator)
    truth = coarse.repeat_interleave(4, 2).repeat_interleave(4, 3)
    noise = torch.randint(0, 6, (videos, 3, 6, 10), generator=generator).repeat_interleave(2, 2).repeat_interleave(2, 3)
    keep = torch.rand(videos, 3, 6, 10, generator=generator).repeat_interleave(2, 2).repeat_interleave(2, 3)
    return torch.where(keep < 0.5, noise, truth), truth


def by_videos(naive: Callable[..., float | None], pred: Tensor, truth: Tensor, *args: float) -> Any:
    return pytest.approx([naive(p, t, *args) for p, t in zip(pred, truth, strict=True)])


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("tolerance", "min_share"), [(0.0, 0.0), (0.0075, 0.01), (0.1, 0.3)])
def test_against_loops(seed: int, tolerance: float, min_share: float) -> None:
    pred, truth = random_scenes(seed)
    true = labels_to_masks(truth, 4)
    got = boundary_f(read_scene(pred, true), tolerance).flatten().tolist()
    assert got == by_videos(naive_boundary_f, pred.flatten(0, 1), truth.flatten(0, 1), tolerance)
    got = items(slots_per_object, pred, true, background=True, min_share=min_share).tolist()
    assert got == by_videos(naive_slots_per_object, pred, truth, min_share)
    got = items(slot_identity, pred, true, level="image", background=True).tolist()
    assert got == by_videos(naive_identity, pred, truth)


def test_used_slots_against_sets() -> None:
    masks = torch.randn(3, 2, 9, 2, 2, generator=torch.Generator().manual_seed(0))
    valid = torch.tensor([[True, True], [True, False], [False, False]])
    found = used_slots(masks, valid)
    winners = masks.argmax(2).flatten(2)
    assert found[:2].tolist() == [len(set(winners[0].flatten().tolist())), len(set(winners[1, 0].tolist()))]
    assert found[2].isnan()


def test_the_border_of_a_mask_behind_another_one_does_not_count() -> None:
    hidden = torch.zeros(1, 1, 2, 4, 8, dtype=torch.bool)
    hidden[0, 0, 0, :, :4] = hidden[0, 0, 1, :, 2:4] = True  # no background channel; the second hides behind the first
    pred = (torch.arange(8) < 4).long().expand(1, 1, 4, 8)
    assert boundary_f(read_scene(pred, hidden), tolerance=0.0).item() == 1.0


def test_refusals() -> None:
    for bad in (-0.1, 7.0):
        with pytest.raises(ConfigError, match="tolerance"):
            boundary_f(read_scene(*SCENE), tolerance=bad)
        with pytest.raises(ConfigError, match="min_share"):
            slots_per_object(contingency(read_scene(*SCENE)), min_share=bad)
    with pytest.raises(ShapeError, match="how many slots"):
        used_slots(SCENE[0])
    with pytest.raises(ShapeError, match="valid"):
        used_slots(torch.rand(2, 2, 3, 4, 4), torch.ones(3, dtype=torch.bool))
