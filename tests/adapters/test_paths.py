from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from stand_in_parts import SlotAttention
from torch import Tensor, nn

from ssync_pl import adapters
from ssync_pl.adapters import Capture, PathAdapter, SlotMap, frame_size, join_sides, resolve_grid
from ssync_pl.adapters.grids import joint_heads, separate_heads
from ssync_pl.adapters.pairing import Seen, find_pair, join_maps
from ssync_pl.errors import ConfigError, HostError, ShapeError
from ssync_pl.method.maps import SSyncMaps

B, T, S, HEADS, N = 2, 3, 4, 3, 16
ABSENT = torch.tensor([[False, True, False, True], [False, False, False, True]])
Output, Wrong = namedtuple("Output", ["slots", "attention"]), namedtuple("Wrong", ["slots"])


class _Give(nn.Module):
    def forward(self, value: Any) -> Any:
        return value


def _host() -> nn.ModuleDict:
    return nn.ModuleDict({"grouping": _Give(), "decoder": _Give()})


def _collect(attention, masks, batch=None, path="grouping", **options):
    host = _host()
    adapter = PathAdapter(path, "decoder", **{"attention_kind": "logits", "masks_kind": "logits", **options})
    capture = adapter.attach(host)
    capture.open()
    for name, values in (("grouping", attention), ("decoder", masks)):
        for value in values:
            host[name](value)
    return adapter.collect(capture, batch)


def joined(attention: Tensor, grid: tuple[int, int], masks: Tensor) -> SSyncMaps:
    return join_sides(SlotMap(attention), grid, SlotMap(masks.flatten(3)), masks.shape[3:])


def rand(*shape: int) -> Tensor:
    return torch.randn(shape)


def test_frames_of_a_scan_are_stacked_and_kinds_go_to_the_right_sides() -> None:
    frames, masks = [rand(2, 3, 4) for _ in range(5)], rand(2, 5, 3, 4)
    maps = _collect(frames, [masks])
    assert maps.grid == (2, 2)
    assert torch.equal(maps.attention_logits, torch.stack(frames, 1))
    assert maps.mask_logits is masks
    assert torch.equal(_collect(frames, [masks.flatten(0, 1)]).mask_logits, masks)  # frames in the batch
    drawn = rand(2, 5, 3, 1, 4, 4)  # with a channel axis, whole or frame by frame
    whole, single = (_collect(frames, values, grid=(2, 2)) for values in ([drawn], list(drawn.unbind(1))))
    assert whole.mask_probs.shape == (2, 5, 3, 4)
    assert torch.equal(whole.mask_probs, single.mask_probs)
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
        ((6,), (6,), None, None, "6 patches, which is no square. Pass grid"),
        ((6,), (6,), None, (2, 2), "`grid` to have 6 patches"),
        ((16,), (2, 8), None, (4, 4), r"one `grid`.* but got \[\(2, 8\), \(4, 4\)\]"),
        ((4, 4), (2, 8), None, None, r"one `grid`.* but got \[\(2, 8\), \(4, 4\)\]"),
        ((2, 6), (6, 4), None, None, "to divide each other"),
        ((4,), (8, 8), None, (3, 3), "have 4 or 64 patches, but got"),
        ((4,), (9,), None, None, "same slots, videos and frames"),
    ],
)
def test_grids_of_named_places(attention: Any, masks: Any, batch: Any, grid: Any, expected: Any) -> None:
    sides = [rand(1, 1, 2, *attention)], [rand(1, 1, 2, *masks)]
    if isinstance(expected, tuple):
        assert _collect(*sides, batch, grid=grid).grid == expected
    else:
        with pytest.raises((HostError, ShapeError), match=expected):
            _collect(*sides, batch, grid=grid)


