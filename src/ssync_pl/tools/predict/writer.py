"""`SlotPredictions`: what the slots hold of each predicted video, as overlay videos and label files."""

import contextlib
import importlib.util
import io
import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from ssync_pl.data.files import exclusive, write_bytes
from ssync_pl.errors import ShapeError, require, require_shape
from ssync_pl.method import hard_labels, redundant_slots
from ssync_pl.plugin.callback import SSyncCallback
from ssync_pl.plugin.config import SSyncConfig
from ssync_pl.plugin.session import HostSession
from ssync_pl.tools.predict.windows import OUTSIDE, WINDOW_KEY, CarrySlots, Window, match_slots, restore_labels
from ssync_pl.tools.viz import overlay_labels, slot_colors, to_uint8

_INDEX = "index.json"
_FORMAT = "ssync_pl.predictions"
_ENDINGS = (".mp4", ".labels.npz", ".tracks.csv", "_labels")  # of a video's files; the last one is a folder of pictures
_HIDDEN = ".ssync_pl-"  # how folders of videos that are not whole yet begin
_SAME_LABELS = 0.8  # share of the patches at which labels and maps agree if they number slots alike
_SIDE = 480  # longer side of a frame in the MP4, in pixels


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
        merge: Overlap above which slots are redundant and share a label to the end of the video, in [0, 1]; their map
            is taken as by the run's `SSyncCallback`, or the host is recognised. None merges nothing.
    """

    def __init__(self, out: str | None = None, merge: float | None = None) -> None:
        super().__init__()
        require(merge is None or 0 <= merge <= 1, "argument `merge` to be an overlap in [0, 1]", merge)
        self.merge = merge
        self._session: HostSession | None = None
        self.out, self.folder = out, Path(out or "predictions")
        self.written: list[dict[str, Any]] = []
        self._earlier: list[dict[str, Any]] = []
        self._open: VideoFiles | None = None
        self._carry = CarrySlots(None)
        self._hidden, self._held = Path(), contextlib.ExitStack()

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuses a folder with files of others, and removes what a killed prediction left there."""
        log_dir = trainer.log_dir  # collective, so asked on each rank
        folder = Path(self.out) if self.out else Path(log_dir or trainer.default_root_dir) / "predictions"
        self.folder = folder if trainer.world_size == 1 else folder / f"rank{trainer.global_rank}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._held.enter_context(exclusive(self.folder / ".predict.lock"))
        self.written, self._earlier = [], _look_into(self.folder)
        for left in self.folder.glob(f"{_HIDDEN}*/"):
            shutil.rmtree(left, ignore_errors=True)
        hidden = tempfile.TemporaryDirectory(prefix=_HIDDEN, dir=self.folder)
        self._open, self._hidden = None, Path(self._held.enter_context(hidden))
        self._carry = CarrySlots(pl_module)
        self._held.callback(self._carry.close)
        if self.merge is not None:
            callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
            own = next((one for one in callbacks if isinstance(one, SSyncCallback)), None)
            self._session = HostSession(pl_module) if own is None else HostSession(pl_module, own.adapter, own.grid)
            self._held.callback(self._session.remove)
        if not mp4_available():
            rank_zero_warn("SlotPredictions writes no MP4: PyAV is missing. Run `pip install av`.")

    def on_predict_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *step: Any) -> None:
        """Hands the slots of a window to the next one of the same video."""
        window = step[0].get(WINDOW_KEY) if isinstance(step[0], Mapping) else None
        self._carry.next_window(window is not None and window.start > 0)
        if self._session is not None:
            self._session.open()

    def on_predict_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *step: Any) -> None:
        """Writes the videos of a batch."""
        outputs, batch, *_ = step
        video = batch.get("video") if isinstance(batch, Mapping) else None
        fits = isinstance(video, Tensor) and video.ndim == 5 and video.shape[2] == 3
        require_shape(fits, "batch key `video` to be (B, T, 3, H, W)", () if video is None else video)
        labels, masks = _read(outputs, tuple(batch["video"].shape[:2]))
        winners = None if self._session is None else self._redundant(self._session, batch, labels)
        whole = [(0, slice(None), batch[WINDOW_KEY])] if WINDOW_KEY in batch else None
        for row, frames, window in whole or self._rows(batch, getattr(trainer, "datamodule", None)):
            one = None if winners is None else winners[row].numpy()
            self._add(window, labels[row][frames], None if masks is None else masks[row][frames], one)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the index, which is there already unless no video was whole."""
        if self._open is not None:  # `limit_predict_batches` stopped in the middle of a video
            rank_zero_warn(f"SlotPredictions writes nothing of {self._open.name}: the prediction ended before it.")
        self._write_index()
        self._held.close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leaves the host as it was, and no half files."""
        self._held.close()

    def _redundant(self, session: HostSession, batch: Any, labels: Tensor) -> Tensor:
        """Winners (B, S) of slots whose numbers are those of the labels; refuses hosts that number them anew."""
        maps = session.collect(batch, SSyncConfig())
        seen = hard_labels(maps.masks)
        grid: Any = maps.grid
        given = F.interpolate(labels.float(), size=grid, mode="nearest-exact").flatten(2).to(seen.device)
        same = maps.shape[:2] == labels.shape[:2] and float((given == seen).float().mean()) > _SAME_LABELS
        advice = "Predict without `merge`."
        name = type(session.host).__name__
        require(same, f"labels of {name} to number slots as its maps do for `merge`", "others", advice=advice)
        assert self.merge is not None
        winners = redundant_slots(maps, self.merge).cpu()
        session.close()
        return winners

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

    def _add(self, window: Window, labels: Tensor, masks: Tensor | None, winners: NDArray[Any] | None) -> None:
        frames = window.frames
        if window.start == 0:
            rate = max(1, round(window.rate or 6))
            self._open = VideoFiles(self.folder, self._hidden, self._name(window.key), rate)
        files = self._open
        if files is None:
            return
        # Where the largest mask is the label, masks give smoother outlines.
        smooth = masks is not None and torch.equal(masks.max(dim=1).indices, labels.long())
        shown = restore_labels(masks if masks is not None and smooth else labels, frames.shape[1:3], window.region)
        used = int(np.max(shown, where=shown < OUTSIDE, initial=0)) + 1
        slots = max(files.slots, used if masks is None else max(used, masks.shape[1]))
        tracked = np.arange(OUTSIDE + 1, dtype=np.uint8)
        if window.start:  # its first frame is the last one of the window before
            tracked[:slots] = match_slots(files.last, shown[0], slots)
            frames, shown = frames[1:], tracked[shown][1:]
        if winners is not None:
            found, winners = winners, np.arange(slots)
            winners[tracked[: len(found)]] = tracked[found]
        files.add(frames, shown, slots, winners)
        if window.last:
            line = {"key": window.key, "name": files.name, "source": window.source, "windows": files.windows}
            self.written.append(line | files.finish())
            self._write_index()  # first, so that a killed run leaves no file that the next one does not know
            files.show()
            self._open = None

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


