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

from ssync_pl.data.files import write_bytes
from ssync_pl.data.video import Mp4Encoder
from ssync_pl.tools.predict.tracks import slot_tracks, tracks_csv
from ssync_pl.tools.predict.windows import OUTSIDE
from ssync_pl.tools.viz import SheetRow, compose_frames, draw_sheet, encode_png, overlay_labels, slot_colors

__all__ = ["FileChoice", "VideoFiles", "encode_label_png"]

_SHEET_FRAMES = 8


@dataclass(frozen=True)
class FileChoice:
    """Which files are written of a video.

    Args:
        video: The overlay video.
        mp4: Whether it is an MP4, which needs PyAV, or a PNG sheet of eight frames.
        masks: `labels`, `soft` or `none`; see `SlotPredictions`.
        label_pngs: A folder of label pictures.
        tracks: A CSV of areas, centres and boxes.
        cell: Longer side of a frame in the MP4 and the sheet, in pixels.

    Example:
        >>> FileChoice(label_pngs=True).masks
        'labels'
    """

    video: bool = True
    mp4: bool = True
    masks: Literal["labels", "none", "soft"] = "labels"
    label_pngs: bool = False
    tracks: bool = True
    cell: int = 224


def encode_label_png(labels: NDArray[np.uint8]) -> bytes:
    """Encode a label map as an 8-bit palette PNG: a pixel's index is its slot, its colour that of the overlays.

    Args:
        labels: uint8 (H, W). 255 (`OUTSIDE`) is black.

    Returns:
        The bytes of the file.

    Example:
        >>> data = encode_label_png(np.array([[0, 3]], np.uint8))
        >>> np.asarray(Image.open(io.BytesIO(data))).tolist()
        [[0, 3]]
    """
    picture = Image.fromarray(labels, mode="L")
    palette = slot_colors(256)
    palette[OUTSIDE] = 0
    picture.putpalette(palette.tobytes())
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


class VideoFiles:
    """Takes the pieces of a video in order, then writes its files, each under a temporary name first.

    Args:
        folder: Where they go.
        name: What they are called before their endings.
        key: Title of the overlay video.
        fps: Frames a second of the MP4.
        choice: Which files.

    Attributes:
        frames: Number of frames so far.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     files = VideoFiles(Path(folder), "a", "a", 6, FileChoice(video=False))
        ...     files.add(np.zeros((2, 4, 4, 3), np.uint8), np.zeros((2, 4, 4), np.uint8))
        ...     used = files.finish(num_slots=3)
        ...     used, sorted(path.name for path in Path(folder).iterdir())
        (1, ['a.labels.npz', 'a.tracks.csv'])
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
        """Take the next piece.

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
                self.folder.mkdir(parents=True, exist_ok=True)
                self._pictures = Path(tempfile.mkdtemp(prefix=f".{self.name}_labels-", dir=self.folder))
            for number, picture in enumerate(labels, self.frames):
                (self._pictures / f"{number:05d}.png").write_bytes(encode_label_png(picture))
        self._labels.append(labels)
        if self.choice.masks == "soft" and soft is not None:
            self._soft.append(soft)
        self.frames += len(labels)

    def finish(self, num_slots: int | None = None) -> int:
        """Write the files.

        Args:
            num_slots: S, for the tracks; None takes the largest label.

        Returns:
            Number of slots that win at least one pixel.
        """
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
            text = tracks_csv(slot_tracks(labels, count))
            write_bytes(self.folder / f"{self.name}.tracks.csv", text.encode())
        if self._pictures is not None:
            self._replace_pictures(self._pictures)
        if self._encoder is not None and self.frames:
            write_bytes(self.folder / f"{self.name}.mp4", self._encoder.close())
        elif self._sheet:
            write_bytes(self.folder / f"{self.name}.png", self._draw_sheet(len(slots)))
        return len(slots)

    def discard(self) -> None:
        """Leave nothing behind."""
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
            self._sheet += [
                (self.frames + int(at), frame, over)
                for at, frame, over in zip(picked, frames[picked], overlay, strict=True)
            ]
            return
        used = len(np.unique(slots[slots >= 0]))
        title = f"{self.key[-60:]}  |  slots used: {used}"
        step = 16  # overlays of large frames take much memory
        for first in range(0, len(frames), step):
            part = frames[first : first + step]
            overlay = overlay_labels(part, slots[first : first + step])
            grid = compose_frames(
                [[part, overlay]], columns=["video", "slots"], rows=[""], title=title, cell=self.choice.cell
            )
            self._encoder.add(grid)

    def _draw_sheet(self, used: int) -> bytes:
        chosen = np.unique(np.linspace(0, len(self._sheet) - 1, _SHEET_FRAMES).round().astype(int))
        picked = [self._sheet[at] for at in chosen]
        rows = [
            SheetRow("video", np.stack([frame for _, frame, _ in picked])),
            SheetRow("slots", np.stack([overlay for _, _, overlay in picked])),
        ]
        columns = [f"frame {number}" for number, _, _ in picked]
        title = f"{self.key[-60:]}  |  slots used: {used}"
        return encode_png(draw_sheet(rows, title=title, columns=columns, cell=self.choice.cell))

    def _replace_pictures(self, pictures: Path) -> None:
        final = self.folder / f"{self.name}_labels"
        os.chmod(pictures, 0o755)  # mkdtemp keeps others from reading
        if final.exists():  # of an earlier run into this folder, whose other files are replaced as well
            old = Path(tempfile.mkdtemp(prefix=f".{self.name}_labels-", dir=self.folder))
            os.replace(final, old)
            os.replace(pictures, final)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(pictures, final)
        self._pictures = None
