import dataclasses
import pickle

import numpy as np
import pytest
import torch

from ssync_pl import SSyncMaps
from ssync_pl.errors import ShapeError


def logits(**kwargs):
    return torch.zeros(2, 3, 4, 6, **kwargs)


def make(**changes):
    return SSyncMaps(**{"attention_logits": logits(), "mask_logits": logits(), "grid": (2, 3), **changes})


@pytest.mark.parametrize("kinds", [("logits", "probs"), ("probs", "logits"), ("logits", "logits"), ("both", "both")])
def test_probabilities_come_first(kinds):
    given = {f"{side}_{name}": None for side in ("attention", "mask") for name in ("logits", "probs")}
    for side, kind in zip(("attention", "mask"), kinds, strict=True):
        given |= {f"{side}_{name}": logits() for name in ("logits", "probs") if kind in (name, "both")}
    maps = make(**given)
    assert maps.attention is given[f"attention_{kinds[0].replace('both', 'probs')}"]
    assert maps.masks is given[f"mask_{kinds[1].replace('both', 'probs')}"]
    assert maps.shape == (2, 3, 4, 6)


ONE_GRID = r"`grid` to be \(H, W\) with H \* W == 6, but got"


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("attention_logits", None, "`attention_logits` or `attention_probs` to be given.*slot attention"),
        ("mask_logits", None, "`mask_logits` or `mask_probs` to be given.*decoder masks"),
        ("mask_logits", logits(dtype=torch.int64), "`mask_logits`.*floating-point tensor .*got torch.int64"),
        ("mask_logits", np.zeros((2, 3, 4, 6)), "`mask_logits`.*got ndarray"),
        ("mask_logits", logits(dtype=torch.complex64), "got torch.complex64"),
        ("mask_logits", torch.zeros(2, 4, 6), r"got \(2, 4, 6\). Add the frame axis .* with .unsqueeze\(1\)"),
        ("mask_logits", torch.zeros(2, 3, 4, 2, 3), r"shape \(B, T, S, N\).*got \(2, 3, 4, 2, 3\)\.$"),
        ("mask_logits", torch.zeros(2, 0, 4, 6), "no empty axis"),
        ("mask_logits", torch.zeros(2, 3, 5, 6), r"of `attention_logits`, \(2, 3, 4, 6\), but got \(2, 3, 5, 6\)"),
        ("mask_logits", logits(device="meta"), "on cpu, but got meta"),
        *(("grid", grid, ONE_GRID) for grid in (None, (3, 3), (6,), (2, 3, 1), (0, 6), (-2, -3), 6, "2x3")),
    ],
)
def test_maps_and_grids_that_are_refused(name, value, match):
    with pytest.raises(ShapeError, match=match):
        make(**{name: value})


@pytest.mark.parametrize("grid", [(2, 3), (1, 6), [2, 3], torch.Size([2, 3]), (np.int64(2), np.int64(3))])
def test_grids_that_are_taken(grid):
    assert repr(make(grid=grid).grid) == repr(tuple(int(size) for size in grid))


@pytest.mark.parametrize(
    ("name", "shape", "dtype"),
    [("slot_valid", (2, 4), torch.bool), ("patch_valid", (2, 3, 6), torch.bool), ("frame_index", (2, 3), torch.int64)],
)
def test_companions(name, shape, dtype):
    good = torch.ones(shape, dtype=dtype)
    assert getattr(make(**{name: good}), name) is good
    shape_and_kind = "to be a (bool|integer) tensor of shape"
    for bad, match in (
        (good[:1], shape_and_kind),
        (good.float(), shape_and_kind),
        (good.tolist(), "to be a tensor .*got list"),
        (good.to("meta"), "to be on cpu, but got meta"),
    ):
        with pytest.raises(ShapeError, match=f"`{name}` {match}"):
            make(**{name: bad})


def test_they_are_frozen_compared_by_identity_pickled_detached_and_shown_without_values():
    maps = make(attention_probs=logits(requires_grad=True), slot_valid=torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(dataclasses.FrozenInstanceError):
        maps.grid = (3, 2)
    assert len({maps, maps, make()}) == 2
    assert pickle.loads(pickle.dumps(make())).grid == (2, 3)
    assert (maps.attention.requires_grad, maps.detach().attention.requires_grad) == (True, False)
    assert maps.detach().slot_valid is maps.slot_valid
    shown = "B=2, T=3, S=4, grid=(2, 3), attention=logits+probs, masks=logits, dtype=torch.float32, device=cpu"
    assert repr(make(attention_probs=logits())) == f"SSyncMaps({shown})"


def changed(value, place, to):
    value = value.clone()
    value[place] = to
    return value


PROBS, FIRST = logits().softmax(2), (0, 0, 0, 0)
NEGATIVE = changed(changed(PROBS, FIRST, -0.75), (0, 0, 1, 0), 1.25)
SLOTS = torch.tensor([[True, True, True, False]] * 2)
PATCHES = changed(torch.ones(2, 3, 6, dtype=torch.bool), (0, 0, 0), False)
BAD = changed(changed(logits(), (slice(None), slice(None), 3), torch.nan), (0, 0, slice(None), 0), torch.nan)
BAD_PROBS = torch.where(BAD.isnan(), BAD, 1 / 3)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({}, None),
        ({"attention_probs": PROBS, "mask_probs": torch.randn(2, 3, 4, 6).softmax(2)}, None),
        ({"attention_probs": torch.randn(2, 3, 4, 6).bfloat16().softmax(2)}, None),
        *(({name: changed(logits(), (1, 2, 3, 4), bad)}, f"`{name}` to be finite")
          for name in ("attention_logits", "mask_logits") for bad in (float("nan"), float("inf"))),
        # Minus infinity marks a slot that is ruled out.
        ({"mask_logits": changed(logits(), (slice(None), slice(None), 0), -torch.inf)}, None),
        ({"mask_probs": changed(PROBS, FIRST, 0.75)}, r"`mask_probs` to sum to 1 over slots.*from 1 to 1\.5"),
        ({"attention_probs": logits()}, "from 0 to 0"),
        ({"attention_logits": torch.randn(2, 3, 4, 6).softmax(2)}, "to be logits, but got probabilities"),
        ({"attention_probs": torch.randn(2, 3, 4, 6).softmax(3)}, "the slot axis, not over patches"),
        ({"mask_probs": NEGATIVE}, r"probabilities in \[0, 1\], but got values down to -0\.75.*`mask_logits`"),
        ({"mask_logits": BAD, "attention_probs": BAD_PROBS}, "finite"),
        ({"mask_logits": BAD, "slot_valid": SLOTS}, "finite"),
        ({"mask_logits": BAD, "attention_probs": BAD_PROBS, "slot_valid": SLOTS, "patch_valid": PATCHES}, None),
    ],
)  # fmt: skip
def test_values_are_checked(changes, match):
    maps = make(**changes)
    if match is None:
        maps.check_values()
    else:
        with pytest.raises(ShapeError, match=match):
            maps.check_values()
