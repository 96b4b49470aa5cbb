"""Files of one video: tracks against a loop over pixels, label pictures, pieces against the whole."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssync_pl.tools.predict.files import VideoFiles, encode_label_png, slot_tracks
from ssync_pl.tools.viz import color_labels

LABELS = np.random.default_rng(0).integers(0, 4, (5, 6, 8)).astype(np.uint8)
FRAMES = np.zeros((5, 6, 8, 3), np.uint8)


def naive(frame, slot):
    ys, xs = np.nonzero(frame == slot)
    if not len(ys):
        return 0.0, None, None
    return len(ys) / frame.size, (xs.mean() + 0.5, ys.mean() + 0.5), (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)


@pytest.mark.parametrize("seed", range(4))
def test_tracks_equal_a_loop_over_slots(seed):
    generator = np.random.default_rng(seed)
    labels = generator.choice(np.array([0, 1, 3, 255], np.uint8), (3, 7, 11), p=[0.5, 0.3, 0.1, 0.1])
    lines = slot_tracks(labels, 5).splitlines()
    assert lines[0] == "frame,slot,area,center_x,center_y,x0,y0,x1,y1"
    assert len(lines) == 1 + 3 * 5
    for place, line in enumerate(lines[1:]):
        frame, slot = divmod(place, 5)
        area, center, box = naive(labels[frame], slot)
        cells = line.split(",")
        assert (int(cells[0]), int(cells[1])) == (frame, slot)
        assert float(cells[2]) == pytest.approx(area, abs=1e-6)
        if center is None:
            assert cells[3:] == [""] * 6
        else:
            assert [float(cell) for cell in cells[3:5]] == pytest.approx(center, abs=0.006)
            assert tuple(int(cell) for cell in cells[5:]) == box


def test_label_pictures_hold_slots_in_the_colours_of_the_overlay(tmp_path: Path) -> None:
    labels = np.arange(20, dtype=np.uint8).reshape(4, 5)
    (tmp_path / "a.png").write_bytes(encode_label_png(labels))
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.mode == "P"
        assert np.array_equal(np.asarray(picture), labels)
        assert np.array_equal(np.asarray(picture.convert("RGB")), color_labels(labels.astype(int)))


def write(folder: Path, name: str, ends: list[int], labels: np.ndarray = LABELS, **options) -> int:
    files = VideoFiles(folder, name, "key", **{"fps": None, "label_pngs": True, "cell": 32, **options})
    for first, end in zip([0, *ends], ends, strict=False):
        files.add(FRAMES[first:end], labels[first:end], outside=True)
    return files.finish(num_slots=6)


def test_pieces_give_the_files_of_the_whole_and_nothing_of_an_earlier_run_stays(tmp_path: Path) -> None:
    labels = LABELS.copy()
    labels[:, :, :2] = 255  # pixels that were not seen are no slot
    for name, ends in (("whole", [5]), ("pieces", [2, 3, 5])):
        assert write(tmp_path, name, ends, labels) == 4
        assert np.array_equal(np.load(tmp_path / f"{name}.labels.npz")["labels"], labels)
        pictures = sorted((tmp_path / f"{name}_labels").iterdir())
        assert [path.name for path in pictures] == [f"{n:05d}.png" for n in range(5)]
    tracks = (tmp_path / "whole.tracks.csv").read_text()
    assert tracks == (tmp_path / "pieces.tracks.csv").read_text()
    assert sum(float(row.split(",")[2]) for row in tracks.splitlines()[1:]) == pytest.approx(5 * 6 / 8, abs=1e-4)
    write(tmp_path, "whole", [2])
    assert len(list((tmp_path / "whole_labels").iterdir())) == 2
    assert not list(tmp_path.glob(".*"))


def test_what_is_broken_off_leaves_nothing(tmp_path: Path) -> None:
    pytest.importorskip("av")
    files = VideoFiles(tmp_path, "a", "a", fps=6, label_pngs=True, cell=32)
    files.add(FRAMES, LABELS)
    assert [path.name[0] for path in tmp_path.iterdir()] == ["."]
    files.discard()
    assert not list(tmp_path.iterdir())
