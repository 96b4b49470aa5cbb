"""`SSyncPictures`: sheets of what the host's slots hold, at each validation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from ssync_pl.adapters import HostAdapter
from ssync_pl.data.files import write_bytes
from ssync_pl.errors import ShapeError, require
from ssync_pl.method.loss import SSyncOutput, ssync_loss
from ssync_pl.method.maps import SSyncMaps
from ssync_pl.plugin.callback import SSyncCallback
from ssync_pl.plugin.config import SSyncConfig
from ssync_pl.plugin.session import HostSession
from ssync_pl.tools import viz
from ssync_pl.tools.owned import refuse_foreign
from ssync_pl.tools.predict.windows import match_slots

__all__ = ["SSyncPictures"]

_LABELS = {
    "raw_encoder_labels": "encoder",
    "raw_decoder_labels": "decoder",
    "encoder_labels": "encoder, merged",
    "decoder_labels": "decoder, merged",
}
# Patches in no region, at which the encoder teaches, at which the decoder teaches, and in both.
_REGION_COLORS = np.array([(35, 35, 35), (255, 140, 0), (30, 110, 220), (225, 60, 170)], dtype=np.uint8)
_REGIONS = "SSync regions\norange: boundary\nblue: interior\npink: both"


class SSyncPictures(L.Callback):
    """Draws frames, ground truth, slots' labels and SSync's regions of the first validation videos.

    Writes `<log_dir>/pictures/step-000123.png`, named by the optimizer step, on rank 0: at every n-th validation and at
    the last one of a training. Loggers that take images get the sheet as well. A slot has the colour of the true
    object that its mask covers best, so that an object keeps its colour in all rows, steps and runs.

    The maps come from the validation step itself: nothing is computed twice, no random number is drawn, training is
    the same to the bit. A host or batch that cannot be drawn gives one warning and no pictures, never an error.
    Merging and regions are drawn with the settings of the run's `SSyncCallback`, else with the published ones.

    Args:
        adapter: where the host's two maps are: an adapter or its name, or `"auto"`: that of the run's `SSyncCallback`
            if there is one, else the host is recognised.
        max_videos: videos per sheet, at least 1.
        max_frames: frames per video, evenly spaced, at least 1.
        every_n_validations: draw at every n-th validation, at least 1.

    Raises:
        ConfigError: a setting is out of range.
    """

    def __init__(
        self,
        adapter: str | HostAdapter = "auto",
        max_videos: int = 4,
        max_frames: int = 6,
        every_n_validations: int = 1,
    ) -> None:
        super().__init__()
        counts = {"max_videos": max_videos, "max_frames": max_frames, "every_n_validations": every_n_validations}
        for name, value in counts.items():
            require(value >= 1, f"argument `{name}` to be at least 1", value)
        self.adapter = adapter
        self.max_videos = max_videos
        self.max_frames = max_frames
        self.every_n_validations = every_n_validations
        self.last_path: Path | None = None
        self._validations = 0
        self._log_dir: str | None = None
        self._failed = False
        self._session: HostSession | None = None
        self._sheet: tuple[int, viz.Bytes] | None = None  # step and picture that are not written yet

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Hooks stay until the end, because a graph compiled without them would ignore them.
        self._attach(trainer, pl_module)

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._attach(trainer, pl_module)  # of a host that is only validated
        self._log_dir = trainer.log_dir  # collective, so asked on each rank

    @override
    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._session is not None and not trainer.sanity_checking and batch_idx == dataloader_idx == 0:
            self._session.open()

    @override
    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        session = self._session
        if session is None or not session.capture.is_open:
            return
        own = _ssync_callback(trainer)
        config = SSyncConfig() if own is None else own.config
        with self._sparing_the_run(), torch.no_grad():
            maps = session.collect(batch, config)
            output = ssync_loss(maps, **config.loss_options())
            rows = self._rows(getattr(trainer, "datamodule", None), batch, maps, output)
            self._sheet = (trainer.global_step, viz.draw_sheet(rows, title=f"step {trainer.global_step}"))
            if self._validations % self.every_n_validations == 0:
                self._write(trainer)
            session.close()
        self._validations += 1

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        with self._sparing_the_run():
            self._write(trainer)

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._remove()

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._remove()

    def _attach(self, trainer: L.Trainer, host: L.LightningModule) -> None:
        if self._session is not None or self._failed or not trainer.is_global_zero:
            return
        # Whoever told SSyncCallback about the host should not have to do it twice.
        own = _ssync_callback(trainer)
        theirs = (own.adapter, own.grid) if own is not None and self.adapter == "auto" else (self.adapter, None)
        with self._sparing_the_run():
            self._session = HostSession(host, *theirs)

    def _remove(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.remove()

    @contextmanager
    def _sparing_the_run(self) -> Iterator[None]:
        """Gives pictures up for good where they fail, with a warning."""
        try:
            yield
        except Exception as error:
            self._remove()
            self._failed, self._sheet = True, None
            rank_zero_warn(f"SSyncPictures draws no picture: {type(error).__name__}: {error}")

    def _rows(self, data: Any, batch: Any, maps: SSyncMaps, output: SSyncOutput) -> list[viz.SheetRow]:
        """Rows of the first real videos; `data` tells the normalisation and whether channel 0 is the background."""
        entries: Mapping[str, Any] = batch if isinstance(batch, Mapping) else {}
        video, truth = _find_video(batch), entries.get("segmentations")
        if not isinstance(truth, Tensor) or truth.ndim != 5 or truth.shape[:2] != video.shape[:2]:
            truth = None
        real, keys = entries.get("batch_padding_mask"), entries.get("__key__")
        chosen = [i for i in range(len(video)) if real is None or bool(real[i])][: self.max_videos]
        if not chosen:
            raise ShapeError("Expected a real video in the first validation batch, but all of them are padding.")
        background = 0 if truth is not None and getattr(data, "has_background", True) else None
        labels = {field: _by_clip(getattr(output, field), video) for field in (*_LABELS, "boundary", "interior")}
        drawn: list[tuple[str, viz.Bytes]] = []
        for i in chosen:
            places, times = _frame_places(i, video, maps, labels, entries.get("frame_mask"), self.max_frames)
            shown = {field: value[i][places].cpu().numpy() for field, value in labels.items()}
            pixels = video[i][times].float().cpu().numpy()
            frames = viz.to_uint8(pixels, getattr(data, "mean", None), getattr(data, "std", None))
            name = str(keys[i])[:24] if isinstance(keys, (list, tuple)) else str(i)
            drawn.append((f"video {name}\nframes {', '.join(map(str, times))}", frames))
            colors = np.arange(maps.shape[2])
            if truth is not None:
                objects = viz.label_masks(truth[i][times].cpu().numpy())
                drawn.append(("ground truth", viz.color_labels(objects, background=background)))
                colors = _object_colors(objects, shown["raw_decoder_labels"], maps.shape[2])
            for field, title in _LABELS.items():
                if output.slot_iou is not None or field.startswith("raw"):
                    caption = f"{title}\n{len(labels[field][i].unique())} slots"
                    drawn.append((caption, viz.color_labels(colors[shown[field]], background=background)))
            drawn.append((_REGIONS, _REGION_COLORS[shown["boundary"] + 2 * shown["interior"].astype(int)]))
        width = max(len(frames) for _, frames in drawn)
        rows = []
        for caption, frames in drawn:
            row = np.full((width, *video.shape[-2:], 3), 255, dtype=np.uint8)  # white where a video is shorter
            row[: len(frames)] = viz.resize_nearest(frames, row.shape[1:3])
            rows.append(viz.SheetRow(caption, row))
        return rows

    def _write(self, trainer: L.Trainer) -> None:
        if self._sheet is None:
            return
        (step, sheet), self._sheet = self._sheet, None
        if self._log_dir is not None:
            path = Path(self._log_dir) / "pictures" / f"step-{step:06d}.png"
            refuse_foreign(path)
            self.last_path = write_bytes(path, viz.encode_png(sheet))
        for logger in trainer.loggers:
            add_image = getattr(getattr(logger, "experiment", None), "add_image", None)
            log_image = getattr(logger, "log_image", None)
            if callable(log_image):
                log_image(key="pictures/slots", images=[sheet], step=step)
            elif callable(add_image):
                add_image("pictures/slots", sheet, step, dataformats="HWC")


def _ssync_callback(trainer: L.Trainer) -> SSyncCallback | None:
    return next((c for c in trainer.callbacks if isinstance(c, SSyncCallback)), None)  # type: ignore[attr-defined]


def _object_colors(objects: np.ndarray, slots: np.ndarray, num_slots: int) -> np.ndarray:
    """Number of the colour of each slot: that of the object that it covers, a number without object for the others."""
    objects = viz.resize_nearest(objects, slots.shape[-2:], channels_last=False)
    seen = objects >= 0
    return match_slots(objects[seen], slots[seen], max(num_slots, int(objects.max()) + 1))[:num_slots]


def _by_clip(labels: Tensor, video: Tensor) -> Tensor:
    """Labels `(B, T, H, W)` of a host that sees each frame as a clip of its own; those of other hosts stay."""
    alone = labels.shape[:2] == (video.shape[0] * video.shape[1], 1)
    return labels.flatten(0, 1).unflatten(0, video.shape[:2]) if alone else labels


def _frame_places(
    index: int, video: Tensor, maps: SSyncMaps, labels: Mapping[str, Tensor], frame_mask: Tensor | None, count: int
) -> tuple[list[int], list[int]]:
    """Places of `count` frames of a video in the maps and in the video: hosts may look at a part of the clip only."""
    length, seen = video.shape[1], labels["boundary"].shape[1]
    if maps.frame_index is not None and int(maps.frame_index.max()) < length:
        times = maps.frame_index[index].tolist()
    elif seen in (1, length):
        times = [length // 2] if seen == 1 else list(range(length))
    else:
        raise ShapeError(f"Expected maps of {length} frames as in the video, but got {seen}.")
    real = [place for place, t in enumerate(times) if frame_mask is None or bool(frame_mask[index, t])]
    picked = np.linspace(0, len(real) - 1, min(len(real), count)).round().astype(int)
    places = [real[k] for k in picked]
    return places, [times[place] for place in places]


def _find_video(batch: Any) -> Tensor:
    """The frames `(B, T, 3, H, W)` of a batch; images count as videos of one frame."""
    values = [batch.get("video"), *batch.values()] if isinstance(batch, Mapping) else batch
    for value in values if isinstance(values, (list, tuple)) else [values]:
        if isinstance(value, Tensor) and value.ndim in (4, 5) and value.shape[-3] == 3:
            return value if value.ndim == 5 else value.unsqueeze(1)
    raise ShapeError(f"Expected frames (B, T, 3, H, W) in a validation batch, but got {type(batch).__name__}.")
