"""`ssync-pl data convert` as a user sees it."""

from __future__ import annotations

import importlib.util
import pickle
from pathlib import Path

import pytest
from folder_sets import movi_features, write_movi, write_records

from ssync_pl.cli import main
from ssync_pl.data.convert import commands


def convert(source: str, root: Path, out: Path, *words: str) -> int:
    return main(["data", "convert", source, "--root", str(root), "--out", str(out), "--workers", "0", *words])


def test_the_bar_counts_videos_and_an_error_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_movi(tmp_path / "tfds", counts=(3,))
    assert convert("movi", tmp_path / "tfds", tmp_path / "out") == 0
    bar = capsys.readouterr().err
    assert "converting movi_c-train: 100%" in bar
    assert "3/3" in bar
    for root, message in ((tmp_path / "nowhere", "Expected --root to be a folder"), (tmp_path / "bad", "byte 0")):
        write_records(tmp_path / "bad" / "movi_c-train.tfrecord-00000-of-00001", [{}, movi_features(1)])
        assert convert("movi", root, tmp_path / "out2", "--no-progress") == 2
        error = capsys.readouterr().err
        assert error.startswith("ssync-pl: error: ")
        assert message in error
        assert error.count("\n") == 1


def test_help_lists_every_source(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "convert", "--help"]) == 0
    output = capsys.readouterr().out
    for name in ("movi", "ytvis2019", "ytvis2021", "davis", "videos"):
        assert name in output
        assert main(["data", "convert", name, "--help"]) == 0
        assert "--on-bad-sample" in capsys.readouterr().out


@pytest.mark.parametrize("kind", [commands.Movi, commands.Ytvis, commands.Davis, commands.Videos])
def test_workers_can_be_given_each_source(kind: type) -> None:
    source = commands._Mp4(kind(Path("root")))
    assert pickle.loads(pickle.dumps(source)) == source


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
    assert convert(source, tmp_path, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert f'pip install "ssync-pl[{extra}]"' in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
