"""Random cases of the method (hypothesis strategies) and the comparison with the loop reference."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from ssync_naive import naive_ssync

from ssync_pl.method import ssync_loss
from ssync_pl.method.maps import SSyncMaps

EXACT = ("boundary", "interior", "winners", "merged_slots", "boundary_count", "interior_count")
EXACT += ("used_encoder_slots", "used_decoder_slots")
CLOSE = ("boundary_fraction", "interior_fraction", "overlap_fraction", "agreement")
LOSSES = ("loss", "boundary_loss", "interior_loss")
LABELS = ("encoder_labels", "decoder_labels", "raw_encoder_labels", "raw_decoder_labels")


@dataclass
class Case:
    attention_logits: np.ndarray | None
    mask_logits: np.ndarray | None
    grid: tuple[int, int]
    attention_probs: np.ndarray | None = None
    mask_probs: np.ndarray | None = None
    slot_valid: np.ndarray | None = None
    patch_valid: np.ndarray | None = None
    frame_index: np.ndarray | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def arrays(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "options" and value is not None}

    def reference(self):
        return naive_ssync(**self.arrays(), **self.options)

    def maps(self, dtype: torch.dtype = torch.float64) -> SSyncMaps:
        given = {name: x if name == "grid" else torch.tensor(x) for name, x in self.arrays().items()}
        for name in given:
            if name.endswith(("logits", "probs")):
                given[name] = given[name].to(dtype).requires_grad_()
        return SSyncMaps(**given)

    def check(self, dtype: torch.dtype = torch.float64, rtol: float = 1e-9):
        reference, maps = self.reference(), self.maps(dtype)
        output = ssync_loss(maps, **self.options)
        patches = slice(None) if self.patch_valid is None else self.patch_valid.reshape(reference.boundary.shape)
        for name in (*LABELS, *EXACT):
            got, where = getattr(output, name).numpy(), patches if name in LABELS else ...
            assert name not in LABELS or (got.dtype, got.shape) == (np.int64, reference.boundary.shape)
            np.testing.assert_array_equal(got[where], getattr(reference, name)[where], err_msg=name)
        assert (output.slot_iou is None) == (reference.slot_iou is None)
        tolerances = {**dict.fromkeys(CLOSE, (0, 1e-6)), **dict.fromkeys(LOSSES, (rtol, rtol * 1e-2))}
        if reference.slot_iou is not None:
            tolerances["slot_iou"] = (0, 2e-6)
        for name, (relative, absolute) in tolerances.items():
            got, wanted = getattr(output, name).detach().numpy(), getattr(reference, name)
            assert got.shape == np.shape(wanted)
            np.testing.assert_allclose(got, wanted, rtol=relative, atol=absolute, err_msg=name)
        output.loss.backward()
        weights = (self.options.get("interior_weight", 1.0), self.options.get("boundary_weight", 1.0))
        sides = (
            ("encoder", maps.attention_logits, maps.attention_probs, reference.grad_encoder * weights[0]),
            ("decoder", maps.mask_logits, maps.mask_probs, reference.grad_decoder * weights[1]),
        )
        for name, logits, probs, expected in sides:
            leaf = probs if probs is not None else logits
            assert leaf.grad is not None, f"no gradient reaches the {name} side"
            got = leaf.grad.numpy()
            if probs is not None and self.options.get("loss") == "ce":
                # -log p and -log(p / sum p) differ by a constant over slots, which no host's softmax lets through.
                got, expected = (through_softmax(probs.detach().numpy(), g) for g in (got, expected))
            # A sharp softmax that is right leaves a gradient of almost zero, and the rounding of 1 - p in it.
            close_to_largest(got, expected, rtol * 10, name, floor=8 * torch.finfo(dtype).eps)
            if probs is not None and logits is not None:
                assert logits.grad is None or not logits.grad.any(), "the loss must use the probabilities"
        return output


def through_softmax(probs: np.ndarray, grad: np.ndarray) -> np.ndarray:
    return probs * (grad - (probs * grad).sum(axis=2, keepdims=True))


def close_to_largest(got: np.ndarray, expected: np.ndarray, tolerance: float, name: str, floor: float = 0.0) -> None:
    """|got - expected| <= tolerance * the largest expected entry, everywhere; zero must be zero."""
    scale = np.abs(expected).max()
    error = np.abs(got.astype(np.float64) - expected).max()
    assert error <= tolerance * scale + floor, f"{name}: error {error:.3e}, largest {scale:.3e}"


def logits_of_kind(rng: np.random.Generator, kind: str, b: int, t: int, s: int, grid: tuple[int, int]) -> np.ndarray:
    """Multiples of 1/64, so that sums, and with them the coverage, are exact in float32."""
    h, w = grid
    if kind == "integers":
        return rng.integers(-2, 3, (b, t, s, h * w)).astype(np.float64)
    noise = rng.normal(size=(b, t, s, h * w))
    if kind == "normal":
        scores = 2 * noise
    else:
        centre = rng.uniform(-0.5, 1, (b, 1, s, 2, 1)) * np.array([[h], [w]]) + rng.normal(size=(b, t, s, 2, 1)) * 0.3
        place = np.stack(np.meshgrid(np.arange(h), np.arange(w), indexing="ij")).reshape(2, h * w)
        scores = 4 - np.abs(place - centre).sum(axis=3) + 0.1 * noise
        if kind == "copies" and s > 1:
            source = rng.integers(0, s, s)
            scores = scores[:, :, source] + 0.25 * noise
    return np.round(scores * 64) / 64


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=2, keepdims=True))
    return e / e.sum(axis=2, keepdims=True)


def off_threshold(iou: np.ndarray, threshold: float) -> float:
    """The threshold, moved away from every overlap, where the last bit would decide."""
    while np.abs(iou - threshold).min() < 1e-4 and threshold > 0:
        threshold = min(threshold + 2.3e-4, 1.0) if threshold < 0.999 else threshold - 3e-3
    return threshold


OPTIONS: dict[str, list[Any]] = {
    "n_bd": [1, 1, 2, 3, 5, 9],
    "n_nbd": [1, 1, 2, 4, 8, 10],
    "n_noise": [1, 1, 2, 4, 7],
    "temperature": [1.0, 1.0, 0.5, 2.0],
    "loss": ["brier", "brier", "ce"],
    "merge": [None, True, False],
    "boundary_weight": [1.0, 0.5],
    "interior_weight": [1.0, 2.0],
    "merge_threshold": [0.0, 0.2, 0.4, 0.6, 0.65, 0.7, 0.9],
}


@st.composite
def cases(draw: st.DrawFn, most_slots: int = 24) -> Case:
    """Small clips of every kind: ties, copies of slots, one row, one patch, padding, gaps, all thresholds."""
    b, t = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    grid = (draw(st.integers(1, 5)), draw(st.integers(1, 5)))
    s = draw(st.one_of(st.integers(1, 5), st.integers(1, most_slots)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kinds = st.sampled_from(["integers", "normal", "blobs", "copies"])
    case = Case(*(logits_of_kind(rng, draw(kinds), b, t, s, grid) for _ in range(2)), grid)
    if draw(st.booleans()):
        case.slot_valid = rng.random((b, s)) < 0.7
        case.slot_valid[np.arange(b), rng.integers(0, s, b)] = True
    if draw(st.booleans()):
        case.patch_valid = rng.random((b, t, grid[0] * grid[1])) < 0.8
        case.patch_valid[:, 0, 0] = True
    if draw(st.booleans()):
        case.frame_index = np.cumsum(rng.choice([-1, 0, 1, 1, 2], (b, t)), axis=1) + rng.integers(0, 9, (b, 1))
    case.options = {name: draw(st.sampled_from(values)) for name, values in OPTIONS.items()}
    if case.options["merge"] is not False:
        iou = case.reference().slot_iou
        case.options["merge_threshold"] = off_threshold(iou, case.options["merge_threshold"])
    return case


def tensors(seed=0, shape=(2, 3, 4, 12), dtype=torch.float32, grad=True):
    generator = torch.Generator().manual_seed(seed)
    pair = [(torch.randn(shape, generator=generator) * 128).round() / 64 for _ in range(2)]
    return [x.to(dtype).requires_grad_(grad) for x in pair]


def run(d, a, grid=(3, 4), *, slot_valid=None, patch_valid=None, **options):
    return ssync_loss(SSyncMaps(d, a, grid=grid, slot_valid=slot_valid, patch_valid=patch_valid), **options)
