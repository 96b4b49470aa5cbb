"""The files of one predicted video, filled piece by piece and shown only when they are whole."""

from __future__ import annotations

import io
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from ssync_pl.data.video import Mp4Encoder
from ssync_pl.tools.predict.windows import OUTSIDE
from ssync_pl.tools.viz import SheetRow, draw_sheet, overlay_labels, slot_colors

__all__ = ["TEMPORARY", "TRACK_COLUMNS", "VideoFiles", "encode_label_png", "slot_tracks"]

TEMPORARY = ".ssync_pl-"
"""Beginning of the names of folders that hold what is not whole yet."""
TRACK_COLUMNS = ("frame", "slot", "area", "center_x", "center_y", "x0", "y0", "x1", "y1")


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
    Labels (T, H, W) from `num_slots` on belong to no slot.
    """
    _, height, width = labels.shape
    y, x = np.indices((height, width)).reshape(2, -1) + 0.5
    lines = [",".join(TRACK_COLUMNS)]
    for number, frame in enumerate(np.minimum(labels, num_slots).astype(np.int64)):  # one more label: no slot
        flat, size = frame.ravel(), num_slots + 1
        area = np.bincount(flat, minlength=size)
        middle = [np.bincount(flat, weights=at, minlength=size) / np.maximum(area, 1) for at in (x, y)]
        for slot, box in enumerate(ndimage.find_objects(frame + 1, max_label=num_slots)):
            where = ",,,,,"
            if box is not None:
                rows, columns = box
                corners = f"{columns.start},{rows.start},{columns.stop},{rows.stop}"
                where = f"{middle[0][slot]:.2f},{middle[1][slot]:.2f},{corners}"
            lines.append(f"{number},{slot},{area[slot] / (height * width):.6f},{where}")
    return "\n".join(lines) + "\n"


class VideoFiles:
    """Takes the pieces of a video in order, in a hidden folder; `finish` moves whole files to their places.

    `name` is what files are called before their endings; without `fps` there is no overlay video.
    """

    def __init__(self, folder: Path, name: str, key: str, *, fps: int | None, label_pngs: bool, cell: int) -> None:
        self.folder, self.name, self.key, self.label_pngs, self.cell = folder, name, key, label_pngs, cell
        self.frames = self.pieces = self.slots = 0
        self._labels: list[NDArray[np.uint8]] = []
        self._encoder = None if fps is None else Mp4Encoder(fps)
        self._hidden = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=folder))
        self._pictures = self._hidden / f"{name}_labels"

    @property
    def last(self) -> NDArray[np.uint8]:
        """Labels (H, W) of the last frame so far."""
        return self._labels[-1][-1]

    def add(self, frames: NDArray[np.uint8], labels: NDArray[np.uint8], outside: bool = False) -> None:
        """Takes frames (T, H, W, 3) and labels (T, h, w), of which 255 is no slot with `outside`."""
        slots = labels.astype(np.int64)
        if outside:
            slots[slots == OUTSIDE] = -1
        title = f"{self.key[-60:]}  |  slots used: {len(np.unique(slots[slots >= 0]))}"
        if self._encoder is not None:
            for frame, one in zip(frames, slots, strict=True):
                row = SheetRow("", np.stack([frame, overlay_labels(frame, one)]))
                sheet = draw_sheet([row], title=title, columns=["video", "slots"], cell=self.cell)
                self._encoder.add(sheet[None])
        if self.label_pngs:
            self._pictures.mkdir(exist_ok=True)
            for number, picture in enumerate(labels, self.frames):
                (self._pictures / f"{number:05d}.png").write_bytes(encode_label_png(picture))
        self._labels.append(labels)
        self.frames += len(labels)
        self.pieces += 1

    def finish(self, num_slots: int | None = None) -> int:
        """Writes the files; returns how many of the S slots win at least one pixel."""
        labels = np.concatenate(self._labels)
        count = num_slots if num_slots is not None else int(labels.max(initial=0)) + 1
        np.savez_compressed(self._hidden / f"{self.name}.labels.npz", labels=labels)
        (self._hidden / f"{self.name}.tracks.csv").write_text(slot_tracks(labels, count), encoding="utf-8")
        if self._encoder is not None and self.frames:
            (self._hidden / f"{self.name}.mp4").write_bytes(self._encoder.close())
        for path in self._hidden.iterdir():
            final = self.folder / path.name
            if final.is_dir():  # of an earlier prediction, as the writer has made sure
                shutil.rmtree(final)
            os.replace(path, final)
        self.discard()
        found = np.unique(labels)
        return len(found[found < count])

    def discard(self) -> None:
        """Leaves nothing behind of what is not finished."""
        shutil.rmtree(self._hidden, ignore_errors=True)
