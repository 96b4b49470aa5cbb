"""`SlotPredictions`: what the slots hold of each predicted video, as overlay videos and label files."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from ssync_pl.data.files import write_bytes
from ssync_pl.data.video import mp4_available
from ssync_pl.errors import ConfigError, ShapeError, ShardError, require, require_shape
from ssync_pl.tools.predict.files import TEMPORARY, VideoFiles
from ssync_pl.tools.predict.windows import OUTSIDE, match_slots, relabel, restore_labels
from ssync_pl.tools.viz import to_uint8

__all__ = ["WINDOW_KEY", "PredictedVideo", "SlotPredictions"]

WINDOW_KEY = "__window__"
"""Batch entry of `InputDataModule`: `video` (an `InputVideo`), `start`, `last`, `frames` (uint8 (T, H, W, 3), as the
video stores them) and `region` (rows and columns that the host saw)."""

_INDEX = "index.json"
_FORMAT = "ssync_pl.predictions"
_FPS = 6
_LONGEST_NAME = 100


class PredictedVideo(NamedTuple):
    """One line of `index.json`; `slots_used` win at least one pixel, `windows` is how often the host was run."""

    key: str
    name: str
    frames: int
    slots_used: int
    source: str
    windows: int


class SlotPredictions(L.Callback):
    """Writes what `predict_step` returns of every video: an overlay video, a label file, and an index of all.

    `predict_step` has to return a dict or tuple with `labels` (B, T, H, W), `masks` (B, T, S, H, W) or both, or one of
    them alone. For each video of the predict set: `<name>.mp4` (frames beside the slots' labels), `<name>.labels.npz`
    with `labels` uint8 (T, H, W) (read it with `numpy.load`), `<name>.tracks.csv` (area, centre and box of each slot in
    each frame), and one line of `index.json`. Repeats that only fill a batch (`batch_padding_mask`) are not written,
    padded frames (`frame_mask`) are cut off. Of several processes, each writes its own videos to `rank<number>` in the
    folder. `ssync-pl predict` adds this callback unless the configuration names it or another prediction writer.

    The folder has to be new, empty, or one of earlier predictions, of which videos of the same name are replaced. A
    folder that holds anything else is refused before the prediction begins.

    Args:
        out: The folder. None: `predictions` in the run's log folder.
        video: Write the MP4. Needs PyAV; without it one warning says so.
        label_pngs: Write `<name>_labels/00000.png` and so on: palette pictures, index = slot.
        cell: Longer side of a frame in the MP4, in pixels.
    """

    def __init__(
        self, out: str | None = None, *, video: bool = True, label_pngs: bool = False, cell: int = 224
    ) -> None:
        super().__init__()
        require(cell >= 16, "argument `cell` to be at least 16", cell)
        self.out, self.video, self.label_pngs, self.cell = out, video, label_pngs, cell
        self.folder = Path(out or "predictions")
        self.written: list[PredictedVideo] = []
        self._earlier: list[dict[str, Any]] = []
        self._names: set[str] = set()
        self._open: VideoFiles | None = None

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuses a folder with files of others."""
        log_dir = trainer.log_dir  # collective, so asked on each rank
        folder = Path(self.out) if self.out else Path(log_dir or trainer.default_root_dir) / "predictions"
        self.folder = folder if trainer.world_size == 1 else folder / f"rank{trainer.global_rank}"
        self.written, self._names, self._open = [], set(), None
        with self._disk():
            self._earlier = _look_into(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
        if self.video and not mp4_available():
            rank_zero_warn("SlotPredictions writes no MP4: PyAV is missing. Run `pip install av`.")

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
        video = batch.get("video") if isinstance(batch, Mapping) else None
        if not isinstance(video, Tensor) or video.ndim != 5 or video.shape[2] != 3:
            raise ShapeError(f"Expected batch key `video` to be (B, T, 3, H, W), but got {_told(video, batch)}.")
        labels, masks = _labels(outputs, tuple(video.shape[:2]))
        with self._disk():
            if WINDOW_KEY in batch:
                self._add_window(batch[WINDOW_KEY], labels[0], None if masks is None else masks[0])
            else:
                self._write_batch(trainer, batch, labels, None if masks is None else masks.shape[2])

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the index, which is there already unless no video was whole."""
        if self._open is not None:  # `limit_predict_batches` stopped in the middle of a video
            rank_zero_warn(f"SlotPredictions writes nothing of {self._open.key}: the prediction ended before it.")
        self._discard()
        with self._disk():
            self._write_index()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leaves no half files."""
        self._discard()

    def _write_batch(self, trainer: L.Trainer, batch: Any, labels: Tensor, num_slots: int | None) -> None:
        data = getattr(trainer, "datamodule", None)
        mean, std = getattr(data, "mean", None), getattr(data, "std", None)
        real, valid, keys = batch.get("batch_padding_mask"), batch.get("frame_mask"), batch.get("__key__")
        for row in range(len(labels)):
            if real is not None and not bool(real[row]):
                continue
            keep = slice(None) if valid is None else valid[row].bool()
            key = str(keys[row]) if isinstance(keys, (list, tuple)) else f"{len(self.written):06d}"
            self._open = self._files(key, _FPS)
            frames = to_uint8(batch["video"][row][keep].float().cpu().numpy(), mean, std)
            self._open.add(frames, labels[row][keep].cpu().numpy())
            self._finish(num_slots, "")

    def _add_window(self, window: Mapping[str, Any], labels: Tensor, masks: Tensor | None) -> None:
        video, frames = window["video"], window["frames"]
        if window["start"] == 0:
            self._discard()
            self._open = self._files(video.key, max(1, round(video.rate)) if video.rate else _FPS)
        files = self._open
        if files is None:
            return
        files.slots = max(files.slots, 0 if masks is None else masks.shape[1], int(labels.max()) + 1)
        # Where the largest mask is the label, masks give smoother outlines.
        smooth = masks if masks is not None and torch.equal(masks.max(dim=1).indices, labels.long()) else labels
        shown = restore_labels(smooth, frames.shape[1:3], window["region"])
        if window["start"]:  # its first frame is the last one of the window before
            names = match_slots(files.last, shown[0], files.slots)
            frames, shown = frames[1:], relabel(shown, names)[1:]
        files.add(frames, shown, outside=True)
        if window["last"]:
            self._finish(files.slots, video.source)

    def _files(self, key: str, fps: int) -> VideoFiles:
        safe = re.sub(r"[^A-Za-z0-9._-]+", "_", key)[-_LONGEST_NAME:].lstrip("._-") or "video"
        names = (safe if number == 1 else f"{safe}-{number}" for number in itertools.count(1))
        name = next(name for name in names if name.lower() not in self._names)
        self._names.add(name.lower())
        shown = fps if self.video and mp4_available() else None
        return VideoFiles(self.folder, name, key, fps=shown, label_pngs=self.label_pngs, cell=self.cell)

    def _finish(self, num_slots: int | None, source: str) -> None:
        if self._open is not None:
            files, used = self._open, self._open.finish(num_slots)
            self.written.append(PredictedVideo(files.key, files.name, files.frames, used, source, files.pieces))
            self._open = None
            self._write_index()

    def _discard(self) -> None:
        if self._open is not None:
            self._open.discard()
            self._open = None

    def _write_index(self) -> None:
        names = {video.name.lower() for video in self.written}
        kept = [video for video in self._earlier if video["name"].lower() not in names]
        index = {"format": _FORMAT, "videos": [*kept, *(video._asdict() for video in self.written)]}
        write_bytes(self.folder / _INDEX, (json.dumps(index, indent=1, ensure_ascii=False) + "\n").encode())

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            what = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else f"writing failed ({error})"
            raise ShardError(
                f"Expected to write predictions to {self.folder}, but {what} after {len(self.written)} videos. Free "
                "space or change the rights of the folder, or set `out` of SlotPredictions to another one."
            ) from error


def _look_into(folder: Path) -> list[dict[str, Any]]:
    """Videos of earlier predictions in the folder; refuses files of others, removes half files of a killed prediction.

    Names of hidden files are never used, so those do not count.
    """
    if not folder.exists():
        return []
    earlier: list[dict[str, Any]] = []
    known: set[str] = set()
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):  # no index of ours
        index = json.loads((folder / _INDEX).read_bytes())
        if index["format"] == _FORMAT:
            earlier = [video for video in index["videos"] if isinstance(video["name"], str)]
            known.add(_INDEX)
    endings = (".mp4", ".png", ".labels.npz", ".tracks.csv", "_labels")
    known |= {video["name"].lower() + ending for video in earlier for ending in endings}
    foreign = [path for path in sorted(folder.iterdir()) if path.name[0] != "." and path.name.lower() not in known]
    if foreign:
        raise ConfigError(
            f"Expected the folder of the predictions to be new, empty or one of earlier predictions, but {folder} "
            f"holds {foreign[0].name}{f' and {len(foreign) - 1} more' if foreign[1:] else ''}. Name another folder by "
            "--out, or by `out` of SlotPredictions."
        )
    for path in folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(path)
    return earlier


def _labels(outputs: Any, wanted: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
    """Labels (B, T, H, W) uint8, and masks (B, T, S, H, W) where there are any; `wanted` is B and T."""
    if isinstance(outputs, Tensor):  # a host may return its labels or masks alone
        outputs = {"labels" if outputs.ndim == 4 else "masks": outputs}
    read = outputs.get if isinstance(outputs, Mapping) else lambda name: getattr(outputs, name, None)
    labels, masks = (value if isinstance(value, Tensor) else None for value in (read("labels"), read("masks")))
    if masks is not None:
        known = masks.ndim == 5 and tuple(masks.shape[:2]) == wanted and masks.shape[2] <= OUTSIDE
        expected = f"`masks` of the prediction to be (B, T, S, H, W) with B, T = {wanted} as in the batch"
        require_shape(known, f"{expected} and at most {OUTSIDE} slots", masks)
        # `max` is many times faster than `argmax` over a middle axis.
        labels = masks.max(dim=2).indices if labels is None else labels
    if labels is None:
        raise ConfigError(
            "Expected `predict_step` to return a dict with `labels` (B, T, H, W) or `masks` (B, T, S, H, W), but got "
            f"{_told(None, outputs)}. Return them, or name a prediction writer of your own in the configuration."
        )
    if labels.ndim != 4 or tuple(labels.shape[:2]) != wanted or labels.is_floating_point():
        raise ShapeError(
            f"Expected `labels` of the prediction to be integers (B, T, H, W) with B, T = {wanted} as in the batch, "
            f"but got {labels.dtype} {tuple(labels.shape)}. Return one label map per frame."
        )
    least, most = (int(labels.min()), int(labels.max())) if labels.numel() else (0, 0)
    if least < 0 or most > OUTSIDE:
        raise ShapeError(f"Expected labels from 0 to {OUTSIDE}, but got {least} to {most}.")
    return labels.to(torch.uint8), masks


def _told(tensor: Any, whole: Any) -> str:
    if isinstance(tensor, Tensor):
        return str(tuple(tensor.shape))
    return f"the keys {sorted(map(str, whole))}" if isinstance(whole, Mapping) else f"a {type(whole).__name__}"
