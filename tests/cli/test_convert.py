from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

_RECORDS = Path(__file__).parents[1] / "data" / "convert"
if str(_RECORDS) not in sys.path:
    sys.path.append(str(_RECORDS))

from movi_records import write_movi  # noqa: E402

from ssync_pl.cli import main  # noqa: E402
from ssync_pl.data.index import read_index  # noqa: E402

_QUIET = ["--workers", "0", "--no-progress"]


def test_movi_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_movi(tmp_path / "tfds" / "movi_c" / "8x8" / "1.0.0", counts=(2, 3))
    write_movi(tmp_path / "tfds" / "movi_c" / "8x8" / "1.0.0", "validation", (1,))
    words = ["data", "convert", "movi", "--root", str(tmp_path / "tfds"), "--out", str(tmp_path / "out")]
    words += ["--splits", "train", "validation", "--samples-per-shard", "3", "--fields", "depth", *_QUIET]
    assert main(words) == 0
    output = capsys.readouterr()
    assert output.err == ""
    lines = output.out.splitlines()
    assert lines[0].startswith("movi_c-train: 5 videos, 15 frames, ")
    assert lines[0].endswith(" in 2 shards")
    assert lines[1] == f"  shards: {tmp_path}/out/movi_c-train-{{000000..000001}}.tar"
    assert lines[2].startswith("movi_c-validation: 1 video, 3 frames, ")
    index = read_index(tmp_path / "out")
    assert index is not None
    members = index.shards["movi_c-train-000001.tar"].samples[1].members
    assert sorted(members) == ["depth.npy", "info.json", "segmentations.npy.gz", "video.npy"]
    assert main(words) == 0
    assert "in 2 shards, of which 2 were there already" in capsys.readouterr().out


def test_the_bar_counts_videos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_movi(tmp_path / "tfds", counts=(3,))
    words = ["data", "convert", "movi", "--root", str(tmp_path / "tfds"), "--out", str(tmp_path / "out")]
    assert main([*words, "--workers", "0"]) == 0
    bar = capsys.readouterr().err
    assert "converting movi_c-train: 100%" in bar
    assert "3/3" in bar


def test_a_bad_video_is_one_line_or_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_movi(tmp_path / "tfds", counts=(3,))
    path = tmp_path / "tfds" / "movi_c-train.tfrecord-00000-of-00001"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    words = ["data", "convert", "movi", "--root", str(tmp_path / "tfds"), "--out", str(tmp_path / "out"), *_QUIET]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("ssync-pl: error: Expected the data of the record of ")
    assert error.count("\n") == 1
    assert main([*words, "--on-bad-sample", "skip"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("movi_c-train: 2 videos, 6 frames")
    assert lines[2] == "  skipped 1 video:"
    assert lines[3].startswith("    000000: Expected the data of the record of ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--root", "/nowhere"], "Expected --root to be a folder, but there is no /nowhere"),
        (["--root", ".", "--samples-per-shard", "0"], "Expected --samples-per-shard to be at least 1"),
        (["--root", ".", "--workers", "-2"], "Expected --workers to be 0 or more, but got -2"),
    ],
)
def test_wrong_options_are_one_line(
    tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "convert", "movi", "--out", str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_help_lists_every_source(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "convert", "--help"]) == 0
    output = capsys.readouterr().out
    for name in ("movi", "ytvis2019", "ytvis2021", "davis", "videos"):
        assert name in output
        assert main(["data", "convert", name, "--help"]) == 0
        assert "--on-bad-sample" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "missing", "extra"),
    [("movi", "tfrecord", "convert"), ("ytvis2021", "pycocotools", "convert"), ("videos", "av", "video")],
)
def test_each_command_says_which_extra_it_misses(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    source: str,
    missing: str,
    extra: str,
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == missing else real(name, *rest))
    (tmp_path / "a.mp4").write_bytes(b"x")
    assert main(["data", "convert", source, "--root", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert f'pip install "ssync-pl[{extra}]"' in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
