"""Conversions that finish, stop, are killed, meet bad samples and foreign files."""

from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import convert_jobs
import numpy as np
import pytest
from folder_sets import contents, load_back

from ssync_pl.data.convert.writer import convert
from ssync_pl.data.index import read_index
from ssync_pl.errors import ConfigError, ShardError

RECORD = ".colors-train.plan.json"


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in sorted(folder.glob("*.tar"))}


def test_shards_load_back_exactly_and_the_index_names_all_prefixes(tmp_path: Path) -> None:
    report = convert_jobs.run(tmp_path, count=7)
    assert [shard.name for shard in report.shards] == [f"colors-train-{number:06d}.tar" for number in range(3)]
    assert [sample.frames for sample in report.samples] == [2] * 7
    assert (report.kept, report.skipped) == (0, {})
    for number, sample in enumerate(load_back(tmp_path, "colors-train")):
        expected = {"key": f"{number:06d}", **convert_jobs.members(number)}
        assert sample.keys() == expected.keys()
        assert all(np.array_equal(sample[name], expected[name]) for name in expected)
    convert(convert_jobs.sources(2), convert_jobs.paint, tmp_path, "colors-test", recipe={"a": (1, 2)}, progress=False)
    index = read_index(tmp_path)
    assert index is not None
    assert index.recipe == {
        "colors-train": {"source": "paint", "videos": 7, "samples_per_shard": 3, "skipped": {}},
        "colors-test": {"a": [1, 2], "videos": 2, "samples_per_shard": 32, "skipped": {}},
    }


@pytest.mark.parametrize("how", ["finished", "truncated", "missing", "index"])
def test_finished_shards_are_kept_and_others_are_made_again(tmp_path: Path, how: str) -> None:
    convert_jobs.run(tmp_path)
    before, seen = contents(tmp_path), stamps(tmp_path)
    path = tmp_path / "colors-train-000001.tar"
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:2000])
    elif how != "finished":
        (path if how == "missing" else tmp_path / "index.json").unlink()
    damaged = how in ("truncated", "missing")
    decode = convert_jobs.paint if damaged else convert_jobs.die
    assert convert_jobs.run(tmp_path, decode=decode).kept == 4 - damaged
    assert contents(tmp_path) == before
    assert all(stamps(tmp_path)[name] == stamp for name, stamp in seen.items() if not damaged or "000001" not in name)


def test_foreign_shards_records_and_files_are_refused(tmp_path: Path) -> None:
    convert_jobs.run(tmp_path, count=2)
    before = contents(tmp_path)
    for options, message in (
        ({"samples_per_shard": 2}, "samples_per_shard 3, not 2"),
        ({"recipe": {"source": "paint", "size": 8}}, "size null, not 8"),
        ({"count": 1}, "videos 2, not 1"),
        ({"count": 0}, "at least one video"),
    ):
        with pytest.raises((ShardError, ConfigError), match=message):
            convert_jobs.run(tmp_path, **{"count": 2, **options})
        assert contents(tmp_path) == before
    swapped = [{"color": 1}, {"color": 0}]
    record = tmp_path / RECORD
    text = record.read_bytes()
    same = {"recipe": {"source": "paint"}, "samples_per_shard": 3, "progress": False}
    with pytest.raises(ShardError, match="sources"):
        convert(swapped, convert_jobs.paint, tmp_path, "colors-train", **same)
    for foreign in ('{"format": "ssync_pl.conversion", "version": 9}', '{"plan": []}', "{}", "[]", "text"):
        record.write_text(foreign)
        with pytest.raises(ShardError, match=r"plan\.json to be the record.*--prefix"):
            convert_jobs.run(tmp_path, count=2)
        assert record.read_text() == foreign
    record.unlink()
    with pytest.raises(ShardError, match="no record"):
        convert_jobs.run(tmp_path, count=2)
    # `colors` is the start of the other prefix, and none of its shards
    assert (
        len(convert(convert_jobs.sources(2), convert_jobs.paint, tmp_path, "colors", recipe={}, progress=False).samples)
        == 2
    )
    record.write_bytes(text)
    (tmp_path / "colors-train-000009.tar").write_bytes(b"mine")
    with pytest.raises(ShardError, match="000009"):
        convert_jobs.run(tmp_path, count=2)
    assert (tmp_path / "colors-train-000009.tar").read_bytes() == b"mine"
    for out in (record, record / "out"):
        with pytest.raises(ShardError, match="choose another folder"):
            convert_jobs.run(out)