def slot_tracks(labels: NDArray[Any], num_slots: int) -> str:
    """Measures where each slot is in each frame of labels (T, H, W), as CSV; labels from `num_slots` on are none."""
    _, height, width = labels.shape
    y, x = np.indices((height, width)).reshape(2, -1) + 0.5
    lines = ["frame,slot,area,center_x,center_y,x0,y0,x1,y1"]
    for number, pixels in enumerate(labels):
        frame, size = np.minimum(pixels, num_slots).astype(np.int64), num_slots + 1  # one more label: no slot
        flat = frame.ravel()
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


def share_labels(table: NDArray[np.uint8], winners: NDArray[Any], sizes: NDArray[Any]) -> NDArray[np.uint8]:
    """Joins slots that are redundant in a window with those that share a label already; once joined, always joined.

    `table` (256,) is the label of each slot, `winners` (S,) whose label each takes now, `sizes` (256,) are the labels'
    pixels so far: the largest label of a group stays, so that tracks go on.
    """
    count, slots = len(winners), np.arange(len(winners))
    links = (np.ones(2 * count), (np.tile(slots, 2), np.concatenate([winners, table[:count]])))
    _, group = connected_components(coo_matrix(links, (count, count)), directed=False)
    order = np.lexsort((slots, -sizes[:count], group))
    largest = order[np.unique(group[order], return_index=True)[1]]
    joined = table.copy()
    joined[:count] = largest[group]
    return joined


