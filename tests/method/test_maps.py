"""The contract between a host and the method: what is taken, what is refused, and how the error reads."""

import dataclasses
import pickle

import numpy as np
import pytest
import torch

from ssync_pl import SSyncMaps
from ssync_pl.errors import ShapeError


def logits(*shape, **kwargs):
    return torch.zeros(shape or (2, 3, 4, 6), **kwargs)


def make(**changes):
    settings = {"attention_logits": logits(), "mask_logits": logits(), "grid": (2, 3), **changes}
    return SSyncMaps(**settings)


def refuse(match, **changes):
    with pytest.raises(ShapeError, match=match):
        make(**changes)


@pytest.mark.parametrize("attention", ["logits", "probs", "both"])
@pytest.mark.parametrize("mask", ["logits", "probs", "both"])
def test_probabilities_come_first(attention, mask):
    given = {}
    for side, kind in (("attention", attention), ("mask", mask)):
        for name in ("logits", "probs"):
            given[f"{side}_{name}"] = logits() if kind in (name, "both") else None
    maps = make(**given)
    expected = {"logits": "logits", "probs": "probs", "both": "probs"}
    assert maps.attention is given[f"attention_{expected[attention]}"]
    assert maps.masks is given[f"mask_{expected[mask]}"]
    assert maps.shape == (2, 3, 4, 6)


def test_a_side_that_is_missing():
    refuse("`attention_logits` or `attention_probs` to be given.*slot attention", attention_logits=None)
    refuse("`mask_logits` or `mask_probs` to be given.*decoder masks", mask_logits=None)


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (torch.zeros(2, 3, 4, 6, dtype=torch.int64), "floating-point tensor .*got torch.int64"),
        (np.zeros((2, 3, 4, 6)), "got ndarray"),
        (torch.zeros(2, 3, 4, 6, dtype=torch.complex64), "got torch.complex64"),
        (torch.zeros(2, 4, 6), r"got \(2, 4, 6\). Add the frame axis of an image model with .unsqueeze\(1\)"),
        (torch.zeros(2, 3, 4, 2, 3), r"shape \(B, T, S, N\).*got \(2, 3, 4, 2, 3\)\.$"),
        (torch.zeros(2, 0, 4, 6), "no empty axis"),
        (torch.zeros(2, 3, 5, 6), r"shape of `attention_logits`, \(2, 3, 4, 6\), but got \(2, 3, 5, 6\)"),
        (torch.zeros(2, 3, 4, 6, device="meta"), "on cpu, but got meta"),
    ],
)
def test_maps_that_are_refused(value, match):
    refuse(f"`mask_logits`.*{match}", mask_logits=value)


@pytest.mark.parametrize("grid", [None, (3, 3), (6,), (2, 3, 1), (0, 6), (-2, -3), 6, "2x3"])
def test_grids_that_are_refused(grid):
    refuse(r"`grid` to be \(H, W\) with H \* W == 6, but got", grid=grid)


@pytest.mark.parametrize("grid", [(2, 3), (3, 2), (1, 6), [2, 3], torch.Size([2, 3]), (np.int64(2), np.int64(3))])
def test_grids_that_are_taken(grid):
    maps = make(grid=grid)
    assert maps.grid == tuple(int(size) for size in grid)
    assert all(type(size) is int for size in maps.grid)


@pytest.mark.parametrize(
    ("name", "shape", "dtype"),
    [("slot_valid", (2, 4), torch.bool), ("patch_valid", (2, 3, 6), torch.bool), ("frame_index", (2, 3), torch.int64)],
)
def test_companions(name, shape, dtype):
    good = torch.ones(shape, dtype=dtype)
    assert getattr(make(**{name: good}), name) is good
    refuse(f"`{name}` to be a (bool|integer) tensor of shape", **{name: good[:1]})
    refuse(f"`{name}` to be a (bool|integer) tensor of shape", **{name: good.float()})
    refuse(f"`{name}` to be a tensor .*got list", **{name: good.tolist()})
    refuse(f"`{name}` to be on cpu, but got meta", **{name: good.to("meta")})


def test_frozen_and_compared_by_identity():
    maps = make()
    with pytest.raises(dataclasses.FrozenInstanceError):
        maps.grid = (3, 2)
    assert maps == maps
    assert maps != make()
    assert len({maps, make()}) == 2


def test_detach():
    d, a = (logits(requires_grad=True) for _ in range(2))
    valid = torch.ones(2, 4, dtype=torch.bool)
    maps = SSyncMaps(attention_logits=d, mask_logits=a, grid=(2, 3), slot_valid=valid).detach()
    assert not maps.attention.requires_grad
    assert not maps.masks.requires_grad
    assert maps.slot_valid is valid
    assert d.requires_grad


def test_repr_holds_no_values():
    text = repr(make(attention_probs=logits()))
    assert text == (
        "SSyncMaps(B=2, T=3, S=4, grid=(2, 3), attention=logits+probs, masks=logits, dtype=torch.float32, device=cpu)"
    )


def test_pickle():
    maps = pickle.loads(pickle.dumps(make()))
    assert maps.shape == (2, 3, 4, 6)
    assert maps.grid == (2, 3)


class TestValues:
    def check(self, match=None, **changes):
        maps = make(**changes)
        if match is None:
            maps.check_values()
        else:
            with pytest.raises(ShapeError, match=match):
                maps.check_values()

    def test_good(self):
        self.check()
        self.check(attention_probs=logits().softmax(2), mask_probs=torch.randn(2, 3, 4, 6).softmax(2))
        self.check(attention_probs=torch.randn(2, 3, 4, 6).bfloat16().softmax(2))

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    @pytest.mark.parametrize("name", ["attention_logits", "mask_logits"])
    def test_not_finite(self, name, bad):
        value = logits()
        value[1, 2, 3, 4] = bad
        self.check(f"`{name}` to be finite", **{name: value})

    def test_minus_infinity_marks_a_slot_that_is_ruled_out(self):
        value = logits()
        value[:, :, 0] = -torch.inf
        self.check(mask_logits=value)

    def test_sums(self):
        probs = logits().softmax(2)
        probs[0, 0, 0, 0] += 0.5
        self.check(r"`mask_probs` to sum to 1 over slots.*from 1 to 1\.5", mask_probs=probs)
        self.check("from 0 to 0", attention_probs=logits())
        self.check("the slot axis, not over patches", attention_probs=torch.randn(2, 3, 4, 6).softmax(3))

    def test_negative(self):
        probs = logits().softmax(2)
        probs[0, 0, 0, 0] -= 1
        probs[0, 0, 1, 0] += 1
        self.check(r"probabilities in \[0, 1\], but got values down to -0\.75.*`mask_logits`", mask_probs=probs)

    def test_invalid_slots_and_patches_are_not_looked_at(self):
        slots = torch.tensor([[True, True, True, False]] * 2)
        patches = torch.ones(2, 3, 6, dtype=torch.bool)
        patches[0, 0, 0] = False
        value = torch.randn(2, 3, 4, 6)
        value[:, :, 3] = -torch.inf
        probs = value.softmax(2)
        value[:, :, 3] = torch.nan
        probs[:, :, 3] = torch.nan
        value[0, 0, :, 0] = torch.nan
        probs[0, 0, :, 0] = torch.nan
        self.check("finite", mask_logits=value, attention_probs=probs)
        self.check("finite", mask_logits=value, slot_valid=slots)
        self.check(mask_logits=value, attention_probs=probs, slot_valid=slots, patch_valid=patches)
