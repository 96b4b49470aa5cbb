"""Maps that users name: outputs of modules."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssync_pl.adapters import PathAdapter
from ssync_pl.errors import ConfigError, HostError, ShapeError
from ssync_pl.method.maps import SSyncMaps

Output, Wrong = namedtuple("Output", ["slots", "attention"]), namedtuple("Wrong", ["slots"])


class _Give(nn.Module):
    """Returns what it is given."""

    def forward(self, value: Any) -> Any:
        return value


def _collect(
    attention: list[Any], masks: list[Any], batch: Any = None, path: str = "grouping", **options: Any
) -> SSyncMaps:
    host = nn.ModuleDict({"grouping": _Give(), "decoder": _Give()})
    adapter = PathAdapter(path, "decoder", **{"attention_kind": "logits", "masks_kind": "logits", **options})
    capture = adapter.attach(host)
    capture.open()
    for name, values in (("grouping", attention), ("decoder", masks)):
        for value in values:
            host[name](value)
    return adapter.collect(capture, batch)


def rand(*shape: int) -> Tensor:
    return torch.randn(shape)


def test_frames_of_a_scan_are_stacked_and_frames_in_the_batch_unfolded() -> None:
    frames, masks = [rand(2, 3, 4) for _ in range(5)], rand(2, 5, 3, 4)
    maps = _collect(frames, [masks])
    assert maps.grid == (2, 2)
    assert torch.equal(maps.attention_logits, torch.stack(frames, 1))
    assert maps.mask_logits is masks
    folded = _collect(frames, [masks.flatten(0, 1)])
    assert torch.equal(folded.mask_logits, masks)


def test_kinds_go_to_the_right_sides() -> None:
    value = torch.full((1, 1, 2, 4), 0.5)
    maps = _collect([value], [value], attention_kind="probs")
    assert maps.attention_probs is maps.mask_logits is value
    assert maps.attention_logits is maps.mask_probs is None


@pytest.mark.parametrize(
    ("path", "wrap", "wrong", "message"),
    [
        ("grouping:attention", lambda v: {"slots": 0, "attention": v}, {"attn": 1}, "dict with keys attn"),
        ("grouping:attention", lambda v: Output(0, v), Wrong(0), "Wrong with fields slots"),
        ("grouping:1", lambda v: (0, v), (0,), "tuple of 1"),
        ("grouping:-1", lambda v: [0, v], [], "list of 0"),
    ],
)
def test_entries_of_an_output(path: str, wrap: Callable[[Tensor], Any], wrong: Any, message: str) -> None:
    value = rand(1, 1, 2, 4)
    assert _collect([wrap(value)], [value], path=path).attention_logits is value
    with pytest.raises(HostError, match=f"tensor at '{path}', .*of type {message}.*'grouping:key'"):
        _collect([wrong], [value], path=path)


@pytest.mark.parametrize("inner", ["", "model"])
def test_one_module_or_the_host_itself_may_give_both_maps(inner: str) -> None:
    host = nn.ModuleDict({"model": _Give()}) if inner else _Give()
    adapter = PathAdapter(f"{inner or '.'}:d", f"{inner or '.'}:a", "logits", "logits")
    capture = adapter.attach(host)
    capture.open()
    d, a = rand(1, 1, 2, 4), rand(1, 1, 2, 4)
    (host["model"] if inner else host)({"d": d, "a": a})
    maps = adapter.collect(capture)
    assert maps.attention_logits is d
    assert maps.mask_logits is a


FLAT, WIDE = {"video": torch.zeros(1, 1, 3, 112, 252)}, {"video": torch.zeros(1, 1, 3, 32, 96)}


@pytest.mark.parametrize(
    ("attention", "masks", "batch", "grid", "expected"),
    [
        ((144,), (144,), None, None, (12, 12)),
        ((144,), (144,), FLAT, None, (8, 18)),  # from the frames
        ((144,), (144,), FLAT, (12, 12), (12, 12)),
        ((12,), (2, 6), None, None, (2, 6)),  # from rows and columns
        ((12,), (8, 24), None, None, (2, 6)),
        ((12,), (192,), WIDE, None, (2, 6)),
        ((16,), (2, 8), None, [2, 8], (2, 8)),  # a configuration file gives a list
    ],
)
def test_grids(attention: Any, masks: Any, batch: Any, grid: Any, expected: tuple[int, int]) -> None:
    assert _collect([rand(1, 1, 2, *attention)], [rand(1, 1, 2, *masks)], batch, grid=grid).grid == expected


@pytest.mark.parametrize(
    ("attention", "masks", "grid", "error", "message"),
    [
        ((6,), (6,), None, HostError, "6 patches, which is no square. Pass grid"),
        ((6,), (6,), (2, 2), HostError, "`grid` to have 6 patches"),
        ((16,), (2, 8), (4, 4), HostError, r"one `grid`.* but got \[\(2, 8\), \(4, 4\)\]"),
        ((4, 4), (2, 8), None, HostError, r"one `grid`.* but got \[\(2, 8\), \(4, 4\)\]"),
        ((2, 6), (6, 4), None, HostError, "to divide each other"),
        ((4,), (8, 8), (3, 3), HostError, "have 4 or 64 patches, but got"),
        ((4,), (9,), None, ShapeError, "same slots, videos and frames"),
    ],
)
def test_grids_that_do_not_fit_are_refused(attention: Any, masks: Any, grid: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        _collect([rand(1, 1, 2, *attention)], [rand(1, 1, 2, *masks)], grid=grid)


NOT_TOGETHER = r"same slots, videos and frames.*'grouping' gave \(.*'decoder' gave \("


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ([], HostError, "'grouping' to run inside the training step, but it did not"),
        ([rand(2, 4)], HostError, r"gave \(2, 4\) in 1 call"),
        ([rand(1, 1, 2, 4)] * 2, HostError, r"gave \(1, 1, 2, 4\) in 2 call"),
        ([rand(1, 2, 4), rand(1, 3, 4)], HostError, "one shape for all frames"),
        ([torch.zeros(1, 1, 2, 4, dtype=torch.long)], ShapeError, "floating-point"),
        *(([rand(*shape)], ShapeError, NOT_TOGETHER) for shape in ((1, 1, 3, 4), (1, 2, 2, 4), (2, 1, 2, 4))),
    ],
)
def test_values_that_are_not_understood(values: list[Tensor], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        _collect(values, [rand(1, 1, 2, 4)])


@pytest.mark.parametrize("place", ["", ":key", "softmax:", "softmax::1", "softmax:decoder:masks"])
def test_a_place_is_a_path(place: str) -> None:
    with pytest.raises(ConfigError, match="softmax"):
        PathAdapter("grouping", place)


def test_match_and_attach_need_both_paths() -> None:
    host = nn.ModuleDict({"grouping": _Give(), "decoder": _Give()})
    assert PathAdapter("grouping:attn", "decoder").match(host)
    assert not PathAdapter("grouping", "decode").match(host)
    with pytest.raises(HostError, match=r"no child 'decode'. Its children: grouping, decoder"):
        PathAdapter("grouping", "decode").attach(host)
    assert not any(module._forward_hooks for module in host.modules())
