import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssync_pl.cli import main
from ssync_pl.data.shards import ShardWriter
from ssync_pl.tools.viz import SHEET, draw_preview, encode_png, slot_colors


def preview(paths: list[str], *counts: int) -> tuple[np.ndarray, int, list[str]]:
    png, videos, skipped = draw_preview(paths, *counts)
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")), videos, skipped


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    """Two shards, whose videos have other colours; the odd ones have masks."""
    with ShardWriter(tmp_path, "train", samples_per_shard=3) as writer:
        for key in range(6):
            members = {"video.npy": np.full((5, 16, 32, 3), (20 * key + 10, 0, 90), np.uint8)}
            if key % 2:
                masks = np.zeros((5, 16, 32, 1), np.uint8)
                masks[:, :, :8] = 3
                members["segmentations.npy"] = masks
            writer.write(str(key), members)
    return [str(path) for path in sorted(tmp_path.glob("*.tar"))]


def test_the_sheet_shows_each_frame_beside_its_masks(shards: list[str]) -> None:
    sheet, videos, skipped = preview(shards, 4, 3)
    assert (videos, skipped) == (4, [])
    reds = set(np.unique(sheet[(sheet[..., 1] == 0) & (sheet[..., 2] == 90)][:, 0]).tolist())
    assert reds == {10, 30, 70, 90}  # two of each shard
    places = np.argwhere((sheet == (30, 0, 90)).all(axis=2))
    assert len(places) > 3 * 56 * (112 + 70)  # proportions are kept, a quarter is under a mask
    blended = np.rint(0.45 * np.array([30, 0, 90]) + 0.55 * slot_colors(3)[2])
    assert (sheet == blended).all(axis=2).sum() >= 3 * 56 * 20


def test_the_command_names_damage_and_replaces_nothing(shards, tmp_path, capsys):
    with ShardWriter(tmp_path, "bad") as writer:
        writer.write("9", {"video.npy": np.zeros((5, 8, 8, 3), np.float32)})
    (tmp_path / "cut.tar").write_bytes(Path(shards[0]).read_bytes()[:900])
    out = tmp_path / "new" / "sheet.png"
    words = ["data", "preview", str(tmp_path / "*.tar"), "--out", str(out), "--frames", "2"]
    assert main([*words, "--videos", "4"]) == 0
    streams = capsys.readouterr()
    assert streams.out == f"{out} (videos: 4)\n"
    assert streams.err.count("left out: Expected") == 2
    size = Image.open(out).size
    assert main(words) == 0  # an earlier one of ours
    assert Image.open(out).size[1] > size[1]
    out.write_bytes(b"mine")
    assert main(words) == 2
    assert out.read_bytes() == b"mine"
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link.png").symlink_to(tmp_path / "nothing")
    (tmp_path / "sheet.png").write_bytes(encode_png(np.zeros((2, 2, 3), np.uint8), SHEET))
    for shard, name, more, message in (
        ("bad*.tar", "a.png", [], "key 9"),
        ("train*.tar", "a.jpg", [], "to end in .png"),
        ("train*.tar", "a.png", ["--videos", "0"], "--videos"),
        *(("train*.tar", f"{name}.png", [], "written by ssync_pl") for name in ("folder", "link", "sheet")),
    ):
        assert main(["data", "preview", str(tmp_path / shard), "--out", str(tmp_path / name), *more]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "a.png").exists()
