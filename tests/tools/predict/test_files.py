"""Files of one video: tracks against a loop over pixels, label pictures, pieces against the whole."""

import numpy as np
import pytest
from PIL import Image

from ssync_pl.tools.predict.files import VideoFiles, slot_tracks
from ssync_pl.tools.viz import color_labels


def naive(frame, slot):
    """Area, centre and box of a slot, as numbers."""
    ys, xs = np.nonzero(frame == slot)
    if not len(ys):
        return [0.0]
    box = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
    return [len(ys) / frame.size, xs.mean() + 0.5, ys.mean() + 0.5, *box]


@pytest.mark.parametrize("seed", range(4))
def test_tracks_equal_a_loop_over_slots(seed):
    generator = np.random.default_rng(seed)
    labels = generator.choice(np.array([0, 1, 3, 255], np.uint8), (3, 7, 11), p=[0.5, 0.3, 0.1, 0.1])
    lines = slot_tracks(labels, 5).splitlines()
    assert lines[0] == "frame,slot,area,center_x,center_y,x0,y0,x1,y1"
    assert len(lines) == 1 + 3 * 5
    for place, line in enumerate(lines[1:]):
        frame, slot = divmod(place, 5)
        cells, wanted = line.split(","), naive(labels[frame], slot)
        assert len(cells) == 9
        assert (int(cells[0]), int(cells[1])) == (frame, slot)
        assert float(cells[2]) == pytest.approx(wanted[0], abs=1e-6)
        assert [float(cell) for cell in cells[3:] if cell] == pytest.approx(wanted[1:], abs=0.006)


def test_pieces_give_the_files_of_the_whole_and_nothing_of_an_earlier_run_stays(tmp_path):
    frames, labels = np.zeros((5, 6, 8, 3), np.uint8), np.random.default_rng(0).integers(0, 4, (5, 6, 8), np.uint8)
    labels[:, :, :2] = 255  # pixels that were not seen are no slot

    def write(name, ends):
        files = VideoFiles(tmp_path, name, 6)
        for first, end in zip([0, *ends], ends, strict=False):
            files.add(frames[first:end], labels[first:end], 6)
        return files.finish()

    for name, ends in (("whole", [5]), ("pieces", [2, 3, 5])):
        told = write(name, ends)
        assert (told["frames"], told["slots_used"]) == (5, 4)
        assert told["files"] == sorted(path.name for path in tmp_path.glob(f"{name}*"))
        assert np.array_equal(np.load(tmp_path / f"{name}.labels.npz")["labels"], labels)
        assert len(list((tmp_path / f"{name}_labels").glob("0000[0-4].png"))) == 5
    tracks = (tmp_path / "whole.tracks.csv").read_text()
    assert tracks == (tmp_path / "pieces.tracks.csv").read_text()
    assert sum(float(row.split(",")[2]) for row in tracks.splitlines()[1:]) == pytest.approx(5 * 6 / 8, abs=1e-4)
    with Image.open(tmp_path / "whole_labels" / "00000.png") as picture:  # in the colours of the overlay
        colours = color_labels(np.where(labels[0] == 255, -1, labels[0].astype(int)))
        assert np.array_equal(np.asarray(picture), labels[0])
        assert np.array_equal(np.asarray(picture.convert("RGB")), colours)
    write("whole", [2])
    assert len(list((tmp_path / "whole_labels").iterdir())) == 2
    assert not list(tmp_path.glob(".*"))
