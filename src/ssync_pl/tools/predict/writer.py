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
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from ssync_pl.data.files import write_bytes
from ssync_pl.data.video import mp4_available
from ssync_pl.errors import ConfigError, ShapeError, ShardError
from ssync_pl.tools.predict.files import FileChoice, VideoFiles
from ssync_pl.tools.predict.windows import OUTSIDE, match_slots, relabel, restore_labels
from ssync_pl.tools.viz import to_uint8

__all__ = ["WINDOW_KEY", "PredictedVideo", "SlotPredictions"]

WINDOW_KEY = "__window__"
"""Batch entry of `InputDataModule`: `key`, `source`, `start`, `last`, `rate`, `frames` (uint8 (T, H, W, 3), as the
video stores them) and `region` (rows and columns that the host saw)."""

_INDEX = "index.json"
_FORMAT = "ssync_pl.predictions"
_CLAIMS = ".ssync_claims"
_RANK_INDEX = ".ssync_index.rank-*.json"
_FPS = 6
_LONGEST_NAME = 100


@dataclass(frozen=True)
class PredictedVideo:
    """One line of `index.json`.

    Attributes:
        key: The video's key in the data set.
        name: What its files are called before their endings: the key, made safe for file systems and unique.
        rank: The process that wrote it.
        frames: Number of frames.
        slots_used: Slots that win at least one pixel of the video.
        source: The file or folder that the video came from; empty where only the data module knows.
        windows: In how many windows, one after the other, the host saw it.
    """

    key: str
    name: str
    rank: int
    frames: int
    slots_used: int
    source: str = ""
    windows: int = 1


