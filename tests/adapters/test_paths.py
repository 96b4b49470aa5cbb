from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssync_pl.adapters import PathAdapter
from ssync_pl.errors import ConfigError, HostError, ShapeError
from ssync_pl.method.maps import SSyncMaps

Output = namedtuple("Output", ["slots", "attention"])


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


def test_frames_of_a_scan_are_stacked() -> None:
    frames, masks = [torch.randn(2, 3, 4) for _ in range(5)], torch.randn(2, 5, 3, 4, requires_grad=True)
    maps = _collect(frames, [masks])
    assert maps.shape == (2, 5, 3, 4)
    assert maps.grid == (2, 2)
    assert torch.equal(maps.attention_logits, torch.stack(frames, 1))
    assert maps.mask_logits is masks


def test_rows_and_columns_of_the_maps_are_the_grid() -> None:
    masks = torch.randn(1, 2, 3, 2, 6)
    maps = _collect([torch.randn(1, 2, 3, 12)], [masks])
    assert maps.grid == (2, 6)
    assert torch.equal(maps.mask_logits, masks.flatten(3))


def test_kinds_go_to_the_right_sides() -> None:
    value = torch.full((1, 1, 2, 4), 0.5)
    maps = _collect([value], [value], attention_kind="probs")
    assert maps.attention_probs is value
    assert maps.attention_logits is None
    assert maps.mask_logits is value
    assert maps.mask_probs is None


@pytest.mark.parametrize(
    ("path", "wrap"),
    [
        ("grouping:attention", lambda v: {"slots": 0, "attention": v}),
        ("grouping:attention", lambda v: Output(0, v)),
        ("grouping:1", lambda v: (0, v)),
        ("grouping:-1", lambda v: [0, v]),
    ],
)
def test_entries_of_an_output(path: str, wrap: Any) -> None:
    value = torch.randn(1, 1, 2, 4)
    assert _collect([wrap(value)], [value], path=path).attention_logits is value


@pytest.mark.parametrize(
    ("path", "output", "message"),
    [
        ("grouping", {"slots": 0, "attn": 1}, "dict with keys slots, attn"),
        ("grouping:attention", {"slots": 0}, "dict with keys slots"),
        ("grouping:masks", Output(0, 1), "Output with fields slots, attention"),
        ("grouping:2", (0, 1), "tuple of 2"),
        ("grouping:-3", (0, 1), "tuple of 2"),
    ],
)
def test_an_entry_that_is_no_tensor_is_refused(path: str, output: Any, message: str) -> None:
    with pytest.raises(HostError, match=f"tensor at '{path}', .*of type {message}.*'grouping:key'"):
        _collect([output], [torch.zeros(1, 1, 2, 4)], path=path)


def test_grid_from_the_frames_of_the_batch() -> None:
    value = torch.randn(1, 1, 2, 144)
    assert _collect([value], [value], {"video": torch.zeros(1, 1, 3, 112, 252)}).grid == (8, 18)
    assert _collect([value], [value], {"video": torch.zeros(1, 1, 3, 112, 252)}, grid=(12, 12)).grid == (12, 12)
    assert _collect([value], [value]).grid == (12, 12)


def test_no_grid() -> None:
    value = torch.randn(1, 1, 2, 6)
    with pytest.raises(HostError, match=r"6 patches, which is no square. Pass grid"):
        _collect([value], [value])
    with pytest.raises(HostError, match="`grid` to have 6 patches"):
        _collect([value], [value], grid=(2, 2))


def test_grids_that_contradict_each_other_are_refused() -> None:
    flat, wide = torch.randn(1, 1, 2, 16), torch.randn(1, 1, 2, 2, 8)
    with pytest.raises(HostError, match=r"one `grid`.* but got \[\(2, 8\), \(4, 4\)\]"):
        _collect([flat], [wide], grid=(4, 4))
    with pytest.raises(HostError, match=r"one `grid`.* but got \[\(2, 8\), \(4, 4\)\]"):
        _collect([torch.randn(1, 1, 2, 4, 4)], [wide])
    assert _collect([flat], [wide], grid=[2, 8]).grid == (2, 8)  # a config file gives a list


def test_finer_masks_are_averaged_to_the_grid_of_the_attention() -> None:
    logits, masks = torch.randn(1, 1, 2, 4), torch.randn(1, 1, 2, 8, 8)
    maps = _collect([logits], [masks])
    assert maps.grid == (2, 2)
    assert maps.attention_logits is logits
    assert maps.mask_logits is None
    expected = masks.softmax(2).unflatten(4, (2, 4)).unflatten(3, (2, 4)).mean((4, 6)).flatten(3)
    assert torch.allclose(maps.mask_probs, expected)
    maps.check_values()


def test_finer_attention_is_averaged_to_the_grid_of_the_masks() -> None:
    logits, masks = torch.randn(1, 1, 2, 4, 4), torch.randn(1, 1, 2, 4)
    maps = _collect([logits], [masks])
    blocks = logits.unflatten(4, (2, 2)).unflatten(3, (2, 2))
    assert torch.allclose(maps.attention_logits, blocks.mean((4, 6)).flatten(3))
    assert torch.allclose(maps.attention_probs, blocks.softmax(2).mean((4, 6)).flatten(3))
    assert maps.mask_logits is masks


