"""The files of one predicted video, shown only when they are whole."""

from __future__ import annotations

import importlib.util
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

from ssync_pl.tools.predict.windows import OUTSIDE
from ssync_pl.tools.viz import overlay_labels, slot_colors

ENDINGS = (".mp4", ".labels.npz", ".tracks.csv", "_labels")  # of a video's files; the last one is a folder of pictures
_SIDE = 480  # longer side of a frame in the MP4, in pixels


def save_labels(path: Path, labels: NDArray[np.uint8]) -> None:
    """Saves labels (H, W) as an 8-bit palette PNG: index = slot, colour = that of the overlays, 255 is black."""
    palette = slot_colors(OUTSIDE + 1)
    palette[OUTSIDE] = 0
    picture = Image.fromarray(labels)
    picture.putpalette(palette.tobytes())
    picture.save(path)


def slot_tracks(labels: NDArray[Any], num_slots: int) -> str:
    """Measures where each slot is in each frame, as CSV.

    Pixel (row 0, column 0) reaches from 0 to 1 in both directions: a slot that fills a frame of width W has its centre
    at W / 2 and a box from 0 to W. The area is a share of all pixels; centre and box of an empty slot stay empty.
    Labels (T, H, W) from `num_slots` on belong to no slot.
    """
    _, height, width = labels.shape
    y, x = np.indices((height, width)).reshape(2, -1) + 0.5
    lines = ["frame,slot,area,center_x,center_y,x0,y0,x1,y1"]
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


def mp4_available() -> bool:
    """Whether PyAV, which writes the MP4 files, is installed."""
    return importlib.util.find_spec("av") is not None


class VideoFiles:
    """Takes the pieces of a video in order; `finish` writes its files, with an MP4 where PyAV is installed."""

    def __init__(self, folder: Path, name: str, fps: int) -> None:
        self.folder, self.name, self.slots = folder, name, 0
        self.pieces: list[NDArray[np.uint8]] = []
        self._fps, self._mp4 = fps, io.BytesIO()
        self._container: Any = None

    def add(self, frames: NDArray[np.uint8], labels: NDArray[np.uint8], num_slots: int) -> None:
        """Takes frames (T, H, W, 3) and labels (T, H, W) of them, of which 255 is no slot."""
        self.slots = max(self.slots, num_slots)
        self.pieces.append(labels)
        if not mp4_available():
            return
        import av

        height, width = (2 * max(1, round(_SIDE / 2 * side / max(labels.shape[1:]))) for side in labels.shape[1:])
        if self._container is None:
            self._container = av.open(self._mp4, mode="w", format="mp4")
            codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
            size = {"height": height, "width": 2 * width}
            self._stream: Any = self._container.add_stream(codec, rate=self._fps, pix_fmt="yuv420p", **size)
        for frame, one in zip(frames, labels, strict=True):
            shown = np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BOX))
            slots = overlay_labels(shown, np.where(one == OUTSIDE, -1, one.astype(np.int64)))
            picture = av.VideoFrame.from_ndarray(np.concatenate([shown, slots], axis=1), format="rgb24")
            self._container.mux(self._stream.encode(picture))

    def finish(self) -> dict[str, Any]:
        """Writes the files, in the place of those of an earlier prediction; returns what the index says of them."""
        labels = np.concatenate(self.pieces)
        with tempfile.TemporaryDirectory(prefix=".ssync_pl-", dir=self.folder) as hidden:
            start = Path(hidden, self.name)
            if self._container is not None:
                self._container.mux(self._stream.encode())
                self._container.close()
                Path(f"{start}.mp4").write_bytes(self._mp4.getvalue())
            np.savez_compressed(f"{start}.labels.npz", labels=labels)
            Path(f"{start}.tracks.csv").write_text(slot_tracks(labels, self.slots), encoding="utf-8")
            pictures = Path(f"{start}_labels")
            pictures.mkdir()
            for number, picture in enumerate(labels):
                save_labels(pictures / f"{number:05d}.png", picture)
            for earlier in (self.folder / f"{self.name}{ending}" for ending in ENDINGS):
                shutil.rmtree(earlier) if earlier.is_dir() else earlier.unlink(missing_ok=True)
            files = sorted(os.listdir(hidden))
            for name in files:
                os.replace(Path(hidden, name), self.folder / name)
        found = np.unique(labels)
        return {"frames": len(labels), "slots_used": len(found[found < self.slots]), "files": files}