class SlotPredictions(L.Callback):
    """Writes what `predict_step` returns of every video: an overlay video, a label file, and an index of all.

    For each video of the predict set: `<name>.mp4` (frames beside the slots' labels), `<name>.labels.npz` with
    `labels` uint8 (T, H, W) (read it with `numpy.load`), `<name>.tracks.csv` (area, centre and box of each slot in each
    frame), and one line of `index.json`. Repeats that only fill a batch (`batch_padding_mask`) are not written, padded
    frames (`frame_mask`) are cut off. Every process writes its own videos; process 0 joins their indices.
    `ssync-pl predict` adds this callback unless the configuration names it or another prediction writer.

    The folder has to be new, empty, or one of earlier predictions, of which videos of the same name are replaced. A
    folder that holds anything else is refused before the prediction begins.

    Args:
        out: The folder. None: `predictions` in the run's log folder.
        video: Write the MP4. Needs PyAV; without it a PNG sheet is written instead and one warning says so.
        masks: `labels` writes the label files, `soft` adds `masks` float16 (T, S, H, W) to them, `none` writes none.
        fps: Frames per second of the MP4. None takes the video's own where it is known, else 6.
        cell: Longer side of a frame in the MP4 and the sheet, in pixels.
        max_videos: Most videos that are written, over all processes. None writes all.
        labels_key: Where `predict_step`'s result holds labels (B, T, H, W); dots lead into nested dicts.
        masks_key: Where it holds masks (B, T, S, H, W); they give the labels where there are none.
        video_key: Key of the frames (B, T, 3, H, W) in the batch.
        label_pngs: Write `<name>_labels/00000.png`, …: 8-bit palette pictures, index = slot, colours of the overlay.
        tracks: Write `<name>.tracks.csv`.

    Raises:
        ConfigError: A setting is out of range.
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
        self.choice = FileChoice(video, video and mp4_available(), masks, label_pngs, tracks, cell)
        self.fps, self.max_videos = fps, max_videos
        self.labels_key, self.masks_key, self.video_key = labels_key, masks_key, video_key
        self.folder: Path | None = None
        self.total = 0
        self.written: list[PredictedVideo] = []
        self._room: int | None = None
        self._seen = 0
        self._open: _OpenVideo | None = None
        self._earlier: list[dict[str, Any]] = []

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuses a folder with files of others, and clears what an interrupted prediction left in it."""
        log_dir = trainer.log_dir  # collective, so asked on each rank
        self.folder = Path(self.out) if self.out else Path(log_dir or trainer.default_root_dir) / "predictions"
        self.written, self._seen, self._room, self._open = [], 0, None, None
        if self.max_videos is not None:
            share, rest = divmod(self.max_videos, trainer.world_size)
            self._room = share + (trainer.global_rank < rest)
        try:
            self._earlier, leftovers = _look_into(self.folder)
            trainer.strategy.barrier("predictions")  # all have looked before the first one writes
            if trainer.local_rank == 0:  # machines may have disks of their own
                for path in [*leftovers, self.folder / _CLAIMS, *self.folder.glob(_RANK_INDEX)]:
                    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            trainer.strategy.barrier("predictions")
            (self.folder / _CLAIMS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._disk_error(error) from error
        if self.choice.video and not self.choice.mp4:
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
        """Writes the videos of a batch."""
        if self._room == 0:
            return
        video = batch.get(self.video_key) if isinstance(batch, Mapping) else None
        if not isinstance(video, Tensor) or video.ndim != 5 or video.shape[2] != 3:
            got = tuple(video.shape) if isinstance(video, Tensor) else _keys(batch)
            raise ShapeError(f"Expected batch key `{self.video_key}` to be (B, T, 3, H, W), but got {got}.")
        labels, masks = self._labels(outputs, video)
        try:
            if isinstance(batch.get(WINDOW_KEY), Mapping):
                self._add_window(trainer.global_rank, batch[WINDOW_KEY], labels[0], None if masks is None else masks[0])
            else:
                self._write_batch(trainer, batch, video, labels, masks)
        except OSError as error:
            raise self._disk_error(error) from error

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the index; process 0 joins those of all processes."""
        if self._open is not None:  # `limit_predict_batches` stopped in the middle of a video
            rank_zero_warn(f"SlotPredictions writes nothing of {self._open.files.key}: the prediction ended before it.")
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
        """Keeps the index of what was written before the run broke off."""
        self._discard()
        if trainer.state.fn != "predict" or self.folder is None or not (self.folder / _CLAIMS).is_dir():
            return
        try:
            self._write_index(trainer)
            if trainer.world_size == 1:
                shutil.rmtree(self.folder / _CLAIMS, ignore_errors=True)
                self._join_indices()
        except OSError as error:
            rank_zero_warn(f"SlotPredictions could not write the index: {error}")

    def _write_batch(self, trainer: L.Trainer, batch: Any, video: Tensor, labels: Tensor, masks: Tensor | None) -> None:
        data = getattr(trainer, "datamodule", None)
        mean, std = getattr(data, "mean", None), getattr(data, "std", None)
        real, valid, keys = batch.get("batch_padding_mask"), batch.get("frame_mask"), batch.get("__key__")
        for row in range(len(video)):
            if (real is not None and not bool(real[row])) or self._room == 0:
                continue
            keep = slice(None) if valid is None else valid[row].bool()
            key = str(keys[row]) if isinstance(keys, (list, tuple)) else self._number(trainer)
            frames = to_uint8(video[row][keep].float().cpu().numpy(), mean, std)
            soft = masks[row][keep].half().cpu().numpy() if masks is not None and self.choice.masks == "soft" else None
            files = VideoFiles(self._folder(), self._claim(key), key, self.fps or _FPS, self.choice)
            try:
                files.add(frames, labels[row][keep].cpu().numpy(), soft)
                used = files.finish(None if masks is None else masks.shape[2])
            finally:
                files.discard()
            self._note(PredictedVideo(key, files.name, trainer.global_rank, len(frames), used))

    def _add_window(self, rank: int, window: Mapping[str, Any], labels: Tensor, masks: Tensor | None) -> None:
        if window["start"] == 0:
            key, rate = window["key"], window["rate"]
            fps = self.fps or (max(1, round(rate)) if rate else _FPS)
            self._open = _OpenVideo(VideoFiles(self._folder(), self._claim(key), key, fps, self.choice))
        if self._open is None:
            return
        self._open.add(window, labels, masks)
        if window["last"]:
            video, self._open = self._open, None
            try:
                used = video.files.finish(video.num_slots)
            finally:
                video.files.discard()
            files = video.files
            self._note(
                PredictedVideo(files.key, files.name, rank, files.frames, used, str(window["source"]), video.windows)
            )

    def _number(self, trainer: L.Trainer) -> str:
        number = f"{self._seen:06d}"
        self._seen += 1
        return number if trainer.world_size == 1 else f"rank{trainer.global_rank}-{number}"

    def _discard(self) -> None:
        if self._open is not None:
            self._open.files.discard()
            self._open = None

    def _note(self, video: PredictedVideo) -> None:
        self.written.append(video)
        if self._room is not None:
            self._room -= 1

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
        if self.choice.masks == "soft" and masks is None:
            raise ConfigError(
                f"Expected `predict_step` to return masks (B, T, S, H, W) in `{self.masks_key}` for masks='soft', but "
                f"got {_keys(outputs)}. Set `masks_key`, or masks='labels'."
            )
        least, most = (int(labels.min()), int(labels.max())) if labels.numel() else (0, 0)
        if least < 0 or most > OUTSIDE:
            raise ShapeError(f"Expected labels from 0 to {OUTSIDE}, but got {least} to {most}.")
        return labels.to(torch.uint8), masks

    def _claim(self, key: str) -> str:
        # Making a folder is atomic, so that two processes never take one name for two videos of the same key.
        safe = re.sub(r"[^A-Za-z0-9._-]+", "_", key)[-_LONGEST_NAME:].lstrip("._-") or "video"
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
        names = {video["name"].lower() for video in videos}
        kept = [video for video in self._earlier if video["name"].lower() not in names]
        index = {"format": _FORMAT, "videos": [*kept, *videos]}
        write_bytes(folder / _INDEX, (json.dumps(index, indent=1, ensure_ascii=False) + "\n").encode())
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


class _OpenVideo:
    """A video whose windows arrive one after the other; slots keep their numbers throughout."""

    def __init__(self, files: VideoFiles) -> None:
        self.files = files
        self.num_slots = 0
        self.windows = 0
        self._last: np.ndarray | None = None

    def add(self, window: Mapping[str, Any], labels: Tensor, masks: Tensor | None) -> None:
        frames = window["frames"]
        slots = max(0 if masks is None else masks.shape[1], int(labels.max()) + 1)
        if slots > OUTSIDE:
            raise ShapeError(f"Expected at most {OUTSIDE} slots for 8-bit labels, but got {slots}.")
        self.num_slots = max(self.num_slots, slots)
        # Where the largest mask is the label, masks give smoother outlines.
        smooth = masks if masks is not None and torch.equal(masks.max(dim=1).indices, labels.long()) else labels
        shown = restore_labels(smooth, (frames.shape[1], frames.shape[2]), window["region"])
        soft = None
        if masks is not None and self.files.choice.masks == "soft":
            soft = masks.half().cpu().numpy()
        if self._last is not None:  # its frame is the first of this window
            names = match_slots(self._last, shown[0], self.num_slots)
            frames, shown = frames[1:], relabel(shown, names)[1:]
            soft = None if soft is None else soft[1:, np.argsort(names[: soft.shape[1]])]
        self._last = shown[-1] if len(shown) else self._last
        self.windows += 1
        self.files.add(frames, shown, soft, outside=True)


def _look_into(folder: Path) -> tuple[list[dict[str, Any]], list[Path]]:
    """Videos of earlier predictions in the folder, and files that a killed prediction left; refuses anything else.

    Names of hidden files are never used, so those do not count.
    """
    if not folder.exists():
        return [], []
    earlier: list[dict[str, Any]] = []
    known: set[str] = set()
    try:
        index = json.loads((folder / _INDEX).read_bytes())
        if index["format"] == _FORMAT:
            known.add(_INDEX)
            earlier = [video for video in index["videos"] if isinstance(video["name"], str)]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass  # no index of ours
    endings = (".mp4", ".png", ".labels.npz", ".tracks.csv", "_labels")
    known |= {video["name"].lower() + ending for video in earlier for ending in endings}
    claimed = {path.name + ending for path in (folder / _CLAIMS).glob("*") for ending in endings}
    others = [path for path in sorted(folder.iterdir()) if path.name[0] != "." and path.name.lower() not in known]
    foreign = [path for path in others if path.name.lower() not in claimed]
    if foreign:
        raise ConfigError(
            f"Expected the folder of the predictions to be new, empty or one of earlier predictions, but {folder} "
            f"holds {foreign[0].name}{f' and {len(foreign) - 1} more' if foreign[1:] else ''}. Name another folder by "
            "--out, or by `out` of SlotPredictions."
        )
    return earlier, others


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
        "Return one label map per frame."
    )
