"""`SSyncPictures`: sheets of what the host's slots hold, at each validation."""

from collections.abc import Iterator, Mapping, Sequence
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
from ssync_pl.data.files import refuse_foreign, write_bytes
from ssync_pl.errors import require, require_shape
from ssync_pl.hosts.evaluation import frame_validity
from ssync_pl.method.loss import SSyncOutput, ssync_loss
from ssync_pl.method.maps import SSyncMaps
from ssync_pl.plugin.callback import SSyncCallback
from ssync_pl.plugin.config import SSyncConfig
from ssync_pl.plugin.session import HostSession
from ssync_pl.tools import viz
from ssync_pl.tools.predict.windows import match_slots

_LABELS = {"raw_encoder_labels": "encoder", "raw_decoder_labels": "decoder"}
_LABELS |= {"encoder_labels": "encoder, merged", "decoder_labels": "decoder, merged"}
# Patches in no region, at which the encoder teaches, at which the decoder teaches, and in both.
_REGION_COLORS = np.array([(35, 35, 35), (255, 140, 0), (30, 110, 220), (225, 60, 170)], dtype=np.uint8)
_REGIONS = "SSync regions\norange: boundary\nblue: interior\npink: both"


class SSyncPictures(L.Callback):
    """Draws frames, ground truth, slots' labels and SSync's regions of the first validation videos.

    Writes `<log_dir>/pictures/step-000123.png`, named by the optimizer step, on rank 0 at each validation; loggers that
    take images get it, too. A slot has the colour of the true object that it covers best, in all rows, steps and runs.
    Merging and regions are those of the run's `SSyncCallback`, else the published ones. The maps come from the
    validation step itself, and training is the same to the bit. What cannot be drawn gives one warning, never an error.

    Args:
        adapter: an adapter or its name; `"auto"`: that of the run's `SSyncCallback`, else the host is recognised.
        max_videos: videos per sheet, at least 1.
        max_frames: frames per video, evenly spaced, at least 1.

    Raises:
        ConfigError: a setting is out of range.
    """

    def __init__(self, adapter: str | HostAdapter = "auto", max_videos: int = 4, max_frames: int = 6) -> None:
        super().__init__()
        for name, value in (("max_videos", max_videos), ("max_frames", max_frames)):
            require(value >= 1, f"argument `{name}` to be at least 1", value)
        self.adapter, self.max_videos, self.max_frames = adapter, max_videos, max_frames
        self.last_path: Path | None = None
        self._log_dir: str | None = None
        self._config = SSyncConfig()
        self._failed = False
        self._session: HostSession | None = None

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Hooks stay until the end, because a graph compiled without them would ignore them.
        self._attach(trainer, pl_module)

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._attach(trainer, pl_module)  # to a host that is only validated
        self._log_dir = trainer.log_dir  # collective, so asked on each rank

    @override
    def on_validation_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *step: Any) -> None:
        _, *indices = step
        if self._session is not None and not trainer.sanity_checking and not any(indices):
            self._session.open()

    @override
    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *step: Any) -> None:
        if self._session is None or not self._session.capture.is_open:
            return
        _, batch, *_ = step
        with self._sparing_the_run(), torch.no_grad():
            maps = self._session.collect(batch, self._config)
            output = ssync_loss(maps, **self._config.loss_options())
            data = getattr(trainer, "datamodule", None)
            rows = _sheet_rows(batch, maps, output, data, self.max_videos, self.max_frames)
            self._write(trainer, viz.draw_sheet(rows, f"step {trainer.global_step}"))
            self._session.close()

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._remove()

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._remove()

    def _attach(self, trainer: L.Trainer, host: L.LightningModule) -> None:
        if self._session is not None or self._failed or not trainer.is_global_zero:
            return
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        own = next((callback for callback in callbacks if isinstance(callback, SSyncCallback)), None)
        self._config = SSyncConfig() if own is None else own.config
        # Whoever told SSyncCallback about the host should not have to do it twice.
        told = (self.adapter, None) if own is None or self.adapter != "auto" else (own.adapter, own.grid)
        with self._sparing_the_run():
            self._session = HostSession(host, *told)

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
            self._failed = True
            rank_zero_warn(f"SSyncPictures draws no picture: {type(error).__name__}: {error}")

    def _write(self, trainer: L.Trainer, sheet: viz.Bytes) -> None:
        step = trainer.global_step
        if self._log_dir is not None:
            path = Path(self._log_dir) / "pictures" / f"step-{step:06d}.png"
            refuse_foreign(path, viz.SHEET)
            self.last_path = write_bytes(path, viz.encode_png(sheet, viz.SHEET))
        for logger in trainer.loggers:
            add_image = getattr(getattr(logger, "experiment", None), "add_image", None)
            log_image = getattr(logger, "log_image", None)
            if callable(log_image):
                log_image(key="pictures/slots", images=[sheet], step=step)
            elif callable(add_image):
                add_image("pictures/slots", sheet, step, dataformats="HWC")


