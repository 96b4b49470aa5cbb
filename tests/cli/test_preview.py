import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssync_pl.cli import main
from ssync_pl.data.shards import ShardWriter


@pytest.fixture
def pattern(tmp_path: Path) -> str:
    with ShardWriter(tmp_path, "train") as writer:
        for key in range(3):
            members = {"video.npy": np.full((5, 8, 8, 3), 20 * key, np.uint8)}
            if key == 1:
                members["segmentations.npy"] = np.ones((5, 8, 8, 1), np.uint8)
            writer.write(str(key), members)
    return str(tmp_path / "train-*.tar")


def test_a_sheet_is_written_once(pattern: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "sheet.png"
    words = ["data", "preview", pattern, "--out", str(out), "--frames", "3", "--cell", "32"]
    assert main([*words, "--videos", "2", "--first"]) == 0
    assert capsys.readouterr().out == f"2 videos: {out}\n"
    small = Image.open(out).size
    assert [path.name for path in out.parent.iterdir()] == ["sheet.png"]
    assert main(words) == 2
    assert "exists. Add --force" in capsys.readouterr().err
    assert Image.open(out).size == small
    assert main([*words, "--force"]) == 0
    assert Image.open(out).size[1] > small[1]


def test_an_mp4_as_well(pattern: str, tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    out = tmp_path / "sheet.png"
    assert main(["data", "preview", pattern, "--out", str(out), "--cell", "32", "--mp4"]) == 0
    with av.open(io.BytesIO(out.with_suffix(".mp4").read_bytes())) as container:
        assert sum(1 for _ in container.decode(video=0)) == 5


def test_mp4_without_pyav_is_refused_early(
    pattern: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import ssync_pl.data.video

    monkeypatch.setattr(ssync_pl.data.video, "mp4_available", lambda: False)
    out = tmp_path / "sheet.png"
    assert main(["data", "preview", pattern, "--out", str(out), "--mp4"]) == 2
    assert "pip install av" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "sheet.jpg"], "to end in .png"),
        (["--out", "sheet.png", "--videos", "0"], "--videos"),
        (["--out", "sheet.png", "--frames", "0"], "`frames` to be at least 1"),
        (["--out", "folder.png", "--force"], "exists"),
    ],
)
def test_wrong_usage(
    pattern: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    assert main(["data", "preview", pattern, *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "sheet.png").exists()


def test_damaged_videos_are_named(pattern: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ShardWriter(tmp_path, "train2") as writer:
        writer.write("9", {"video.npy": np.zeros((5, 8, 8, 3), np.float32)})
    assert main(["data", "preview", str(tmp_path / "*.tar"), "--out", str(tmp_path / "a.png"), "--cell", "16"]) == 0
    streams = capsys.readouterr()
    assert streams.out.startswith("3 videos")
    assert "left out: Expected" in streams.err
    assert "key 9" in streams.err
