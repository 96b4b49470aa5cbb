from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssync_pl.tools.predict.files import FileChoice, VideoFiles, encode_label_png
from ssync_pl.tools.viz import color_labels

LABELS = np.random.default_rng(0).integers(0, 4, (5, 6, 8)).astype(np.uint8)
FRAMES = np.zeros((5, 6, 8, 3), np.uint8)


def test_label_pictures_hold_slots_in_the_colours_of_the_overlay(tmp_path: Path) -> None:
    labels = np.arange(20, dtype=np.uint8).reshape(4, 5)
    (tmp_path / "a.png").write_bytes(encode_label_png(labels))
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.mode == "P"
        assert np.array_equal(np.asarray(picture), labels)
        assert np.array_equal(np.asarray(picture.convert("RGB")), color_labels(labels.astype(int)))


def test_pieces_give_the_files_of_the_whole(tmp_path: Path) -> None:
    choice = FileChoice(mp4=False, label_pngs=True, cell=32)
    for name, cuts in (("whole", [5]), ("pieces", [2, 3, 5])):
        files = VideoFiles(tmp_path, name, "key", 6, choice)
        first = 0
        for end in cuts:
            files.add(FRAMES[first:end], LABELS[first:end])
            first = end
        assert files.finish(num_slots=4) == 4
    for ending in ("tracks.csv", "labels.npz", "png"):
        assert (tmp_path / f"whole.{ending}").is_file()
        if ending != "labels.npz":
            assert (tmp_path / f"whole.{ending}").read_bytes() == (tmp_path / f"pieces.{ending}").read_bytes()
    for name in ("whole", "pieces"):
        assert np.array_equal(np.load(tmp_path / f"{name}.labels.npz")["labels"], LABELS)
        assert sorted(path.name for path in (tmp_path / f"{name}_labels").iterdir()) == [
            f"{n:05d}.png" for n in range(5)
        ]


def test_no_picture_of_an_earlier_run_stays(tmp_path: Path) -> None:
    for count in (5, 2):
        files = VideoFiles(tmp_path, "a", "a", 6, FileChoice(video=False, label_pngs=True))
        files.add(FRAMES[:count], LABELS[:count])
        files.finish()
    assert len(list((tmp_path / "a_labels").iterdir())) == 2
    assert not list(tmp_path.glob(".*"))


def test_what_is_broken_off_leaves_nothing(tmp_path: Path) -> None:
    pytest.importorskip("av")
    files = VideoFiles(tmp_path, "a", "a", 6, FileChoice(label_pngs=True, cell=32))
    files.add(FRAMES, LABELS)
    assert list(tmp_path.iterdir())  # under a temporary name
    files.discard()
    assert not list(tmp_path.iterdir())


def test_pixels_that_were_not_seen_are_no_slot(tmp_path: Path) -> None:
    labels = LABELS.copy()
    labels[:, :, :2] = 255
    files = VideoFiles(tmp_path, "a", "a", 6, FileChoice(video=False))
    files.add(FRAMES, labels, outside=True)
    assert files.finish(num_slots=6) == 4
    rows = (tmp_path / "a.tracks.csv").read_text().splitlines()[1:]
    assert len(rows) == 5 * 6
    assert sum(float(row.split(",")[2]) for row in rows) == pytest.approx(5 * 6 / 8, abs=1e-4)
