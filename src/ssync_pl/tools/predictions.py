"""`SlotPredictions`: what the slots hold of each predicted video, as overlay videos and label files."""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from ssync_pl.data.files import write_bytes
from ssync_pl.data.video import mp4_available
from ssync_pl.errors import ConfigError, ShapeError, ShardError
from ssync_pl.tools.predict.joined import WINDOW_KEY, JoinedVideo
from ssync_pl.tools.predict.video_files import FileChoice, VideoFiles
from ssync_pl.tools.viz import to_uint8

__all__ = ["PredictedVideo", "SlotPredictions"]

_CLAIMS = ".claims"
_RANK_INDEX = "index.rank-*.json"
_FPS = 6
_LONGEST_NAME = 100


@dataclass(frozen=True)
class PredictedVideo:
    """One line of `index.json`.

    Args:
        key: The video's key in the data set.
        name: What its files are called before their endings: the key, made safe for file systems and unique.
        rank: The process that wrote it.
        frames: Number of frames.
        slots_used: Slots that win at least one pixel of the video.
        source: The file or folder that the video came from; empty where only the data module knows.
        windows: In how many windows, one after the other, the host saw it.

    Example:
        >>> PredictedVideo("clips/7", "clips_7", 0, frames=24, slots_used=5).name
        'clips_7'
    """

    key: str
    name: str
    rank: int
    frames: int
    slots_used: int
    source: str = ""
    windows: int = 1


