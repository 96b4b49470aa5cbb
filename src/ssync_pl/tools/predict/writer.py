"""`SlotPredictions`: what the slots hold of each predicted video, as overlay videos and label files."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from ssync_pl.data.files import write_bytes
from ssync_pl.errors import ShapeError, require, require_shape
from ssync_pl.tools.predict.files import ENDINGS, VideoFiles, mp4_available
from ssync_pl.tools.predict.windows import OUTSIDE, CarrySlots, Window, match_slots, restore_labels
from ssync_pl.tools.viz import to_uint8

WINDOW_KEY = "__window__"  # entry of a batch of `InputDataModule`: the `Window` that it was made from
_INDEX = "index.json"
_FORMAT = "ssync_pl.predictions"


class SlotPredictions(L.Callback):
    """Writes what `predict_step` returns of every video: an overlay video, label files, tracks, and an index of all.

    `predict_step` has to return a dict with `labels` (B, T, H, W), `masks` (B, T, S, H, W) or both. For each video:
    `<name>.mp4` (frames beside the slots' labels; needs PyAV), `<name>_labels/00000.png` and so on (palette pictures,
    index = slot), `<name>.labels.npz` with `labels` uint8 (T, H, W), `<name>.tracks.csv` (area, centre and box of each
    slot in each frame), and one line of `index.json`. Repeats that only fill a batch (`batch_padding_mask`) and padded
    frames (`frame_mask`) are left out. Of several processes, each writes its own videos to `rank<number>`.

    Args:
        out: A folder that is new, empty, or one of earlier predictions, of which videos of the same name are replaced;
            one that holds anything else is refused before the prediction begins. None: `predictions` in the log folder.
    """

    def __init__(self, out: str | None = None) -> None:
        super().__init__()
        self.out, self.folder = out, Path(out or "predictions")
        self.written: list[dict[str, Any]] = []
        self._earlier: list[dict[str, Any]] = []
        self._open: VideoFiles | None = None
        self._carry = CarrySlots(None)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuses a folder with files of others."""
        log_dir = trainer.log_dir  # collective, so asked on each rank
        folder = Path(self.out) if self.out else Path(log_dir or trainer.default_root_dir) / "predictions"
        self.folder = folder if trainer.world_size == 1 else folder / f"rank{trainer.global_rank}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.written, self._earlier = [], _look_into(self.folder)
        self._open, self._carry = None, CarrySlots(pl_module)
        if not mp4_available():
            rank_zero_warn("SlotPredictions writes no MP4: PyAV is missing. Run `pip install av`.")

    def on_predict_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Hands the slots of a window to the next one of the same video."""
        window = batch.get(WINDOW_KEY) if isinstance(batch, Mapping) else None
        self._carry.next_window(window is not None and window.start > 0)

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
        fits = isinstance(video, Tensor) and video.ndim == 5 and video.shape[2] == 3
        require_shape(fits, "batch key `video` to be (B, T, 3, H, W)", () if video is None else video)
        labels, masks = _read(outputs, tuple(batch["video"].shape[:2]))
        whole = [(0, slice(None), batch[WINDOW_KEY])] if WINDOW_KEY in batch else None
        for row, frames, window in whole or self._rows(batch, getattr(trainer, "datamodule", None)):
            self._add(window, labels[row][frames], None if masks is None else masks[row][frames])

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the index, which is there already unless no video was whole."""
        if self._open is not None:  # `limit_predict_batches` stopped in the middle of a video
            rank_zero_warn(f"SlotPredictions writes nothing of {self._open.name}: the prediction ended before it.")
        self._write_index()
        self._carry.close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leaves the host as it was."""
        self._carry.close()

    def _rows(self, batch: Any, data: Any) -> Iterator[tuple[int, Any, Window]]:
        """Gives each video of a batch as one window, and which of its frames are no padding."""
        mean, std = getattr(data, "mean", None), getattr(data, "std", None)
        real, valid, keys = batch.get("batch_padding_mask"), batch.get("frame_mask"), batch.get("__key__")
        for row, video in enumerate(batch["video"]):
            if real is None or bool(real[row]):
                keep = slice(None) if valid is None else valid[row].bool()
                key = str(keys[row]) if isinstance(keys, (list, tuple)) else f"{len(self.written):06d}"
                frames = to_uint8(video[keep].float().cpu().numpy(), mean, std)
                region = (slice(0, frames.shape[1]), slice(0, frames.shape[2]))
                yield row, keep, Window(0, frames, True, key, region=region)

    def _add(self, window: Window, labels: Tensor, masks: Tensor | None) -> None:
        frames = window.frames
        if window.start == 0:
            self._open = VideoFiles(self.folder, self._name(window.key), max(1, round(window.rate or 6)))
        files = self._open
        if files is None:
            return
        # Where the largest mask is the label, masks give smoother outlines.
        smooth = masks is not None and torch.equal(masks.max(dim=1).indices, labels.long())
        shown = restore_labels(masks if masks is not None and smooth else labels, frames.shape[1:3], window.region)
        used = int(np.max(shown, where=shown < OUTSIDE, initial=0)) + 1
        slots = max(files.slots, used if masks is None else max(used, masks.shape[1]))
        if window.start:  # its first frame is the last one of the window before
            table = np.arange(OUTSIDE + 1, dtype=np.uint8)
            table[:slots] = match_slots(files.pieces[-1][-1], shown[0], slots)
            frames, shown = frames[1:], table[shown][1:]
        files.add(frames, shown, slots)
        if window.last:
            line = {"key": window.key, "name": files.name, "source": window.source, "windows": len(files.pieces)}
            self.written.append(line | files.finish())
            self._open = None
            self._write_index()

    def _name(self, key: str) -> str:
        safe = re.sub(r"[^A-Za-z0-9._-]+", "_", key)[-100:].lstrip("._-") or "video"
        names = itertools.chain([safe], (f"{safe}-{number}" for number in itertools.count(2)))
        taken = {video["name"].lower() for video in self.written}
        return next(name for name in names if name.lower() not in taken)

    def _write_index(self) -> None:
        names = {video["name"].lower() for video in self.written}
        kept = [video for video in self._earlier if video["name"].lower() not in names]
        index = {"format": _FORMAT, "videos": [*kept, *self.written]}
        write_bytes(self.folder / _INDEX, (json.dumps(index, indent=1) + "\n").encode())


def _look_into(folder: Path) -> list[dict[str, Any]]:
    """Videos of earlier predictions in the folder; refuses files of others, but for hidden ones, which stay."""
    earlier: list[dict[str, Any]] = []
    known: set[str] = set()
    no_index = (FileNotFoundError, ValueError, LookupError, TypeError, AttributeError, RecursionError)
    with contextlib.suppress(*no_index):
        index = json.loads((folder / _INDEX).read_bytes())
        if index["format"] == _FORMAT and all(isinstance(video["name"], str) for video in index["videos"]):
            known = {_INDEX, *(name.lower() for video in index["videos"] for name in video["files"])}
            earlier = index["videos"]
    foreign = [path for path in sorted(folder.iterdir()) if path.name[0] != "." and path.name.lower() not in known]
    foreign += [path for path in folder.glob(f"*{ENDINGS[-1]}/*") if not re.fullmatch(r"\d{5,}\.png", path.name)]
    got = f"{folder} holds {foreign[0].name if foreign else ''} and perhaps more"
    expected = "the folder of the predictions to be new, empty or one of earlier predictions"
    require(not foreign, expected, got, advice="Name another folder by --out, or by `out` of SlotPredictions.")
    return earlier


def _read(outputs: Any, clip: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
    """Labels (B, T, H, W) uint8, and masks (B, T, S, H, W) where there are any; `clip` is B and T."""
    forms = {"labels": "(B, T, H, W)", "masks": "(B, T, S, H, W)"}
    values = outputs if isinstance(outputs, Mapping) else {}
    found = {name: values[name] for name in forms if isinstance(values.get(name), Tensor)}
    got = sorted(map(str, values)) or type(outputs).__name__
    advice = "Return them, or name a prediction writer of your own in the configuration."
    require(bool(found), f"`predict_step` to return a dict with some of the tensors {forms}", got, advice=advice)
    for name, value in found.items():
        fits = value.ndim == len(forms[name].split()) and tuple(value.shape[:2]) == clip and value.numel() > 0
        require_shape(fits, f"`{name}` to be {forms[name]} with B, T = {clip} as in the batch", value)
    masks = found.get("masks")
    # `max` is many times faster than `argmax` over a middle axis.
    labels: Tensor = found["labels"] if masks is None or "labels" in found else masks.max(dim=2).indices
    least, most = int(labels.min()), max(int(labels.max()), 0 if masks is None else masks.shape[2])
    if labels.is_floating_point() or least < 0 or most > OUTSIDE:
        got = f"{labels.dtype} from {least} to {most}"
        raise ShapeError(
            f"Expected slots to be integers from 0 to {OUTSIDE}, but got {got}. Return one label per pixel."
        )
    return labels.to(torch.uint8), masks