def test_averaged_probabilities_are_not_squashed_again() -> None:
    probs = torch.randn(1, 1, 2, 4, 4).softmax(2)
    maps = _collect([torch.randn(1, 1, 2, 4)], [probs], masks_kind="probs")
    assert torch.allclose(maps.mask_probs.sum(2), torch.ones(()))
    assert torch.allclose(maps.mask_probs.mean(3), probs.mean((3, 4)))


def test_frames_that_the_decoder_folds_into_the_batch() -> None:
    frames, masks = [torch.randn(2, 3, 4) for _ in range(5)], torch.randn(10, 3, 4)
    maps = _collect(frames, [masks])
    assert maps.shape == (2, 5, 3, 4)
    assert torch.equal(maps.mask_logits[1, 2], masks[1 * 5 + 2])


@pytest.mark.parametrize(
    ("attention", "masks"),
    [
        ((1, 1, 2, 4), (1, 1, 3, 4)),  # slots
        ((1, 2, 2, 4), (1, 3, 2, 4)),  # frames
        ((2, 2, 2, 4), (1, 2, 2, 4)),  # videos
        ((1, 1, 2, 4), (1, 1, 2, 9)),  # patches
    ],
)
def test_maps_that_do_not_belong_together_are_refused(attention: Any, masks: Any) -> None:
    with pytest.raises(ShapeError, match=r"same slots, videos and frames.*'grouping' gave \(.*'decoder' gave \("):
        _collect([torch.zeros(attention)], [torch.zeros(masks)])


def test_grids_that_do_not_divide_each_other_are_refused() -> None:
    with pytest.raises(HostError, match=r"\(2, 6\), and of the masks, \(6, 4\), to divide each other"):
        _collect([torch.zeros(1, 1, 2, 2, 6)], [torch.zeros(1, 1, 2, 6, 4)])
    with pytest.raises(HostError, match=r"have 4 or 64 patches, but got"):
        _collect([torch.zeros(1, 1, 2, 4)], [torch.zeros(1, 1, 2, 8, 8)], grid=(3, 3))


def test_the_grid_of_the_coarser_map() -> None:
    maps = _collect([torch.zeros(1, 1, 2, 12)], [torch.zeros(1, 1, 2, 8, 24)])
    assert maps.grid == (2, 6)  # from the rows and columns of the masks
    maps = _collect([torch.zeros(1, 1, 2, 12)], [torch.zeros(1, 1, 2, 192)], {"video": torch.zeros(1, 1, 3, 32, 96)})
    assert maps.grid == (2, 6)  # from the frames
    maps = _collect([torch.zeros(1, 1, 2, 12)], [torch.zeros(1, 1, 2, 8, 24)], grid=(2, 6))
    assert maps.grid == (2, 6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "'grouping' to run inside the training step, but it did not"),
        ([torch.zeros(2, 4)], r"gave \(2, 4\) in 1 call"),
        ([torch.zeros(1, 1, 2, 4)] * 2, r"gave \(1, 1, 2, 4\) in 2 call"),
        ([torch.zeros(1, 2, 4), torch.zeros(1, 3, 4)], "one shape for all frames"),
    ],
)
def test_shapes_that_are_not_understood(values: list[Tensor], message: str) -> None:
    with pytest.raises(HostError, match=message):
        _collect(values, [torch.zeros(1, 1, 2, 4)])


def test_integer_maps_are_refused() -> None:
    with pytest.raises(ShapeError, match="floating-point"):
        _collect([torch.zeros(1, 1, 2, 4, dtype=torch.long)], [torch.zeros(1, 1, 2, 4)])


def test_the_host_itself_may_give_both_maps() -> None:
    class Whole(nn.Module):
        def forward(self, d: Tensor, a: Tensor) -> dict[str, Tensor]:
            return {"d": d, "a": a}

    host, d, a = Whole(), torch.randn(1, 1, 2, 4), torch.randn(1, 1, 2, 4)
    adapter = PathAdapter(".:d", ".:a", "logits", "logits")
    capture = adapter.attach(host)
    capture.open()
    host(d, a)
    maps = adapter.collect(capture)
    assert maps.attention_logits is d
    assert maps.mask_logits is a


@pytest.mark.parametrize("place", ["", ":key", "softmax:", "softmax::1"])
def test_a_place_needs_a_path(place: str) -> None:
    with pytest.raises(ConfigError, match=f"place as 'path', 'path:key' or 'softmax:path', but got '{place}'"):
        PathAdapter(place, "decoder")


def test_the_axis_of_a_softmax_is_a_number() -> None:
    with pytest.raises(ConfigError, match="axis of the softmax behind 'softmax:decoder:', but got 'masks'"):
        PathAdapter("grouping", "softmax:decoder:masks")


def test_match_and_attach_need_both_paths() -> None:
    host = nn.ModuleDict({"grouping": _Give(), "decoder": _Give()})
    assert PathAdapter("grouping:attn", "decoder").match(host)
    assert not PathAdapter("grouping", "decode").match(host)
    with pytest.raises(HostError, match=r"no child 'decode'. Its children: grouping, decoder"):
        PathAdapter("grouping", "decode").attach(host)
    assert not any(module._forward_hooks for module in host.modules())


def test_one_module_may_give_both_maps() -> None:
    host = nn.ModuleDict({"model": _Give()})
    adapter = PathAdapter("model:d", "model:a", "logits", "logits")
    capture = adapter.attach(host)
    capture.open()
    d, a = torch.randn(1, 1, 2, 4), torch.randn(1, 1, 2, 4)
    host["model"]({"d": d, "a": a})
    maps = adapter.collect(capture)
    assert maps.attention_logits is d
    assert maps.mask_logits is a
