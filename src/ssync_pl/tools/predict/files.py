"""The files of one predicted video, filled piece by piece and shown only when they are whole."""

from __future__ import annotations

import io
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from ssync_pl.data.files import write_bytes
from ssync_pl.data.video import Mp4Encoder
from ssync_pl.errors import ShapeError
from ssync_pl.tools.predict.windows import OUTSIDE
from ssync_pl.tools.viz import SheetRow, compose_frames, draw_sheet, encode_png, overlay_labels, slot_colors

__all__ = ["TRACK_COLUMNS", "FileChoice", "VideoFiles", "encode_label_png", "slot_tracks"]

_SHEET_FRAMES = 8
TRACK_COLUMNS = ("frame", "slot", "area", "center_x", "center_y", "x0", "y0", "x1", "y1")


@dataclass(frozen=True)
class FileChoice:
    """Which files are written of a video; see `SlotPredictions`. Without `mp4` the overlay is a PNG sheet."""

    video: bool = True
    mp4: bool = True
    masks: Literal["labels", "none", "soft"] = "labels"
    label_pngs: bool = False
    tracks: bool = True
    cell: int = 224


def encode_label_png(labels: NDArray[np.uint8]) -> bytes:
    """Encodes labels (H, W) as an 8-bit palette PNG: index = slot, colour = that of the overlays, 255 is black."""
    picture = Image.fromarray(labels, mode="L")
    palette = slot_colors(256)
    palette[OUTSIDE] = 0
    picture.putpalette(palette.tobytes())
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def slot_tracks(labels: NDArray[Any], num_slots: int) -> str:
    """Measures where each slot is in each frame, as CSV with the columns `TRACK_COLUMNS`.

    Pixel (row 0, column 0) reaches from 0 to 1 in both directions: a slot that fills a frame of width W has its centre
    at W / 2 and a box from 0 to W. The area is a share of all pixels; centre and box of an empty slot stay empty.

    Args:
        labels: Integers (T, H, W) from 0 on; labels from `num_slots` on belong to no slot.
        num_slots: S, number of slots.

    Raises:
        ShapeError: The labels are no integers (T, H, W), or hold negative ones.
    """
    if labels.ndim != 3 or not np.issubdtype(labels.dtype, np.integer) or (labels.size and labels.min() < 0):
        raise ShapeError(f"Expected argument `labels` to be integers (T, H, W) from 0 on, but got {labels.shape}.")
    frames, height, width = labels.shape
    y, x = np.indices((height, width)).reshape(2, -1) + 0.5
    lines = [",".join(TRACK_COLUMNS)]
    for number in range(frames):
        frame = np.minimum(labels[number], num_slots).astype(np.int64)  # one further label for what is no slot
        flat, size = frame.ravel(), num_slots + 1
        area = np.bincount(flat, minlength=size)
        middle = [np.bincount(flat, weights=at, minlength=size) / np.maximum(area, 1) for at in (x, y)]
        boxes = ndimage.find_objects(frame + 1, max_label=num_slots)
        for slot, box in enumerate(boxes):
            where = ",,,,,"
            if box is not None:
                rows, columns = box
                corners = (columns.start, rows.start, columns.stop, rows.stop)
                where = ",".join([f"{middle[0][slot]:.2f}", f"{middle[1][slot]:.2f}", *map(str, corners)])
            lines.append(f"{number},{slot},{area[slot] / (height * width):.6f},{where}")
    return "\n".join(lines) + "\n"