class VideoFiles:
    """Keeps the pieces of a video in a hidden folder; `finish` makes its files there, `show` moves them out."""

    def __init__(self, folder: Path, hidden: Path, name: str, fps: int) -> None:
        self.folder, self.name, self.slots, self.windows = folder, name, 0, 0
        self.last = np.zeros((0, 0), np.uint8)  # labels of the last frame, before slots are merged
        self._table = np.arange(OUTSIDE + 1, dtype=np.uint8)  # label of each slot
        self._sizes = np.zeros(OUTSIDE + 1, np.int64)  # pixels of each label
        self._hidden, self._raw, self._frames = hidden, hidden / "labels.raw", 0
        self._used = np.zeros(OUTSIDE + 1, bool)
        self._fps, self._mp4 = fps, io.BytesIO()
        self._container: Any = None

    def add(self, frames: NDArray[Any], labels: NDArray[np.uint8], num_slots: int, winners: Any = None) -> None:
        """Takes frames (T, H, W, 3), labels (T, H, W) of them, of which 255 is no slot, and whose label slots take."""
        self.last = labels[-1].copy()
        if winners is not None:
            sizes = self._sizes if self.windows else np.bincount(labels.ravel(), minlength=OUTSIDE + 1)
            self._table = share_labels(self._table, winners, sizes)
            labels = self._table[labels]
            self._sizes += np.bincount(labels.ravel(), minlength=OUTSIDE + 1)
        with open(self._raw, "ab" if self.windows else "wb") as stream:  # long videos do not fit into memory
            stream.write(np.ascontiguousarray(labels).data)
        self.slots, self.windows = max(self.slots, num_slots), self.windows + 1
        self._frames += len(labels)
        self._used[np.unique(labels)] = True
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
        """Writes the files, removes those of an earlier prediction, and returns what the index says of them."""
        labels = np.memmap(self._raw, np.uint8, "r", shape=(self._frames, *self.last.shape))
        start = self._hidden / self.name
        if self._container is not None:
            self._container.mux(self._stream.encode())
            self._container.close()
            Path(f"{start}.mp4").write_bytes(self._mp4.getvalue())
        np.savez_compressed(f"{start}.labels.npz", labels=labels)  # in blocks
        Path(f"{start}.tracks.csv").write_text(slot_tracks(labels, self.slots), encoding="utf-8")
        pictures = Path(f"{start}_labels")
        pictures.mkdir()
        palette = slot_colors(OUTSIDE + 1)  # the colours of the overlays
        palette[OUTSIDE] = 0
        for number, slots in enumerate(labels):  # 8-bit palette PNG: index = slot
            picture = Image.fromarray(slots)
            picture.putpalette(palette.tobytes())
            picture.save(pictures / f"{number:05d}.png")
        del labels
        self._raw.unlink()
        for earlier in (self.folder / f"{self.name}{ending}" for ending in _ENDINGS):
            shutil.rmtree(earlier) if earlier.is_dir() else earlier.unlink(missing_ok=True)
        files = sorted(self._hidden.iterdir())
        sizes = {path.name: path.stat().st_size for path in files if path.is_file()}
        merged = int((self._table != np.arange(OUTSIDE + 1)).sum())
        used = int(self._used[: self.slots].sum())
        told = {"frames": self._frames, "slots_used": used, "slots_merged": merged, "bytes": sizes}
        return told | {"files": [path.name for path in files]}

    def show(self) -> None:
        """Moves the files into the folder of the predictions."""
        for path in self._hidden.iterdir():
            os.replace(path, self.folder / path.name)


def _look_into(folder: Path) -> list[dict[str, Any]]:
    """Videos of earlier predictions in the folder; refuses files of others, but for hidden ones, which stay."""
    earlier: list[dict[str, Any]] = []
    known: dict[str, tuple[int, Any]] = {}  # lower names of files → frames of the video, bytes
    no_index = (FileNotFoundError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)
    with contextlib.suppress(*no_index):
        index = json.loads((folder / _INDEX).read_bytes())
        if index["format"] == _FORMAT and all(isinstance(video["name"], str) for video in index["videos"]):
            for video in index["videos"]:
                sizes = video.get("bytes", {})
                known |= {name.lower(): (int(video["frames"]), sizes.get(name)) for name in video["files"]}
            earlier, known[_INDEX] = index["videos"], (0, None)
    shown = [path for path in sorted(folder.iterdir()) if path.name[0] != "."]
    foreign = [path for path in shown if not _is_ours(path, *known.get(path.name.lower(), (-1, None)))]
    got = f"{folder} holds {foreign[0].name if foreign else ''} and perhaps more"
    expected = "the folder of the predictions to be new, empty or one of earlier predictions"
    require(not foreign, expected, got, advice="Name another folder by --out, or by `out` of SlotPredictions.")
    return earlier


def _is_ours(path: Path, frames: int, size: Any) -> bool:
    """Whether there is a file of this size, or a folder of the pictures of so many frames and no others."""
    pictures = path.name.endswith(_ENDINGS[-1])
    if frames < 0 or path.is_symlink() or path.is_dir() != pictures:
        return False
    if pictures:
        return all(re.fullmatch(r"\d{5,}\.png", one.name) and int(one.stem) < frames for one in path.iterdir())
    return size in (None, path.stat().st_size)


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
