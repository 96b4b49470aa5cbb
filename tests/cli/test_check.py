import json
from pathlib import Path

import numpy as np
import pytest

from ssync_pl.cli import main
from ssync_pl.data.shards import ShardWriter


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for prefix, seeds in (("train", range(3)), ("validation", range(3, 5))):
        with ShardWriter(tmp_path, prefix, 2) as writer:
            for key, seed in enumerate(seeds):
                video = np.random.default_rng(seed).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
                writer.write(str(key), {"video.npy": video})
    return tmp_path


def test_a_clean_set_exits_with_0(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", str(folder / "*.tar")]) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[0] == "train"
    assert "validation\n  shards   1" in text
    assert text.splitlines()[-1] == "clean: 2 sets, 5 videos, every member decoded"


def test_problems_exit_with_1_and_are_all_listed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = folder / "train-000000.tar"
    shard.write_bytes(shard.read_bytes()[:1000])
    report = folder / "new" / "report.json"
    words = ["data", "check", str(folder / "train-{000000..000003}.tar"), "--json", str(report), "--workers", "0"]
    assert main(words) == 1
    text = capsys.readouterr().out
    assert "missing shards (2)" in text
    assert f"{folder / 'train-000003.tar'}: Expected the shard to exist" in text
    assert "damaged shards (1)" in text
    content = json.loads(report.read_text())
    assert content["clean"] is False
    assert [problem["kind"] for problem in content["problems"]] == ["missing", "missing", "shard"]
    assert content["sets"][0]["videos"] == 1


def test_quick_finds_no_leak_and_deep_does(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    video = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    with ShardWriter(folder / "test", "test") as writer:
        writer.write("9", {"video.npy": video})
    words = ["data", "check", str(folder / "train-*.tar"), str(folder / "test" / "*.tar")]
    assert main([*words, "--quick"]) == 0
    assert "--quick" in capsys.readouterr().out
    assert main(words) == 1
    assert "duplicate videos (1)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none-*.tar"], "matches none"),
        (["none.tar"], "does not"),
        (["a{.tar"], "braces"),
        (["pipe:cat a.tar"], "shell command"),
        (["*.tar", "--workers", "-2"], "`num_workers` to be at least 0"),
    ],
)
def test_wrong_usage_exits_with_2(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(folder)
    assert main(["data", "check", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_report_replaces_no_file_of_another_program(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = folder / "mine.json"
    mine.write_text('{"mine": 1}')
    words = ["data", "check", str(folder / "*.tar"), "--quick", "--workers", "0", "--json"]
    assert main([*words, str(mine)]) == 2
    assert "mine.json" in capsys.readouterr().err
    assert mine.read_text() == '{"mine": 1}'
    for _ in range(2):  # a report of ours is replaced
        assert main([*words, str(folder / "report.json")]) == 0