class VideoFiles:
    """Takes the pieces of a video in order, then writes its files, each under a temporary name first.

    Args:
        folder: Where they go.
        name: What they are called before their endings.
        key: Title of the overlay video.
        fps: Frames per second of the MP4.
        choice: Which files.
    """

    def __init__(self, folder: Path, name: str, key: str, fps: int, choice: FileChoice) -> None:
        self.folder, self.name, self.key, self.choice = folder, name, key, choice
        self.frames = 0
        self._labels: list[NDArray[np.uint8]] = []
        self._soft: list[NDArray[np.float16]] = []
        self._encoder = Mp4Encoder(fps) if choice.video and choice.mp4 else None
        self._sheet: list[tuple[int, NDArray[np.uint8], NDArray[np.uint8]]] = []
        self._pictures: Path | None = None

    def add(
        self,
        frames: NDArray[np.uint8],
        labels: NDArray[np.uint8],
        soft: NDArray[np.float16] | None = None,
        outside: bool = False,
    ) -> None:
        """Takes the next piece.

        Args:
            frames: uint8 (T, H, W, 3).
            labels: uint8 (T, h, w).
            soft: float16 (T, S, h', w'), for `masks="soft"`.
            outside: Whether label 255 means pixels of no slot.
        """
        if self.choice.video and len(frames):
            self._show(frames, labels, outside)
        if self.choice.label_pngs:
            if self._pictures is None:
                self._pictures = Path(tempfile.mkdtemp(prefix=f".{self.name}_labels-", dir=self.folder))
            for number, picture in enumerate(labels, self.frames):
                (self._pictures / f"{number:05d}.png").write_bytes(encode_label_png(picture))
        self._labels.append(labels)
        if self.choice.masks == "soft" and soft is not None:
            self._soft.append(soft)
        self.frames += len(labels)

    def finish(self, num_slots: int | None = None) -> int:
        """Writes the files; returns how many of the S slots win at least one pixel."""
        labels = np.concatenate(self._labels)
        found = np.unique(labels)
        slots = found if num_slots is None else found[found < num_slots]
        if self.choice.masks != "none":
            arrays: dict[str, Any] = {"labels": labels}
            if self._soft:
                arrays["masks"] = np.concatenate(self._soft)
            buffer = io.BytesIO()
            np.savez_compressed(buffer, **arrays)
            write_bytes(self.folder / f"{self.name}.labels.npz", buffer.getvalue())
        if self.choice.tracks:
            count = num_slots if num_slots is not None else int(labels.max(initial=0)) + 1
            write_bytes(self.folder / f"{self.name}.tracks.csv", slot_tracks(labels, count).encode())
        if self._pictures is not None:
            final = self.folder / f"{self.name}_labels"
            os.chmod(self._pictures, 0o755)  # mkdtemp keeps others from reading
            if final.exists():  # of an earlier prediction, as the writer has made sure
                shutil.rmtree(final)
            os.replace(self._pictures, final)
            self._pictures = None
        if self._encoder is not None and self.frames:
            write_bytes(self.folder / f"{self.name}.mp4", self._encoder.close())
        elif self._sheet:
            write_bytes(self.folder / f"{self.name}.png", self._draw_sheet(len(slots)))
        return len(slots)

    def discard(self) -> None:
        """Leaves nothing behind of what is not finished."""
        if self._pictures is not None:
            shutil.rmtree(self._pictures, ignore_errors=True)
        if self._encoder is not None:
            self._encoder.discard()

    def _show(self, frames: NDArray[np.uint8], labels: NDArray[np.uint8], outside: bool) -> None:
        slots = labels.astype(np.int64)
        if outside:
            slots[slots == OUTSIDE] = -1
        if self._encoder is None:
            picked = np.unique(np.linspace(0, len(frames) - 1, _SHEET_FRAMES).round().astype(int))
            overlay = overlay_labels(frames[picked], slots[picked])
            self._sheet += zip((self.frames + picked).tolist(), frames[picked], overlay, strict=True)
            return
        title = f"{self.key[-60:]}  |  slots used: {len(np.unique(slots[slots >= 0]))}"
        step = 16  # overlays of large frames take much memory
        for first in range(0, len(frames), step):
            part = frames[first : first + step]
            panels = [[part, overlay_labels(part, slots[first : first + step])]]
            names = ["video", "slots"]
            self._encoder.add(compose_frames(panels, columns=names, rows=[""], title=title, cell=self.choice.cell))

    def _draw_sheet(self, used: int) -> bytes:
        chosen = np.unique(np.linspace(0, len(self._sheet) - 1, _SHEET_FRAMES).round().astype(int))
        numbers, frames, overlays = zip(*(self._sheet[at] for at in chosen), strict=True)
        rows = [SheetRow("video", np.stack(frames)), SheetRow("slots", np.stack(overlays))]
        title = f"{self.key[-60:]}  |  slots used: {used}"
        columns = [f"frame {number}" for number in numbers]
        return encode_png(draw_sheet(rows, title=title, columns=columns, cell=self.choice.cell))
