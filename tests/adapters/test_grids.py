"""Heads, patches and frames: how tensors of any layout become one pair of maps on one grid."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from ssync_pl import SSyncConfig, ssync_loss
from ssync_pl.adapters import frame_size, maps_on_common_grid, resolve_grid
from ssync_pl.adapters.grids import joint_heads, separate_heads
from ssync_pl.adapters.pairing import Seen, find_pair, join_maps
from ssync_pl.errors import HostError
from ssync_pl.plugin.engine import check_first

B, T, S, HEADS, N = 2, 3, 4, 3, 16
ABSENT = torch.tensor([[False, True, False, True], [False, False, False, True]])


@pytest.mark.parametrize(
    ("patches", "options", "grid"),
    [
        (48, {"explicit": (4, 12), "patch_size": 14, "frame": (84, 112)}, (4, 12)),
        (48, {"patch_size": 14, "frame": (90, 119)}, (6, 8)),
        (48, {"patch_size": (14, 7), "frame": (84, 56)}, (6, 8)),
        (36, {"patch_size": 14, "frame": (224, 224)}, (6, 6)),
        (144, {"frame": (112, 252)}, (8, 18)),
        (864, {"frame": (340, 517)}, (24, 36)),
        (49, {}, (7, 7)),
        (48, {"explicit": (6, 7)}, r"`grid` to have 48 patches, but got \(6, 7\)"),
        (48, {}, r"48 patches, which is no square. Pass grid=\(H, W\)"),
        (48, {"frame": (224, 224)}, "no square"),
        (144, {"frame": (120, 180)}, r"Expected square patches, but none cut .* Pass grid"),
    ],
)
def test_grids_are_found_or_asked_for(patches: int, options: dict[str, Any], grid: Any) -> None:
    if isinstance(grid, str):
        with pytest.raises(HostError, match=grid):
            resolve_grid(patches, **options)
    else:
        assert resolve_grid(patches, **options) == grid


def test_a_grid_is_found_for_every_patch_size() -> None:
    for frame in ((96, 128), (100, 37), (31, 400)):
        for size in range(1, 30):
            rows, columns = frame[0] // size, frame[1] // size
            assert resolve_grid(rows * columns, frame=frame) == (rows, columns)


CLIP, FEATURES = torch.zeros(1, 2, 3, 8, 12), torch.zeros(2, 3, 16, 40)


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        ({"video": CLIP}, (8, 12)),
        ({"video": torch.zeros(1, 2, 8, 12, 3)}, (8, 12)),
        ({"video": torch.zeros(1, 2, 3, 8, 4)}, (8, 4)),
        ({"video": [1, 2]}, None),
        ([CLIP[0]], (8, 12)),
        ({"frames": CLIP, "label": torch.zeros(4)}, (8, 12)),
        (CLIP, (8, 12)),
        ([torch.zeros(2, 7, 8, 12)], None),
        ({"features": FEATURES}, None),
        ({"features": FEATURES, "video": CLIP}, (8, 12)),
        (None, None),
    ],
)
def test_the_size_of_frames(batch: Any, size: tuple[int, int] | None) -> None:
    assert frame_size(batch) == size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_finer_map_is_averaged_in_full_precision(dtype: torch.dtype) -> None:
    full = torch.promote_types(dtype, torch.float32)
    coarse, fine = torch.randn(1, 2, 3, 4, dtype=dtype), torch.randn(1, 2, 3, 4, 6, dtype=dtype, requires_grad=True)

    def blocks(value: torch.Tensor) -> torch.Tensor:
        return value.to(full).unflatten(4, (2, 3)).unflatten(3, (2, 2)).mean((4, 6)).flatten(3)

    maps = maps_on_common_grid(coarse, (2, 2), fine)
    assert maps.attention_logits is coarse
    assert maps.mask_logits is None
    torch.testing.assert_close(maps.mask_probs, blocks(fine.to(full).softmax(2)))
    assert maps.masks.requires_grad
    maps = maps_on_common_grid(fine.flatten(3), (4, 6), coarse.unflatten(3, (2, 2)))
    assert maps.grid == (2, 2)
    assert torch.equal(maps.mask_logits, coarse)
    torch.testing.assert_close(maps.attention_probs, blocks(fine.to(full).softmax(2)))
    torch.testing.assert_close(maps.attention_logits, blocks(fine))
    with pytest.raises(HostError, match="to divide each other"):
        maps_on_common_grid(coarse, (2, 2), fine[..., :3, :])


@pytest.mark.parametrize("added", [False, True])
def test_absent_slots_of_heads_stay_absent_without_a_nan(added: bool) -> None:
    logits, gone = torch.randn(B, S, HEADS, N, requires_grad=True), ABSENT[:, :, None, None]
    # Unlike a fill, an addition hands a NaN in the gradient on.
    bias = torch.zeros(gone.shape).masked_fill(gone, float("-inf"))
    masked = logits + bias if added else logits.masked_fill(gone, float("-inf"))
    merged = joint_heads(masked, 2)
    assert torch.equal(merged.isneginf(), ABSENT[:, :, None].expand(B, S, N))
    for probs in (merged.softmax(1), separate_heads(masked, 2, 1).probs):
        torch.testing.assert_close(probs.sum(1), torch.ones(B, N))
        grad = torch.autograd.grad(probs.square().sum(), logits, retain_graph=True)[0]
        assert grad.isfinite().all()
        assert (grad[ABSENT] == 0).all()
        assert (grad[~ABSENT] != 0).any()


@pytest.mark.parametrize("loss", ["brier", "ce"])
@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("side", [2, 4, 8])
def test_infinite_logits_bring_no_nan(loss: Any, marked: bool, side: int) -> None:
    dots, alpha = torch.randn(B, T, S, N, requires_grad=True), torch.randn(B, T, S, side, side, requires_grad=True)
    absent = ABSENT[:, None, :, None]
    filled = (dots.masked_fill(absent, -torch.inf), alpha.masked_fill(absent[..., None], -torch.inf))
    maps = maps_on_common_grid(filled[0], (4, 4), filled[1])
    maps = dataclasses.replace(maps, slot_valid=~ABSENT if marked else None)
    check_first(maps, "host", SSyncConfig())
    output = ssync_loss(maps, loss=loss, temperature=0.5, merge_threshold=0.5)
    output.loss.backward()
    assert output.loss.isfinite()
    for grad in (dots.grad.flatten(3), alpha.grad.flatten(3)):
        assert grad.isfinite().all()
        assert (grad[absent.expand(grad.shape)] == 0).all()
    assert alpha.grad.any()
    labels = torch.cat([output.encoder_labels.flatten(1), output.decoder_labels.flatten(1)], 1)
    assert not ABSENT.gather(1, labels).any()


def seen(shape: tuple[int, ...], axis: int, calls: int = 1, name: str = "a", heads: bool = True) -> Seen:
    return Seen([torch.randn(shape) for _ in range(calls)], axis, "logits", name, heads)


SCAN = seen((2, 3, 16), 1, 4)


@pytest.mark.parametrize(
    ("attention", "masks", "sizes"),
    [
        (SCAN, seen((8, 3, 16), 1), (2, 4)),
        (SCAN, seen((2, 4, 3, 16), 2), (2, 4)),
        (SCAN, seen((2, 3, 16), 1, 4), (2, 4)),
        (seen((8, 3, 16), 1), seen((2, 3, 16), 1, 4), (2, 4)),
        (seen((8, 3, 16), 1), seen((8, 16, 3), 2), (8, 1)),
        (seen((2, 5, 3, 16), 2), seen((2, 3, 16), 1), (2, 1)),  # five heads
        (seen((2, 5, 3, 16), 2), seen((10, 3, 16), 1), (2, 5)),  # five frames
        (seen((2, 3, 16), 1, 3), seen((8, 3, 16), 1), None),  # other frames
        (SCAN, seen((8, 4, 16), 1), None),  # other slots
        (SCAN, seen((8, 3, 24), 1), None),  # patches that do not fit
        (seen((2, 5, 3, 16), 2, heads=False), seen((2, 3, 16), 1), None),
    ],
)
def test_what_belongs_together(attention: Seen, masks: Seen, sizes: tuple[int, int] | None) -> None:
    pair = find_pair([attention], [masks._replace(name="b")])
    assert (None if pair is None else pair[-2:]) == sizes


def test_the_likelier_pair_wins() -> None:
    slots_of_slots, cross = seen((2, 3, 3), 2, 4), seen((8, 2, 16, 3), 3)
    early, last = seen((8, 3, 16), 1), seen((8, 16, 3), 2)
    pair = find_pair([SCAN, slots_of_slots], [cross, early, last, cross._replace(name="c")])
    assert pair.attention is SCAN
    assert pair.masks is last  # as late as can be, but not the heads of a cross-attention
    assert find_pair([SCAN], [SCAN]) is None  # one softmax is not both maps


def test_heads_in_front_of_patches_are_not_rows_where_the_grids_would_not_fit() -> None:
    # STEVE: slot attention on 64 x 64 pixels once per frame, cross-attention of 4 heads from 16 x 16 tokens to slots.
    attention, cross = seen((2, 4096, 5), 2, 3), seen((6, 4, 256, 5), 3, name="b")
    maps = join_maps(find_pair([attention], [cross]))
    assert maps.grid == (16, 16)
    torch.testing.assert_close(maps.masks, cross.values[0].softmax(3).mean(1).mT.unflatten(0, (2, 3)))
    # Rows and columns behind one another stay rows and columns where they fit.
    pixels = find_pair([attention], [seen((6, 64, 64, 5), 3, name="b")])
    assert (pixels.layouts[1].heads, pixels.layouts[1].patches) == (1, (64, 64))