def test_bad_samples_are_left_out_named_and_tried_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out, bad = tmp_path / "out", tmp_path / "bad.json"
    bad.write_text("[1, 3, 4, 5]")
    options: dict[str, Any] = {"decode": convert_jobs.PaintExcept(bad), "on_bad_sample": "skip"}
    with caplog.at_level(logging.WARNING):
        report = convert_jobs.run(out, workers=2, **options)
    expected = {f"{n:06d}": f"Expected colour {n} to be good, but it is bad." for n in (1, 3, 4, 5)}
    assert (report.skipped, len(report.samples)) == (expected, 8)
    # every video of the second shard is bad
    assert [shard.name for shard in report.shards] == [f"colors-train-{n:06d}.tar" for n in (0, 2, 3)]
    assert "Left out video 000003: Expected colour 3" in caplog.text
    index = read_index(out)
    assert index is not None
    assert index.recipe["colors-train"]["skipped"] == expected
    again = convert_jobs.run(out, **options)
    assert (again.skipped, again.kept, len(again.samples)) == (expected, 3, 8)
    seen = stamps(out)
    bad.write_text("[0, 1, 2, 3, 4, 5]")  # sources that went away take no finished video with them
    assert len(convert_jobs.run(out, **options).samples) == 8
    with pytest.raises(ShardError, match="colour 0"):
        convert_jobs.run(out, decode=options["decode"])
    assert stamps(out) == seen
    bad.write_text("[]")
    assert convert_jobs.run(out, decode=options["decode"]).kept == 2
    convert_jobs.run(tmp_path / "clean")
    assert contents(out) == contents(tmp_path / "clean")


def test_sources_that_cannot_be_read_are_bad_samples_but_mistakes_of_the_code_are_not(tmp_path: Path) -> None:
    def missing_file(source: Any) -> dict[str, Any]:
        return {"video.npy": Path("/nowhere", str(source["color"])).read_bytes()}

    def refused(source: Any) -> dict[str, Any]:
        raise ShardError("Expected better.")

    def mistaken(source: Any) -> dict[str, Any]:
        raise ZeroDivisionError("a mistake in the decoder")

    def executable(source: Any) -> dict[str, Any]:
        return {"code.pkl": b""}

    for decode, options, error, message in (
        (refused, {"on_bad_sample": "skip"}, ShardError, "12 bad ones"),
        (missing_file, {"on_bad_sample": "skip"}, ShardError, "/nowhere/0"),
        (executable, {}, ShardError, "execute code"),
        (mistaken, {"on_bad_sample": "skip"}, ZeroDivisionError, "mistake"),
    ):
        with pytest.raises(error, match=message):
            convert_jobs.run(tmp_path, decode=decode, **options)
    assert not list(tmp_path.glob("*.tar"))
    assert len(convert_jobs.run(tmp_path, samples_per_shard=4).samples) == 12  # a record without shards is replaced


def test_a_full_disk_loses_nothing_and_leaves_nothing_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    real, written = tarfile.TarFile.addfile, []

    def addfile(self: tarfile.TarFile, info: tarfile.TarInfo, stream: Any = None) -> None:
        written.append(info.name)
        if len(written) > 14:  # in the second sample of the second shard
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, info, stream)

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "addfile", addfile)
        with pytest.raises(ShardError, match="make room"):
            convert_jobs.run(out, on_bad_sample="skip")
    assert sorted(contents(out)) == [RECORD, "colors-train-000000.tar"]
    assert convert_jobs.run(out).kept == 1
    convert_jobs.run(tmp_path / "clean")
    assert contents(out) == contents(tmp_path / "clean")


def test_a_worker_that_dies_is_named(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="fewer workers"):
        convert_jobs.run(tmp_path, decode=convert_jobs.die, workers=1)
    assert len(convert_jobs.run(tmp_path).samples) == 12
    assert not list(tmp_path.glob(".*.tmp"))


# -- processes that are killed or interrupted -------------------------------------------------------------------------


@pytest.fixture
def start() -> Iterator[Callable[[Path], subprocess.Popen[bytes]]]:
    running: list[subprocess.Popen[bytes]] = []

    def start(out: Path) -> subprocess.Popen[bytes]:
        here = Path(__file__).parent
        paths = os.pathsep.join([str(here), os.environ.get("PYTHONPATH", "")])
        process = subprocess.Popen(
            [sys.executable, str(here / "convert_jobs.py"), str(out), "2"],
            env={**os.environ, "PYTHONPATH": paths, "CONVERT_JOBS_HANG_FROM": "6"},
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        running.append(process)
        # finished shards, and others half-written
        wait_for(lambda: len(list(out.glob("*.tar"))) == 2 and len(list(out.glob(".*.tmp"))) == 2)
        return process

    yield start
    for process in running:
        if process.poll() is None:
            process.kill()
        process.communicate()


def wait_for(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def group_is_gone(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_run_goes_on_where_it_was(
    tmp_path: Path, start: Callable[[Path], subprocess.Popen[bytes]], sign: signal.Signals
) -> None:
    out = tmp_path / "out"
    process = start(out)
    with pytest.raises(ShardError, match="another process"):
        convert_jobs.run(out)
    finished = stamps(out)
    if sign is signal.SIGINT:
        os.killpg(process.pid, sign)
        _, errors = process.communicate(timeout=60)
        assert errors.count(b"KeyboardInterrupt") == 1  # the workers print nothing of their own
        assert not list(out.glob(".*.tmp"))
    else:
        process.kill()
        process.wait()
    wait_for(lambda: group_is_gone(process.pid))  # workers do not outlive it
    assert not (out / "index.json").exists()
    assert convert_jobs.run(out).kept == 2
    assert finished.items() <= stamps(out).items()
    convert_jobs.run(tmp_path / "clean")
    assert contents(out) == contents(tmp_path / "clean")
