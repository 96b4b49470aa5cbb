"""`SSyncPictures`: sheets and videos of what the host's slots hold, at each validation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from ssync_pl.adapters import HostAdapter, locate
from ssync_pl.adapters.capture import Capture
from ssync_pl.data.files import write_bytes
from ssync_pl.data.video import encode_mp4, mp4_available
from ssync_pl.errors import ConfigError, ShapeError
from ssync_pl.method.loss import SSyncOutput, ssync_loss
from ssync_pl.method.maps import SSyncMaps
from ssync_pl.plugin.callback import SSyncCallback
from ssync_pl.plugin.config import SSyncConfig
from ssync_pl.tools.owned import refuse_foreign_png
from ssync_pl.tools.viz import (
    REGION_COLORS,
    Bytes,
    SheetRow,
    color_labels,
    color_regions,
    compose_frames,
    draw_sheet,
    encode_png,
    label_masks,
    overlay_labels,
    resize_nearest,
    to_uint8,
)

__all__ = ["SSyncPictures"]

# Settings of the method that change a picture.
_SETTINGS = ("merge_threshold", "n_bd", "n_nbd", "n_noise", "merge")
_MAPS = ("raw_encoder_labels", "raw_decoder_labels", "encoder_labels", "decoder_labels", "boundary", "interior")
_REGIONS = "SSync regions"


class SSyncPictures(L.Callback):
    """Draws frames, truth, slots' labels and SSync's regions of the first validation videos.

    Writes `<log_dir>/pictures/step-000123.png` and `.mp4` on rank 0 and hands the sheet to loggers that take images.
    The maps come from the validation step itself: nothing is computed twice, no random number is drawn, training is
    the same to the bit. A host or batch that cannot be drawn gives one warning and no pictures, never an error.
    Merging and regions are drawn with the settings of the run's `SSyncCallback`, else with the published ones.

    Args:
        adapter: where the host's two maps are: an adapter or its name, or `"auto"`: that of the run's `SSyncCallback`
            if there is one, else the host is recognised.
        max_videos: videos per sheet, at least 1.
        max_frames: frames per video on the sheet, evenly spaced, at least 1. The MP4 shows all frames.
        every_n_validations: draw at every n-th validation, at least 1.
        video: write the MP4 as well. Needs PyAV; without it a line of the log says so.
        grid: `(H, W)` patches, as for `SSyncCallback`. None: that of the run's `SSyncCallback` if there is one.
        video_key: key of the frames `(B, T, 3, H, W)` in the batch.
        segmentations_key: key of the true masks `(B, T, C, H, W)` in the batch; without them their row is left out.

    Raises:
        ConfigError: a setting is out of range.
    """

    def __init__(
        self,
        adapter: str | HostAdapter = "auto",
        max_videos: int = 4,
        max_frames: int = 6,
        every_n_validations: int = 1,
        video: bool = True,
        grid: tuple[int, int] | None = None,
        video_key: str = "video",
        segmentations_key: str = "segmentations",
    ) -> None:
        super().__init__()
        counts = {"max_videos": max_videos, "max_frames": max_frames, "every_n_validations": every_n_validations}
        for name, value in counts.items():
            if value < 1:
                raise ConfigError(f"Expected argument `{name}` to be at least 1, but got {value}.")
        self.adapter = adapter
        self.max_videos = max_videos
        self.max_frames = max_frames
        self.every_n_validations = every_n_validations
        self.video = video
        self.grid = grid
        self.video_key = video_key
        self.segmentations_key = segmentations_key
        self.last_path: Path | None = None
        self._validations = 0
        self._due = False
        self._log_dir: str | None = None
        self._failed = False
        self._told = False
        self._adapter: HostAdapter | None = None
        self._capture: Capture | None = None

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Hooks stay until the end, because a graph compiled without them would ignore them.
        self._attach(trainer, pl_module)

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._attach(trainer, pl_module)  # of a host that is only validated

    @override
    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._due = not trainer.sanity_checking and self._validations % self.every_n_validations == 0
        self._validations += not trainer.sanity_checking
        if self._due:
            self._log_dir = trainer.log_dir  # collective, so asked on each rank

    @override
    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._due and self._capture is not None and batch_idx == 0 and dataloader_idx == 0:
            self._capture.open()

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
        if self._capture is None or self._adapter is None or not self._capture.is_open:
            return
        named = _ssync_callback(trainer)
        config = SSyncConfig() if named is None else named.config
        try:
            with torch.no_grad():
                self._capture.close()
                maps = self._adapter.collect(self._capture, batch=batch)
                output = ssync_loss(maps, **{name: getattr(config, name) for name in _SETTINGS})
            self._write(trainer, self._drawings(trainer, batch, maps, output))
        except Exception as error:  # a picture is never worth a run
            self._give_up(error)
        else:
            self._capture.clear()

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._remove()

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._remove()

    def _attach(self, trainer: L.Trainer, host: L.LightningModule) -> None:
        if self._capture is not None or self._failed or not trainer.is_global_zero:
            return
        # Whoever told SSyncCallback about the host should not have to do it twice.
        named = _ssync_callback(trainer)
        adapter, grid = self.adapter, self.grid
        if named is not None and adapter == "auto":
            adapter, grid = named.adapter, grid or named.grid
        try:
            found = locate(adapter, host, grid)
            self._adapter, self._capture = found.adapter, found.adapter.attach(found.root)
        except Exception as error:  # a picture is never worth a run
            self._give_up(error)

    def _remove(self) -> None:
        capture, self._capture, self._adapter = self._capture, None, None
        if capture is not None:
            capture.remove()

    def _give_up(self, error: Exception) -> None:
        self._remove()
        if not self._failed:
            self._failed = True
            rank_zero_warn(f"SSyncPictures draws no picture: {type(error).__name__}: {error}")

    def _drawings(self, trainer: L.Trainer, batch: Any, maps: SSyncMaps, output: SSyncOutput) -> list[_Drawing]:
        entries: Mapping[str, Any] = batch if isinstance(batch, Mapping) else {}
        video, truth = _find_video(batch, self.video_key), entries.get(self.segmentations_key)
        if not isinstance(truth, Tensor) or truth.ndim != 5 or truth.shape[:2] != video.shape[:2]:
            truth = None
        real, names = entries.get("batch_padding_mask"), entries.get("__key__")
        count = min(video.shape[0], output.encoder_labels.shape[0])
        chosen = [i for i in range(count) if real is None or bool(real[i])][: self.max_videos]
        if not chosen:
            raise ShapeError("Expected a real video in the first validation batch, but all of them are padding.")
        data = getattr(trainer, "datamodule", None)
        background = 0 if getattr(data, "has_background", True) else None
        drawings = []
        for i in chosen:
            places, times = _frame_places(i, video.shape[1], maps, output, entries.get("frame_mask"))
            pixels = video[i][times].float().cpu().numpy()
            frames = to_uint8(pixels, getattr(data, "mean", None), getattr(data, "std", None))
            drawing = _Drawing(
                str(names[i]) if isinstance(names, (list, tuple)) else str(i), times, {"video": frames}, []
            )
            if truth is not None:
                objects = label_masks(truth[i][times].cpu().numpy())
                drawing.pictures["ground truth"] = color_labels(objects, background=background)
                drawing.overlays.append(overlay_labels(frames, objects, background=background))
            found = {name: getattr(output, name)[i].cpu().numpy()[places] for name in _MAPS}
            drawing.overlays.append(overlay_labels(frames, found["raw_decoder_labels"]))
            encoder, decoder = int(output.used_encoder_slots[i]), int(output.used_decoder_slots[i])
            drawing.pictures[f"encoder\n{encoder} slots used"] = color_labels(found["raw_encoder_labels"])
            drawing.pictures[f"decoder\n{decoder} slots used"] = color_labels(found["raw_decoder_labels"])
            drawing.pictures[_REGIONS] = color_regions(found["boundary"], found["interior"])
            if output.slot_iou is not None:
                merged = int(output.merged_slots[i])
                drawing.pictures[f"encoder\n{merged} merged"] = color_labels(found["encoder_labels"])
                drawing.pictures[f"decoder\n{merged} merged"] = color_labels(found["decoder_labels"])
            drawings.append(drawing)
        return drawings

    def _write(self, trainer: L.Trainer, drawings: list[_Drawing]) -> None:
        title = f"step {trainer.global_step}"
        count = min(max(len(drawing.times) for drawing in drawings), self.max_frames)
        sheet = draw_sheet([row for drawing in drawings for row in drawing.rows(count)], title=title)
        if self._log_dir is not None:
            path = Path(self._log_dir) / "pictures" / f"step-{trainer.global_step:06d}.png"
            clip = path.with_suffix(".mp4")
            refuse_foreign_png(path)
            if clip.exists() and not path.exists():  # ours come after their sheet
                raise ConfigError(f"Expected {clip} to be absent or written by ssync_pl, but it is not. Move it away.")
            write_bytes(path, encode_png(sheet))
            self.last_path = path
            if self.video and mp4_available():
                panels = [[drawing.pictures["video"], *drawing.overlays] for drawing in drawings]
                columns = ["video", *(["ground truth"] if len(panels[0]) == 3 else []), "decoder slots"]
                names = [drawing.name for drawing in drawings]
                write_bytes(clip, encode_mp4(compose_frames(panels, columns=columns, rows=names, title=title)))
            elif self.video and not self._told:
                self._told = True
                rank_zero_info("SSyncPictures writes sheets but no MP4, because PyAV is missing: run `pip install av`.")
        for logger in trainer.loggers:
            add_image = getattr(getattr(logger, "experiment", None), "add_image", None)
            log_image = getattr(logger, "log_image", None)
            if callable(log_image):
                log_image(key="pictures/slots", images=[sheet], step=trainer.global_step)
            elif callable(add_image):
                add_image("pictures/slots", sheet, trainer.global_step, dataformats="HWC")


@dataclass(frozen=True)
class _Drawing:
    """The real frames of a video, and everything that is drawn of them, by caption."""

    name: str
    times: list[int]
    pictures: dict[str, Bytes]
    overlays: list[Bytes]

    def rows(self, count: int) -> list[SheetRow]:
        """Rows of `count` frames, white where the video is shorter."""
        picked = np.linspace(0, len(self.times) - 1, min(len(self.times), count)).round().astype(int)
        height, width = self.pictures["video"].shape[1:3]
        rows = []
        for caption, picture in self.pictures.items():
            frames = np.full((count, height, width, 3), 255, dtype=np.uint8)
            frames[: len(picked)] = resize_nearest(picture[picked], (height, width))
            legend = tuple(REGION_COLORS.items()) if caption == _REGIONS else ()
            if caption == "video":
                caption = f"video {self.name[:24]}\nframes {', '.join(str(self.times[k]) for k in picked)}"
            rows.append(SheetRow(caption, frames, legend))
        return rows


def _ssync_callback(trainer: L.Trainer) -> SSyncCallback | None:
    return next((c for c in trainer.callbacks if isinstance(c, SSyncCallback)), None)  # type: ignore[attr-defined]


def _frame_places(
    index: int, length: int, maps: SSyncMaps, output: SSyncOutput, frame_mask: Tensor | None
) -> tuple[list[int], list[int]]:
    """Places of a video's frames in the maps and in the video: hosts may look at a part of the clip only."""
    seen = output.encoder_labels.shape[1]
    if maps.frame_index is not None and int(maps.frame_index.max()) < length:
        times = maps.frame_index[index].tolist()
    elif seen in (1, length):
        times = [length // 2] if seen == 1 else list(range(length))
    else:
        raise ShapeError(f"Expected maps of {length} frames as in the video, but got {seen}.")
    real = [place for place, t in enumerate(times) if frame_mask is None or bool(frame_mask[index, t])]
    return real, [times[place] for place in real]


def _find_video(batch: Any, key: str) -> Tensor:
    entries: Any = batch if isinstance(batch, Mapping) else {}
    video = entries.get(key)
    if video is None and isinstance(batch, (list, tuple)) and batch:
        video = batch[0]
    if isinstance(video, Tensor) and video.ndim == 4 and video.shape[1] == 3:
        video = video.unsqueeze(1)
    if not isinstance(video, Tensor) or video.ndim != 5 or video.shape[2] != 3:
        got = tuple(video.shape) if isinstance(video, Tensor) else sorted(entries)
        raise ShapeError(f"Expected batch key `{key}` to be (B, T, 3, H, W), but got {got}. Set `video_key`.")
    return video