class SlotPredictions(L.Callback):
    """Write what `predict_step` returns of every video: an overlay video, a label file, and an index of all.

    For each video of the predict set: `<name>.mp4` (frames beside the slots' labels), `<name>.labels.npz` with
    `labels` uint8 (T, H, W) (read it with `numpy.load`), `<name>.tracks.csv` (area, centre and box of each slot in each
    frame, see `slot_tracks`), and one line of `index.json`. Repeats that only fill a batch (`batch_padding_mask`) are
    not written, padded frames (`frame_mask`) are cut off. Every process writes its own videos; process 0 joins their
    indices. `ssync-pl predict` adds this callback unless the configuration names it or another prediction writer.

    Videos of `ssync-pl predict --input` come in windows, which are joined. Their labels have the size of the video's
    own frames, with 255 where a crop of the model cut pixels off; `masks` of `soft` keep the model's size.

    Args:
        out: The folder. None: `predictions` in the run's log folder.
        video: Write the MP4. Needs PyAV; without it a PNG sheet is written instead and one warning says so.
        masks: `labels` writes the label files, `soft` adds `masks` float16 (T, S, H, W) to them, `none` writes none.
        fps: Frames a second of the MP4. None takes the video's own where it is known, else 6.
        cell: Longer side of a frame in the MP4 and the sheet, in pixels.
        max_videos: Most videos that are written, over all processes. None writes all.
        labels_key: Where `predict_step`'s result holds labels (B, T, H, W); dots lead into nested dicts.
        masks_key: Where it holds masks (B, T, S, H, W); they give the labels where there are none.
        video_key: Key of the frames (B, T, 3, H, W) in the batch.
        label_pngs: Write `<name>_labels/00000.png`, …: 8-bit palette pictures, index = slot, colours of the overlay.
        tracks: Write `<name>.tracks.csv`.

    Raises:
        ConfigError: A setting is out of range.

    Example:
        >>> SlotPredictions(masks="soft", max_videos=10).written
        []
    """

    def __init__(
        self,
        out: str | None = None,
        video: bool = True,
        masks: Literal["labels", "none", "soft"] = "labels",
        fps: int | None = None,
        cell: int = 224,
        max_videos: int | None = None,
        labels_key: str = "labels",
        masks_key: str = "masks",
        video_key: str = "video",
        label_pngs: bool = False,
        tracks: bool = True,
    ) -> None:
        super().__init__()
        for name, value, least in (("fps", fps, 1), ("cell", cell, 16), ("max_videos", max_videos, 1)):
            if value is not None and value < least:
                raise ConfigError(f"Expected argument `{name}` to be at least {least}, but got {value}.")
        if masks not in ("labels", "none", "soft"):
            raise ConfigError(f"Expected argument `masks` to be 'labels', 'none' or 'soft', but got {masks!r}.")
        self.out = out
        self.video = video
        self.masks = masks
        self.fps = fps
        self.cell = cell
        self.max_videos = max_videos
        self.labels_key = labels_key
        self.masks_key = masks_key
        self.video_key = video_key
        self.label_pngs = label_pngs
        self.tracks = tracks
        self.folder: Path | None = None
        self.total = 0
        self.written: list[PredictedVideo] = []
        self._room: int | None = None
        self._seen = 0
        self._joined: JoinedVideo | None = None

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make the folder, and clear what an interrupted run left in it."""
        log_dir = trainer.log_dir  # collective, so asked on each rank
        self.folder = Path(self.out) if self.out else Path(log_dir or trainer.default_root_dir) / "predictions"
        self.written, self._seen, self._room, self._joined = [], 0, None, None
        if self.max_videos is not None:
            share, rest = divmod(self.max_videos, trainer.world_size)
            self._room = share + (trainer.global_rank < rest)
        try:
            if trainer.local_rank == 0:  # machines may have disks of their own
                shutil.rmtree(self.folder / _CLAIMS, ignore_errors=True)
                for path in self.folder.glob(_RANK_INDEX):
                    path.unlink()
            trainer.strategy.barrier("predictions")
            (self.folder / _CLAIMS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._disk_error(error) from error
        if self.video and not mp4_available():
            rank_zero_warn("SlotPredictions writes PNG sheets instead of MP4: PyAV is missing. Run `pip install av`.")

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the videos of a batch."""
        if self._room == 0:
            return
        video = self._video(batch)
        labels, masks = self._labels(outputs, video)
        if isinstance(batch.get(WINDOW_KEY), Mapping):
            try:
                self._add_window(trainer.global_rank, batch[WINDOW_KEY], labels[0], None if masks is None else masks[0])
            except OSError as error:
                raise self._disk_error(error) from error
            return
        data = getattr(trainer, "datamodule", None)
        mean, std = getattr(data, "mean", None), getattr(data, "std", None)
        real, valid = batch.get("batch_padding_mask"), batch.get("frame_mask")
        keys = batch.get("__key__")
        for row in range(len(video)):
            if (real is not None and not bool(real[row])) or self._room == 0:
                continue
            keep = slice(None) if valid is None else valid[row].bool()
            key = str(keys[row]) if isinstance(keys, (list, tuple)) else self._number(trainer)
            frames = to_uint8(video[row][keep].float().cpu().numpy(), mean, std)
            soft = masks[row][keep].half().cpu().numpy() if masks is not None and self.masks == "soft" else None
            try:
                name = self._claim(key)
                files = VideoFiles(self._folder(), name, key, self.fps or _FPS, self._choice())
                try:
                    files.add(frames, labels[row][keep].cpu().numpy(), soft)
                    used = files.finish(None if masks is None else masks.shape[2])
                finally:
                    files.discard()
            except OSError as error:
                raise self._disk_error(error) from error
            self._note(PredictedVideo(key, name, trainer.global_rank, len(frames), used))

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the index; process 0 joins those of all processes."""
        if self._joined is not None:  # `limit_predict_batches` stopped in the middle of a video
            rank_zero_warn(
                f"SlotPredictions writes nothing of {self._joined.files.key}: the prediction ended before the video."
            )
            self._discard()
        try:
            self._write_index(trainer)
            trainer.strategy.barrier("predictions")
            if trainer.local_rank == 0:
                shutil.rmtree(self._folder() / _CLAIMS, ignore_errors=True)
            if trainer.is_global_zero:
                self._join_indices()
        except OSError as error:
            raise self._disk_error(error) from error

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Keep the index of what was written before the run broke off."""
        self._discard()
        if trainer.state.fn != "predict" or self.folder is None or not self.folder.is_dir():
            return
        try:
            self._write_index(trainer)
            if trainer.world_size == 1:
                shutil.rmtree(self.folder / _CLAIMS, ignore_errors=True)
                self._join_indices()
        except OSError as error:
            rank_zero_warn(f"SlotPredictions could not write the index: {error}")

    def _number(self, trainer: L.Trainer) -> str:
        number = f"{self._seen:06d}"
        self._seen += 1
        return number if trainer.world_size == 1 else f"rank{trainer.global_rank}-{number}"

    def _video(self, batch: Any) -> Tensor:
        video = batch.get(self.video_key) if isinstance(batch, Mapping) else None
        if not isinstance(video, Tensor) or video.ndim != 5 or video.shape[2] != 3:
            got = tuple(video.shape) if isinstance(video, Tensor) else _keys(batch)
            raise ShapeError(f"Expected batch key `{self.video_key}` to be (B, T, 3, H, W), but got {got}.")
        return video

    def _discard(self) -> None:
        if self._joined is not None:
            self._joined.files.discard()
            self._joined = None

    def _choice(self) -> FileChoice:
        mp4 = self.video and mp4_available()
        return FileChoice(self.video, mp4, self.masks, self.label_pngs, self.tracks, self.cell)

    def _note(self, video: PredictedVideo) -> None:
        self.written.append(video)
        if self._room is not None:
            self._room -= 1

    def _add_window(self, rank: int, window: Mapping[str, Any], labels: Tensor, masks: Tensor | None) -> None:
        if window["start"] == 0:
            key = window["key"]
            name = self._claim(key)
            fps = self.fps or (max(1, round(window["rate"])) if window["rate"] else _FPS)
            self._joined = JoinedVideo(VideoFiles(self._folder(), name, key, fps, self._choice()))
        if self._joined is None:
            return
        self._joined.add(window, labels, masks)
        if window["last"]:
            joined, self._joined = self._joined, None
            try:
                used = joined.files.finish(joined.num_slots)
            finally:
                joined.files.discard()
            frames = joined.files.frames
            self._note(
                PredictedVideo(
                    window["key"], joined.files.name, rank, frames, used, str(window["source"]), joined.windows
                )
            )

    def _labels(self, outputs: Any, video: Tensor) -> tuple[Tensor, Tensor | None]:
        if isinstance(outputs, Tensor):  # a host may return its labels or masks alone
            outputs = {self.labels_key if outputs.ndim == 4 else self.masks_key: outputs}
        labels, masks = _find(outputs, self.labels_key), _find(outputs, self.masks_key)
        wanted = tuple(video.shape[:2])
        if labels is None and masks is None:
            raise ConfigError(
                f"Expected `predict_step` to return a dict with labels (B, T, H, W) in `{self.labels_key}` or masks "
                f"(B, T, S, H, W) in `{self.masks_key}`, but got {_keys(outputs)}. Set `labels_key` or `masks_key` of "
                "SlotPredictions, or name a prediction writer of your own in the configuration."
            )
        if masks is not None and (masks.ndim != 5 or tuple(masks.shape[:2]) != wanted):
            raise _shape_error(self.masks_key, "(B, T, S, H, W)", wanted, masks)
        if labels is None and masks is not None:
            labels = masks.max(dim=2).indices  # many times faster than argmax over a middle axis
        if labels is None or labels.ndim != 4 or tuple(labels.shape[:2]) != wanted or labels.is_floating_point():
            raise _shape_error(self.labels_key, "integers (B, T, H, W)", wanted, labels)
        if self.masks == "soft" and masks is None:
            raise ConfigError(
                f"Expected `predict_step` to return masks (B, T, S, H, W) in `{self.masks_key}` for masks='soft', but "
                f"got {_keys(outputs)}. Set `masks_key`, or masks='labels'."
            )
        most = int(labels.max()) if labels.numel() else 0
        if most > 255 or (labels.numel() and int(labels.min()) < 0):
            raise ShapeError(f"Expected labels from 0 to 255, but got {int(labels.min())} to {most}.")
        return labels.to(torch.uint8), masks

    def _claim(self, key: str) -> str:
        # Making a folder is atomic, so that two processes never take one name for two videos of the same key.
        safe = _safe_name(key)
        number = 1
        while True:
            name = safe if number == 1 else f"{safe}-{number}"
            try:
                (self._folder() / _CLAIMS / name.lower()).mkdir()
            except FileExistsError:
                number += 1
            else:
                return name

    def _write_index(self, trainer: L.Trainer) -> None:
        content = json.dumps([asdict(video) for video in self.written])
        write_bytes(self._folder() / _RANK_INDEX.replace("*", f"{trainer.global_rank:05d}"), content.encode())

    def _join_indices(self) -> None:
        folder = self._folder()
        parts = sorted(folder.glob(_RANK_INDEX))
        videos = [video for path in parts for video in json.loads(path.read_bytes())]
        write_bytes(
            folder / "index.json", (json.dumps({"videos": videos}, indent=1, ensure_ascii=False) + "\n").encode()
        )
        for path in parts:
            path.unlink()
        self.total = len(videos)

    def _folder(self) -> Path:
        if self.folder is None:
            raise ConfigError("Expected SlotPredictions to run in `trainer.predict`, but no prediction was started.")
        return self.folder

    def _disk_error(self, error: OSError) -> ShardError:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "the disk is full" if full else f"writing failed ({error})"
        advice = (
            "Free space, or set `out` of SlotPredictions to another disk, `video: false` or `max_videos`."
            if full
            else "Change the rights of the folder, or set `out` of SlotPredictions."
        )
        return ShardError(
            f"Expected to write predictions to {self.folder}, but {what} after {len(self.written)} videos. {advice}"
        )


def _find(outputs: Any, path: str) -> Tensor | None:
    if isinstance(outputs, Mapping) and isinstance(outputs.get(path), Tensor):
        return outputs[path]
    found = outputs
    for name in path.split("."):
        found = found.get(name) if isinstance(found, Mapping) else getattr(found, name, None)
    return found if isinstance(found, Tensor) else None


def _keys(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"the keys {sorted(map(str, value))}"
    return f"a {type(value).__name__}" + (f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else "")


def _shape_error(key: str, shape: str, wanted: tuple[int, ...], got: Tensor | None) -> ShapeError:
    found = "nothing" if got is None else f"{got.dtype} {tuple(got.shape)}"
    return ShapeError(
        f"Expected `{key}` of the prediction to be {shape} with B, T = {wanted} as in the batch, but got {found}. "
        "Return one label map a frame."
    )


def _safe_name(key: str) -> str:
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", key)[-_LONGEST_NAME:]
    return name.lstrip("._-") or "video"
