"""One pass of a trained host over its validation set: every score, the probe's samples and the pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any, NamedTuple

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from ssync_pl.adapters import HostAdapter, locate
from ssync_pl.adapters.capture import Capture
from ssync_pl.compare.pictures import PictureBox
from ssync_pl.compare.videos import ShapeTable
from ssync_pl.errors import ConfigError
from ssync_pl.hosts.evaluation import frame_validity, resize_masks
from ssync_pl.hosts.training import SlotHost
from ssync_pl.method.loss import ssync_loss
from ssync_pl.metrics import SegmentationMetrics, metric_names
from ssync_pl.plugin.callback import SSyncCallback
from ssync_pl.tools.probe import ProbeSamples, sample_slots

__all__ = ["FinalPass", "Scores", "final_pass"]

# The probe keeps every matched slot in memory; more videos than these do not make it surer.
_PROBE_VIDEOS = 512


class Scores(SegmentationMetrics):
    """All scores of one map that the table of metrics has: segmentation, borders, and what becomes of slots."""

    def __init__(self, has_background: bool = True, ignore_overlaps: bool = False) -> None:
        names = (*metric_names("segmentation"), *metric_names("slots"))
        super().__init__("", has_background, ignore_overlaps, scores=names)

    def compute(self) -> dict[str, float]:  # type: ignore[override]
        """Returns the scores over all batches and processes by name; NaN where nothing counts."""
        return {name: float(value) for name, value in super().compute().items()}


class FinalPass(NamedTuple):
    """What one pass found: scores by name, names of this process's videos, and the probe's samples of each batch."""

    scores: dict[str, float]
    keys: list[str]
    samples: list[ProbeSamples]


def final_pass(
    trainer: L.Trainer, host: SlotHost, loader: Any, limit: int | None, pictures: PictureBox, probe: bool
) -> FinalPass:
    """Scores a host on the device of its training; modes, hooks, metrics and random states stay as they were.

    Reads `limit` batches at most, fills `pictures` with the first videos, and keeps slots where `probe` is True.
    """
    data = getattr(trainer, "datamodule", None)
    found = FinalPass({}, [], [])
    evaluation = host.evaluation
    device = trainer.strategy.root_device
    with ExitStack() as stack:
        stack.enter_context(isolate_rng())
        stack.enter_context(torch.no_grad())
        stack.enter_context(_evaluating(host, device))
        torch.manual_seed(0)  # hosts may draw their first slots: the same ones whatever the training drew before
        scores, encoder = (Scores(evaluation.has_background, evaluation.ignore_overlaps).to(device) for _ in range(2))
        said = stack.enter_context(_listening(host))
        shapes = ShapeTable(loader)
        maps = _HostMaps(trainer, host, pictures)
        stack.callback(maps.remove)
        seen = heard = 0
        for raw in islice(loader, limit):
            moved = (data or host).on_before_batch_transfer(trainer.precision_plugin.convert_input(raw), 0)
            batch = trainer.strategy.batch_to_device(moved, dataloader_idx=0)
            if not isinstance(batch, Mapping) or not isinstance(batch.get("segmentations"), Tensor):
                got = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
                raise ConfigError(f"Expected key `segmentations` in validation batches, but got {got}.")
            true, valid = batch["segmentations"], frame_validity(batch)
            said.clear()
            maps.open()
            with trainer.precision_plugin.val_step_context():
                masks, _ = host.evaluate(batch)
            keys = _keys(batch, len(masks), seen)
            attention = maps.read(batch, keys, masks, valid)
            scores.update(masks, true, valid)
            if attention is not None:
                encoder.update(attention, true, valid)
                heard += len(masks)
            if probe and seen < _PROBE_VIDEOS:
                sample = _sample(said, masks, batch, valid, seen, shapes, keys, evaluation)
                found.samples.extend([] if sample is None else [sample])
            found.keys.extend(key for key, real in zip(keys, valid.any(dim=1).tolist(), strict=True) if real)
            seen += len(masks)
        if seen:  # on each process: computing waits for the others
            found.scores.update(scores.compute())
            # Of all videos or of none: half a score would be another score. Processes have to agree.
            if trainer.strategy.reduce_boolean_decision(heard == seen, all=True):
                found.scores.update({f"encoder_{name}": value for name, value in encoder.compute().items()})
    return found


@contextmanager
def _evaluating(host: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode on the device of the training; Lightning has moved the host away from it by then."""
    modes = [(module, module.training) for module in host.modules()]
    home = next((parameter.device for parameter in host.parameters()), device)
    host.to(device).eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        host.to(home)