NOT_TOGETHER = r"same slots, videos and frames.*'grouping' gave \(.*'decoder' gave \("


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ([], HostError, "'grouping' to run inside the training step, but it did not"),
        ([rand(2, 4)], HostError, r"gave \(2, 4\) in 1 call"),
        ([rand(1, 1, 2, 4)] * 2, HostError, r"gave \(1, 1, 2, 4\) in 2 call"),
        ([rand(1, 2, 4), rand(1, 3, 4)], HostError, "one shape for all frames"),
        ([rand(1, 1, 2, 1)], ShapeError, "more patches than slots"),
        ([torch.zeros(1, 1, 2, 4, dtype=torch.long)], ShapeError, "floating-point"),
        *(([rand(*shape)], ShapeError, NOT_TOGETHER) for shape in ((1, 1, 3, 4), (1, 2, 2, 4), (2, 1, 2, 4))),
    ],
)
def test_values_that_are_not_understood(values: list[Tensor], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        _collect(values, [rand(1, 1, 2, 4)])


def test_a_place_is_a_path_and_both_paths_are_needed() -> None:
    for place in ("", ":key", "softmax:", "softmax::1", "softmax:decoder:masks"):
        with pytest.raises(ConfigError, match="softmax"):
            PathAdapter("grouping", place)
    host = _host()
    assert PathAdapter("grouping:attn", "decoder").match(host)
    assert not PathAdapter("grouping", "decode").match(host)
    with pytest.raises(HostError, match=r"no child 'decode'. Its children: grouping, decoder"):
        PathAdapter("grouping", "decode").attach(host)
    assert not any(module._forward_hooks for module in host.modules())


@pytest.mark.parametrize(
    ("patches", "options", "grid"),
    [
        (48, {"explicit": (4, 12), "patch_size": 14, "frame": (84, 112)}, (4, 12)),
        (48, {"patch_size": (14, 7), "frame": (84, 56)}, (6, 8)),
        (36, {"patch_size": 14, "frame": (224, 224)}, (6, 6)),
        (864, {"frame": (340, 517)}, (24, 36)),
        *(((100 // size) * (37 // size), {"frame": (100, 37)}, (100 // size, 37 // size)) for size in (3, 9, 22)),
        (48, {"frame": (224, 224)}, "no square"),
        (144, {"frame": (120, 180)}, r"Expected square patches, but none cut .* Pass grid"),
    ],
)
def test_grids_are_found_or_asked_for(patches: int, options: dict[str, Any], grid: Any) -> None:
    if isinstance(grid, tuple):
        assert resolve_grid(patches, **options) == grid
    else:
        with pytest.raises(HostError, match=grid):
            resolve_grid(patches, **options)


def test_the_size_of_frames() -> None:
    clip, features = torch.zeros(1, 2, 3, 8, 12), torch.zeros(2, 3, 16, 40)
    for batch in (
        *({"video": clip}, {"video": clip.movedim(2, -1)}, [clip[0]], clip),
        *({"frames": clip, "label": torch.zeros(4)}, {"features": features, "video": clip}),
    ):
        assert frame_size(batch) == (8, 12)
    for batch in ({"video": [1, 2]}, [torch.zeros(2, 7, 8, 12)], {"features": features}, None):
        assert frame_size(batch) is None
    assert frame_size({"video": torch.zeros(1, 2, 3, 8, 4)}) == (8, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_finer_map_is_averaged_in_full_precision(dtype: torch.dtype) -> None:
    full = torch.promote_types(dtype, torch.float32)
    coarse, fine = torch.randn(1, 2, 3, 4, dtype=dtype), torch.randn(1, 2, 3, 4, 6, dtype=dtype, requires_grad=True)

    def blocks(value: torch.Tensor) -> torch.Tensor:
        return value.to(full).unflatten(4, (2, 3)).unflatten(3, (2, 2)).mean((4, 6)).flatten(3)

    maps = joined(coarse, (2, 2), fine)
    assert maps.attention_logits is coarse
    assert maps.mask_logits is None
    torch.testing.assert_close(maps.mask_probs, blocks(fine.to(full).softmax(2)))
    assert maps.masks.requires_grad
    maps = joined(fine.flatten(3), (4, 6), coarse.unflatten(3, (2, 2)))
    assert maps.grid == (2, 2)
    assert torch.equal(maps.mask_logits, coarse)
    torch.testing.assert_close(maps.attention_probs, blocks(fine.to(full).softmax(2)))
    torch.testing.assert_close(maps.attention_logits, blocks(fine))


def test_absent_slots_of_heads_stay_absent_without_a_nan() -> None:
    logits, gone = torch.randn(B, S, HEADS, N, requires_grad=True), ABSENT[:, :, None, None]
    # Unlike a fill, an addition hands a NaN in the gradient on.
    masked = logits + torch.zeros(gone.shape).masked_fill(gone, float("-inf"))
    merged = joint_heads(masked, 2)
    assert torch.equal(merged.isneginf(), ABSENT[:, :, None].expand(B, S, N))
    for probs in (merged.softmax(1), separate_heads(masked, 2, 1).probs):
        torch.testing.assert_close(probs.sum(1), torch.ones(B, N))
        grad = torch.autograd.grad(probs.square().sum(), logits, retain_graph=True)[0]
        assert grad.isfinite().all()
        assert (grad[ABSENT] == 0).all()
        assert (grad[~ABSENT] != 0).any()


def seen(shape: tuple[int, ...], axis: int, calls: int = 1, name: str = "a", heads: bool = True) -> Seen:
    return Seen([torch.randn(shape) for _ in range(calls)], axis, "logits", name, heads)


SCAN = seen((2, 3, 16), 1, 4)


@pytest.mark.parametrize(
    ("attention", "masks", "sizes"),
    [
        (SCAN, seen((2, 3, 16), 1, 4), (2, 4)),
        (seen((8, 3, 16), 1), seen((2, 3, 16), 1, 4), (2, 4)),
        (seen((8, 3, 16), 1), seen((8, 16, 3), 2), (8, 1)),
        (seen((2, 5, 3, 16), 2), seen((2, 3, 16), 1), (2, 1)),  # five heads
        (seen((2, 5, 3, 16), 2), seen((10, 3, 16), 1), (2, 5)),  # five frames
        (seen((2, 3, 16), 1, 3), seen((8, 3, 16), 1), None),  # other frames
        *((SCAN, seen(shape, 1), None) for shape in ((8, 4, 16), (8, 3, 24))),  # other slots, patches that do not fit
        (seen((2, 5, 3, 16), 2, heads=False), seen((2, 3, 16), 1), None),
    ],
)
def test_what_belongs_together(attention: Seen, masks: Seen, sizes: tuple[int, int] | None) -> None:
    pair = find_pair([attention], [masks._replace(name="b")])
    assert (None if pair is None else pair[-2:]) == sizes


def test_the_likelier_pair_wins_and_heads_are_not_rows_where_the_grids_would_not_fit() -> None:
    slots_of_slots, cross = seen((2, 3, 3), 2, 4), seen((8, 2, 16, 3), 3)
    early, last = seen((8, 3, 16), 1), seen((8, 16, 3), 2)
    pair = find_pair([SCAN, slots_of_slots], [cross, early, last, cross._replace(name="c")])
    assert pair.attention is SCAN
    assert pair.masks is last  # as late as can be, but not the heads of a cross-attention
    assert find_pair([SCAN], [SCAN]) is None  # one softmax is not both maps
    # STEVE: slot attention on 64 x 64 pixels once per frame, cross-attention of 4 heads from 16 x 16 tokens to slots.
    attention, cross = seen((2, 4096, 5), 2, 3), seen((6, 4, 256, 5), 3, name="b")
    maps = join_maps(find_pair([attention], [cross]))
    assert maps.grid == (16, 16)
    torch.testing.assert_close(maps.masks, cross.values[0].softmax(3).mean(1).mT.unflatten(0, (2, 3)))
    # Rows and columns behind one another stay rows and columns where they fit.
    pixels = find_pair([attention], [seen((6, 64, 64, 5), 3, name="b")])
    assert (pixels.layouts[1].heads, pixels.layouts[1].patches) == (1, (64, 64))


X = torch.zeros(1, 2)


def test_a_step_that_goes_past_hooks_is_told() -> None:
    host, capture = nn.Sequential(nn.Linear(2, 2)), Capture()
    capture.watch("host", host)
    capture.watch("0", host[0])
    capture.open()
    capture.refuse_bypass()  # nothing ran yet
    host.forward(X)
    with pytest.raises(HostError, match=r"hooks on 'host' .* method forward of Sequential"):
        capture.refuse_bypass()
    host(X)
    capture.refuse_bypass()


def test_the_last_softmax_of_each_call_counts() -> None:
    module, capture = SlotAttention(3), Capture()
    adapters.watch_softmax(capture, "attention", module)
    capture.open()
    outputs = [module(torch.randn(2, 9, 8), torch.randn(2, 3, 8)) for _ in range(3)]
    for call, (_, probs) in zip(capture["attention"], outputs, strict=True):
        assert torch.equal(call.logits.softmax(1), probs)
    module.softmax = torch.sigmoid
    with pytest.raises(HostError, match="softmax over slots, but none ran"):
        module(torch.randn(2, 9, 8), torch.randn(2, 3, 8))
