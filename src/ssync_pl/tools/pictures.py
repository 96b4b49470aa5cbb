"""`SSyncPictures`: sheets and videos of what the host's slots hold, at each validation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from ssync_pl.adapters import HostAdapter, Located, locate
from ssync_pl.adapters.capture import Capture
from ssync_pl.data.files import write_bytes
from ssync_pl.data.video import encode_mp4, mp4_available
from ssync_pl.errors import ConfigError, ShapeError
from ssync_pl.method.loss import SSyncOutput, ssync_loss
from ssync_pl.method.maps import SSyncMaps
from ssync_pl.plugin.callback import SSyncCallback
from ssync_pl.plugin.config import SSyncConfig
from ssync_pl.tools.viz.colors import color_labels, color_regions, label_masks, overlay_labels, resize_nearest, to_uint8
from ssync_pl.tools.viz.sheet import REGION_LEGEND, SheetRow, compose_frames, draw_sheet, encode_png, stack_sheets

__all__ = ["SSyncPictures"]

# Settings of the method that change a picture
_DRAWN = ("merge_threshold", "n_bd", "n_nbd", "n_noise", "merge")


class SSyncPictures(L.Callback):
    """Draw frames, truth, slots' labels and SSync's regions of the first validation videos.

    Writes `<log_dir>/pictures/step-000123.png` and `.mp4` on rank 0 and hands the sheet to loggers that take images.
    The maps come from the validation step itself: nothing is computed twice, no random number is drawn, training is
    the same to the bit. A host or batch that cannot be drawn gives one warning and no pictures, never an error.

    Args:
        adapter: Where the host's two maps are: an adapter or its name, or `"auto"`: that of the run's `SSyncCallback`
            if there is one, else the host is recognised.
        max_videos: Number of videos a sheet, at least 1.
        max_frames: Number of frames a video on the sheet, evenly spaced, at least 1. The MP4 shows all frames.
        every_n_validations: Draw at every n-th validation, at least 1.
        video: Write the MP4 as well. Needs PyAV; without it a line of the log says so.
        fps: Frames a second of the MP4.
        cell: Longer side of a frame on the sheet, in pixels.
        grid: `(H, W)` patches, as for `SSyncCallback`. None: that of the run's `SSyncCallback` if there is one.
        merge_threshold: Merging and regions are drawn with these settings, as for `ssync_loss`. None, here and below:
            those of the run's `SSyncCallback` if there is one, else the published ones.
        n_bd: As for `ssync_loss`.
        n_nbd: As for `ssync_loss`.
        n_noise: As for `ssync_loss`.
        merge: As for `ssync_loss`.
        video_key: Key of the frames `(B, T, 3, H, W)` in the batch.
        segmentations_key: Key of the true masks `(B, T, C, H, W)` in the batch; without them their row is left out.

    Raises:
        ConfigError: A setting is out of range.

    Example:
        >>> SSyncPictures(max_videos=2).last_path is None
        True
    """

    def __init__(
        self,
        adapter: str | HostAdapter = "auto",
        max_videos: int = 4,
        max_frames: int = 6,
        every_n_validations: int = 1,
        video: bool = True,
        fps: int = 6,
        cell: int = 112,
        grid: tuple[int, int] | None = None,
        merge_threshold: float | None = None,
        n_bd: int | None = None,
        n_nbd: int | None = None,
        n_noise: int | None = None,
        merge: bool | None = None,
        video_key: str = "video",
        segmentations_key: str = "segmentations",
    ) -> None:
        super().__init__()
        counts = {"max_videos": max_videos, "max_frames": max_frames, "every_n_validations": every_n_validations}
        for name, value in {**counts, "fps": fps, "cell": cell}.items():
            if value < 1:
                raise ConfigError(f"Expected argument `{name}` to be at least 1, but got {value}.")
        self.adapter = adapter
        self.max_videos = max_videos
        self.max_frames = max_frames
        self.every_n_validations = every_n_validations
        self.video = video
        self.fps = fps
        self.cell = cell
        self.grid = grid
        named = {"merge_threshold": merge_threshold, "n_bd": n_bd, "n_nbd": n_nbd, "n_noise": n_noise, "merge": merge}
        self.settings: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
        SSyncConfig(**self.settings)  # refuses what is out of range now, not at the first picture
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

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put hooks on the host; they stay until the end, because a graph compiled without them would ignore them."""
        self._attach(trainer, pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put hooks on the host when it is only validated."""
        self._attach(trainer, pl_module)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Decide whether this validation is drawn."""
        self._due = not trainer.sanity_checking and self._validations % self.every_n_validations == 0
        if not trainer.sanity_checking:
            self._validations += 1
        if self._due:
            self._log_dir = trainer.log_dir  # collective, so asked on each rank

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Listen to the host during the first batch."""
        if self._due and self._capture is not None and batch_idx == 0 and dataloader_idx == 0:
            self._capture.open()

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw what was heard, and stop listening."""
        if self._capture is None or self._adapter is None or not self._capture.is_open:
            return
        try:
            with torch.no_grad():
                self._capture.close()
                maps = self._adapter.collect(self._capture, batch=batch)
                output = ssync_loss(maps, **self._options(trainer))
            self._write(trainer, _Clips(self, trainer, batch, maps, output))
        except Exception as error:  # a picture is never worth a run
            self._give_up(error)
        else:
            self._capture.clear()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Take the hooks off the host."""
        self._remove()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Take the hooks off the host."""
        self._remove()

    def _attach(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._capture is not None or self._failed or not trainer.is_global_zero:
            return
        try:
            found = self._resolve(trainer, pl_module)
            self._adapter, self._capture = found.adapter, found.adapter.attach(found.root)
        except Exception as error:  # a picture is never worth a run
            self._give_up(error)

    def _resolve(self, trainer: L.Trainer, host: L.LightningModule) -> Located:
        # Whoever told SSyncCallback about the host and the method should not have to do it twice.
        named = _ssync_callback(trainer)
        if named is None or self.adapter != "auto":
            return locate(self.adapter, host, self.grid)
        return locate(named.adapter, host, self.grid or named.grid)

    def _options(self, trainer: L.Trainer) -> dict[str, Any]:
        named = _ssync_callback(trainer)
        config = SSyncConfig() if named is None else named.config
        return {name: self.settings.get(name, getattr(config, name)) for name in _DRAWN}

    def _remove(self) -> None:
        capture, self._capture, self._adapter = self._capture, None, None
        if capture is not None:
            capture.remove()

    def _give_up(self, error: Exception) -> None:
        self._remove()
        if not self._failed:
            self._failed = True
            rank_zero_warn(f"SSyncPictures draws no picture: {type(error).__name__}: {error}")

    def _write(self, trainer: L.Trainer, clips: _Clips) -> None:
        sheet = clips.sheet()
        if self._log_dir is not None:
            path = Path(self._log_dir) / "pictures" / f"step-{trainer.global_step:06d}.png"
            write_bytes(path, encode_png(sheet))
            self.last_path = path
            if self.video and mp4_available():
                write_bytes(path.with_suffix(".mp4"), encode_mp4(clips.video(), fps=self.fps))
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


def _ssync_callback(trainer: L.Trainer) -> SSyncCallback | None:
    return next((c for c in trainer.callbacks if isinstance(c, SSyncCallback)), None)  # type: ignore[attr-defined]


class _Clips:
    """The videos of a batch with everything that is drawn of them, as arrays on the CPU."""

    def __init__(
        self, owner: SSyncPictures, trainer: L.Trainer, batch: Any, maps: SSyncMaps, output: SSyncOutput
    ) -> None:
        self.owner = owner
        self.output = output
        self.step = trainer.global_step
        self.merged = output.slot_iou is not None
        video = _find_video(batch, owner.video_key)
        data = getattr(trainer, "datamodule", None)
        self.has_background = bool(getattr(data, "has_background", True))
        count = min(video.shape[0], output.encoder_labels.shape[0])
        keep = _mapping(batch).get("batch_padding_mask")
        real = range(count) if keep is None else [i for i in range(count) if bool(keep[i])]
        self.chosen = list(real)[: owner.max_videos]
        if not self.chosen:
            raise ShapeError("Expected a real video in the first validation batch, but all of them are padding.")
        self.times = {index: self._frames_of(index, batch, video, maps) for index in self.chosen}
        rows = video[self.chosen].detach().float().cpu().numpy()
        frames = to_uint8(rows, getattr(data, "mean", None), getattr(data, "std", None))
        self.frames = {i: frames[n][[t for _, t in self.times[i]]] for n, i in enumerate(self.chosen)}
        truth = _mapping(batch).get(owner.segmentations_key)
        self.truth: dict[int, Any] = {}
        if isinstance(truth, Tensor) and truth.ndim == 5 and truth.shape[:2] == video.shape[:2]:
            for i in self.chosen:
                self.truth[i] = label_masks(truth[i][[t for _, t in self.times[i]]].cpu().numpy())
        names = _mapping(batch).get("__key__")
        self.names = {i: str(names[i]) if isinstance(names, (list, tuple)) else str(i) for i in self.chosen}

    def _frames_of(self, index: int, batch: Any, video: Tensor, maps: SSyncMaps) -> list[tuple[int, int]]:
        # pairs of a frame's place in the maps and in the video: hosts may look at a part of the clip only
        length, seen = video.shape[1], self.output.encoder_labels.shape[1]
        if maps.frame_index is not None and int(maps.frame_index.max()) < length:
            pairs = list(enumerate(maps.frame_index[index].tolist()))
        elif seen == length:
            pairs = [(t, t) for t in range(length)]
        elif seen == 1:
            pairs = [(0, length // 2)]
        else:
            raise ShapeError(f"Expected maps of {length} frames as in the video, but got {seen}.")
        mask = _mapping(batch).get("frame_mask")
        if mask is not None:
            pairs = [(m, t) for m, t in pairs if bool(mask[index, t])]
        return pairs

    def _labels(self, name: str, index: int) -> Any:
        return getattr(self.output, name)[index].cpu().numpy()[[m for m, _ in self.times[index]]]

    def sheet(self) -> Any:
        """One sheet a video, two side by side."""
        return stack_sheets([self._sheet(index) for index in self.chosen], columns=2)

    def _sheet(self, index: int) -> Any:
        pairs = self.times[index]
        count = min(len(pairs), self.owner.max_frames)
        picked = [round(k * (len(pairs) - 1) / max(count - 1, 1)) for k in range(count)]
        frames = self.frames[index]
        rows = [SheetRow("video", frames[picked])]
        if index in self.truth:
            background = 0 if self.has_background else None
            rows.append(SheetRow("ground truth", color_labels(self.truth[index][picked], background=background)))

        def add(caption: str, name: str) -> None:
            labels = resize_nearest(self._labels(name, index)[picked], frames.shape[1:3], channels_last=False)
            rows.append(SheetRow(caption, color_labels(labels)))

        add("encoder", "raw_encoder_labels")
        add("decoder", "raw_decoder_labels")
        regions = color_regions(self._labels("boundary", index)[picked], self._labels("interior", index)[picked])
        rows.append(SheetRow("SSync regions", resize_nearest(regions, frames.shape[1:3]), REGION_LEGEND))
        if self.merged:
            add("encoder\nmerged", "encoder_labels")
            add("decoder\nmerged", "decoder_labels")
        out = self.output
        used = f"encoder {int(out.used_encoder_slots[index])}, decoder {int(out.used_decoder_slots[index])}"
        title = f"video {self.names[index]}  |  step {self.step}  |  slots used: {used}"
        if self.merged:
            title += f"  |  merged: {int(out.merged_slots[index])}"
        return draw_sheet(rows, title=title, columns=[f"frame {pairs[k][1]}" for k in picked], cell=self.owner.cell)

    def video(self) -> Any:
        """All frames: video, truth and decoder side by side."""
        panels = []
        columns = ["video", *(["ground truth"] if self.truth else []), "decoder slots"]
        for index in self.chosen:
            frames = self.frames[index]
            clips = [frames]
            if self.truth:
                background = 0 if self.has_background else None
                clips.append(overlay_labels(frames, self.truth[index], background=background))
            clips.append(overlay_labels(frames, self._labels("raw_decoder_labels", index)))
            panels.append(clips)
        names = [self.names[index] for index in self.chosen]
        return compose_frames(panels, columns=columns, rows=names, title=f"step {self.step}")


def _mapping(batch: Any) -> Mapping[str, Any]:
    return batch if isinstance(batch, Mapping) else {}


def _find_video(batch: Any, key: str) -> Tensor:
    video = _mapping(batch).get(key)
    if video is None and isinstance(batch, (list, tuple)) and batch and isinstance(batch[0], Tensor):
        video = batch[0]
    if isinstance(video, Tensor) and video.ndim == 4 and video.shape[1] == 3:
        video = video.unsqueeze(1)
    if not isinstance(video, Tensor) or video.ndim != 5 or video.shape[2] != 3:
        got = tuple(video.shape) if isinstance(video, Tensor) else sorted(_mapping(batch))
        raise ShapeError(f"Expected batch key `{key}` to be (B, T, 3, H, W), but got {got}. Set `video_key`.")
    return video