@contextmanager
def _listening(host: nn.Module) -> Iterator[list[Any]]:
    """What the host's `forward` returns."""
    said: list[Any] = []
    handle = host.register_forward_hook(lambda module, args, output: said.append(output))
    try:
        yield said
    finally:
        handle.remove()


class _HostMaps:
    """Reads the host's maps and draws the first batches; whatever goes wrong ends that and not the evaluation."""

    def __init__(self, trainer: L.Trainer, host: nn.Module, box: PictureBox) -> None:
        self.box = box
        self.adapter: HostAdapter | None = None
        self.capture: Capture | None = None
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        named = next((one for one in callbacks if isinstance(one, SSyncCallback)), None)
        try:
            located = locate("auto", host) if named is None else locate(named.adapter, host, named.grid)
            self.adapter, self.capture = located.adapter, located.adapter.attach(located.root)
        except Exception as error:
            self._give_up(error)

    def open(self) -> None:
        if self.capture is not None:
            self.capture.clear()
            self.capture.open()

    def read(self, batch: Mapping[str, Any], keys: list[str], masks: Tensor, valid: Tensor) -> Tensor | None:
        """Draws; and returns the attention `(B, T, S, h, w)` where it is one map per frame, as the masks are."""
        if self.capture is None or self.adapter is None:
            return None
        try:
            self.capture.close()
            maps = self.adapter.collect(self.capture, batch=batch)
            if not self.box.full:
                self.box.add(batch, keys, masks, valid, ssync_loss(maps))
            if maps.grid is None or maps.shape[:3] != masks.shape[:3] or maps.patch_valid is not None:
                return None
            seen = _probabilities(maps.mask_logits, maps.mask_probs).unflatten(-1, maps.grid)
            given = nn.functional.adaptive_avg_pool2d(masks.float().flatten(0, 1), maps.grid).view_as(seen)
            if not torch.allclose(seen, given, atol=1e-3):
                return None  # a host that orders its slots anew afterwards: its attention is in the old order
            return _probabilities(maps.attention_logits, maps.attention_probs).unflatten(-1, maps.grid)
        except Exception as error:
            self._give_up(error)
        return None

    def remove(self) -> None:
        capture, self.capture = self.capture, None
        if capture is not None:
            capture.remove()

    def _give_up(self, error: Exception) -> None:
        self.remove()
        rank_zero_warn(f"RunRecorder keeps no more pictures: {type(error).__name__}: {error}")


def _probabilities(logits: Tensor | None, probs: Tensor | None) -> Tensor:
    if probs is not None:
        return probs.float()
    assert logits is not None  # SSyncMaps has one or the other
    return logits.float().softmax(dim=2)


def _keys(batch: Mapping[str, Any], count: int, first: int) -> list[str]:
    keys = batch.get("__key__")
    if isinstance(keys, (list, tuple)) and len(keys) == count:
        return [str(key) for key in keys]
    return [str(first + index) for index in range(count)]


def _sample(
    said: list[Any],
    masks: Tensor,
    batch: Mapping[str, Any],
    valid: Tensor,
    first: int,
    shapes: ShapeTable,
    keys: list[str],
    evaluation: Any,
) -> ProbeSamples | None:
    """Slots of each frame with their objects; None where the host does not give one slot per mask and frame."""
    slots = getattr(said[0], "slots", None) if len(said) == 1 else None
    if not isinstance(slots, Tensor) or slots.ndim != 4 or slots.shape[:3] != masks.shape[:3]:
        return None
    # A host that links its slots over time afterwards (SOLV) says itself which mask is which slot's.
    own = getattr(said[0], "masks", None)
    own = own.unflatten(-1, masks.shape[-2:]) if isinstance(own, Tensor) else masks
    true, video = batch["segmentations"], batch.get("video")
    size = (int(true.shape[-2]), int(true.shape[-1]))
    fits = isinstance(video, Tensor) and video.shape[-2:] == true.shape[-2:]
    return sample_slots(
        slots,
        own.float() if own.shape[-2:] == size else resize_masks(own.float(), size).max(dim=2).indices,
        true,
        valid,
        # Normalised as they are: an affine change of colours changes no R².
        frames=video if fits else None,
        shapes=shapes.classes(keys, true.shape[2], evaluation.has_background),
        first_video=first,
        has_background=evaluation.has_background,
        ignore_overlaps=evaluation.ignore_overlaps,
    )