def _sheet_rows(
    batch: Any, maps: SSyncMaps, output: SSyncOutput, data: Any, max_videos: int, max_frames: int
) -> list[tuple[str, viz.Bytes]]:
    """Rows of the first real videos; `data` tells the normalisation and whether channel 0 is the background."""
    video: Any = batch.get("video") if isinstance(batch, Mapping) else None
    fits = isinstance(video, Tensor) and video.ndim == 5 and video.shape[2] == 3
    require_shape(fits, "batch key `video` to be (B, T, 3, H, W)", () if video is None else video)
    truth, keys = batch.get("segmentations"), batch.get("__key__")
    if not isinstance(truth, Tensor) or truth.ndim != 5 or truth.shape[:2] != video.shape[:2]:
        truth = None
    valid = frame_validity(batch).cpu()
    chosen = valid.any(1).nonzero().flatten().tolist()[:max_videos]
    require_shape(bool(chosen), "a real video in the first validation batch", valid)
    background = 0 if truth is not None and getattr(data, "has_background", True) else None
    labels = {field: getattr(output, field) for field in (*_LABELS, "boundary", "interior")}
    if labels["boundary"].shape[:2] == (valid.numel(), 1):  # the host sees each frame as a clip of its own
        labels = {field: value.flatten(0, 1).unflatten(0, video.shape[:2]) for field, value in labels.items()}
    rows: list[tuple[str, viz.Bytes]] = []
    for i in chosen:
        times = _times(i, video.shape[1], maps, labels["boundary"].shape[1])
        real = [place for place, time in enumerate(times) if valid[i, time]]
        places = [real[k] for k in np.linspace(0, len(real) - 1, min(len(real), max_frames)).round().astype(int)]
        times = [times[place] for place in places]
        shown = {field: value[i][places].cpu().numpy() for field, value in labels.items()}
        pixels = video[i][times].float().cpu().numpy()
        frames = viz.to_uint8(pixels, getattr(data, "mean", None), getattr(data, "std", None))
        name = str(keys[i])[:24] if isinstance(keys, (list, tuple)) else str(i)
        rows.append((f"video {name}\nframes {', '.join(map(str, times))}", frames))
        colors = np.arange(maps.shape[2])
        if truth is not None:
            objects = viz.label_masks(truth[i][times].cpu().numpy())
            rows.append(("ground truth", viz.color_labels(objects, background=background)))
            # A slot has the number of the object that it covers, else one that no object has.
            small, slots = viz.resize_nearest(objects, labels["boundary"].shape[-2:]), shown["raw_decoder_labels"]
            count = max(maps.shape[2], int(objects.max()) + 1)
            colors = match_slots(small[small >= 0], slots[small >= 0], count)[: maps.shape[2]]
        for field, title in _LABELS.items():
            if output.slot_iou is not None or field.startswith("raw"):
                caption = f"{title}\n{len(labels[field][i].unique())} slots"
                rows.append((caption, viz.color_labels(colors[shown[field]], background=background)))
        rows.append((_REGIONS, _REGION_COLORS[shown["boundary"] + 2 * shown["interior"].astype(int)]))
    return rows


def _times(index: int, length: int, maps: SSyncMaps, seen: int) -> Sequence[int]:
    """Frames of a video of `length` frames that the `seen` frames of the maps show: hosts may look at a part only."""
    if maps.frame_index is not None and int(maps.frame_index.max()) < length:
        return [int(time) for time in maps.frame_index[index]]
    require_shape(seen in (1, length), f"maps of {length} frames as in the video", (seen,))
    return range(length) if seen == length else [length // 2]
