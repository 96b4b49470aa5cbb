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
from filelock import FileLock
from folder_sets import load_back

from ssync_pl.data.convert.writer import ConversionReport, Item, convert
from ssync_pl.data.index import read_index
from ssync_pl.errors import ConfigError, ShardError


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if not path.name.endswith(".lock")}


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in sorted(folder.glob("*.tar"))}


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    path = tmp_path / "bad.json"
    path.write_text("[1, 3, 4, 5]")
    return path


def test_shards_load_back_exactly_and_the_index_names_all_prefixes(tmp_path: Path) -> None:
    report = convert_jobs.run(tmp_path, count=7)
    assert [path.name for path in report.shards] == [f"colors-train-{number:06d}.tar" for number in range(3)]
    assert (report.videos, report.frames, report.kept, report.skipped) == (7, 14, 0, {})
    assert report.bytes == sum(path.stat().st_size for path in report.shards)
    for number, sample in enumerate(load_back(tmp_path, "colors-train")):
        expected = convert_jobs.members(number)
        assert sample.pop("key") == f"{number:06d}"
        assert sample.keys() == expected.keys()
        np.testing.assert_array_equal(sample["video.npy"], expected["video.npy"])
        np.testing.assert_array_equal(sample["segmentations.npy.gz"], expected["segmentations.npy.gz"])
    convert(convert_jobs.items(2), convert_jobs.paint, tmp_path, "colors-test", recipe={"a": (1, 2)}, progress=False)
    index = read_index(tmp_path)
    assert index is not None
    assert index.recipe == {
        "colors-train": {"source": "paint", "videos": 7, "samples_per_shard": 3, "skipped": {}},
        "colors-test": {"a": [1, 2], "videos": 2, "samples_per_shard": 32, "skipped": {}},
    }


def test_workers_change_no_byte(tmp_path: Path) -> None:
    alone, together = (convert_jobs.run(tmp_path / str(workers), workers=workers) for workers in (0, 2))
    assert contents(tmp_path / "0") == contents(tmp_path / "2")
    assert (alone.videos, alone.frames, alone.bytes) == (together.videos, together.frames, together.bytes)


def test_a_finished_conversion_is_recognised_by_its_record(tmp_path: Path) -> None:
    first = convert_jobs.run(tmp_path)
    before, seen = contents(tmp_path), stamps(tmp_path)
    second = convert_jobs.run(tmp_path, decode=convert_jobs.die)
    assert second == ConversionReport(first.shards, first.videos, 4, {}, first.frames, first.bytes)
    (tmp_path / "index.json").unlink()  # a lost index is written again from the shards
    assert convert_jobs.run(tmp_path, decode=convert_jobs.die).kept == 4
    assert (contents(tmp_path), stamps(tmp_path)) == (before, seen)


@pytest.mark.parametrize("how", ["truncated", "member", "missing"])
def test_a_shard_that_is_not_whole_is_made_again(tmp_path: Path, how: str) -> None:
    convert_jobs.run(tmp_path)
    before, seen = contents(tmp_path), stamps(tmp_path)
    path = tmp_path / "colors-train-000001.tar"
    data = bytearray(path.read_bytes())
    data[data.index(b"segmentations.npy.gz") + 512 + 30] ^= 0xFF  # inside of the compressed masks
    path.unlink()
    if how != "missing":
        path.write_bytes(data[:2000] if how == "truncated" else data)
    (tmp_path / "index.json").unlink()
    assert convert_jobs.run(tmp_path).kept == 3
    assert contents(tmp_path) == before
    after = stamps(tmp_path)
    assert all(after[name] == stamp for name, stamp in seen.items() if "000001" not in name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples_per_shard": 2}, "samples_per_shard 3, not 2"),
        ({"recipe": {"source": "paint", "size": 8}}, "size null, not 8"),
        ({"count": 11}, "12 videos, not 11"),
    ],
)
def test_what_is_not_of_this_conversion_is_left_alone(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    convert_jobs.run(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ShardError, match=message):
        convert_jobs.run(tmp_path, **options)
    assert contents(tmp_path) == before


def test_foreign_shards_and_records_are_refused(tmp_path: Path) -> None:
    convert_jobs.run(tmp_path, count=2)
    swapped = [Item("000000", {"color": 1}), Item("000001", {"color": 0})]
    record = tmp_path / ".colors-train.plan.json"
    text = record.read_bytes()
    same = {"recipe": {"source": "paint"}, "samples_per_shard": 3, "progress": False}
    with pytest.raises(ShardError, match="other source files"):
        convert(swapped, convert_jobs.paint, tmp_path, "colors-train", **same)
    record.write_text('{"format": "ssync_pl.conversion", "version": 9}')
    with pytest.raises(ShardError, match="version"):
        convert_jobs.run(tmp_path, count=2)
    record.unlink()
    with pytest.raises(ShardError, match="no record"):
        convert_jobs.run(tmp_path, count=2)
    # `colors` is the start of the other prefix, and none of its shards
    assert convert(convert_jobs.items(2), convert_jobs.paint, tmp_path, "colors", recipe={}, progress=False).videos == 2
    record.write_bytes(text)
    (tmp_path / "colors-train-000009.tar").write_bytes(b"mine")
    (tmp_path / "index.json").unlink()
    with pytest.raises(ShardError, match="000009"):
        convert_jobs.run(tmp_path, count=2)
    assert (tmp_path / "colors-train-000009.tar").read_bytes() == b"mine"


def test_a_record_without_shards_can_be_replaced(tmp_path: Path, bad: Path) -> None:
    bad.write_text("[0]")
    with pytest.raises(ShardError, match="colour 0"):
        convert_jobs.run(tmp_path / "out", decode=convert_jobs.PaintExcept(bad))
    assert convert_jobs.run(tmp_path / "out", samples_per_shard=4).videos == 12


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_left_out_named_and_tried_again(
    tmp_path: Path, bad: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    options: dict[str, Any] = {"decode": convert_jobs.PaintExcept(bad), "on_bad_sample": "skip", "workers": workers}
    with caplog.at_level(logging.WARNING):
        report = convert_jobs.run(out, **options)
    expected = {f"{n:06d}": f"Expected colour {n} to be good, but it is bad." for n in (1, 3, 4, 5)}
    assert (report.skipped, report.videos) == (expected, 8)
    # every video of the second shard is bad
    assert [path.name for path in report.shards] == [f"colors-train-{n:06d}.tar" for n in (0, 2, 3)]
    assert "Left out video 000003: Expected colour 3" in caplog.text
    index = read_index(out)
    assert index is not None
    assert index.recipe["colors-train"]["skipped"] == expected
    again = convert_jobs.run(out, **{**options, "decode": convert_jobs.die})
    assert (again.skipped, again.kept, again.videos) == (expected, 3, 8)
    seen = stamps(out)
    with pytest.raises(ShardError, match="colour 1"):
        convert_jobs.run(out, decode=options["decode"])
    assert stamps(out) == seen
    bad.write_text("[]")
    assert convert_jobs.run(out, decode=options["decode"]).kept == 2
    convert_jobs.run(tmp_path / "clean")
    assert contents(out) == contents(tmp_path / "clean")


def test_sources_that_cannot_be_read_are_bad_samples_but_mistakes_of_the_code_are_not(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="all 12 were skipped"):
        convert_jobs.run(tmp_path, decode=convert_jobs.missing_file, on_bad_sample="skip")
    with pytest.raises(ShardError, match="/nowhere/000000"):
        convert_jobs.run(tmp_path, decode=convert_jobs.missing_file)

    def mistaken(item: Item) -> dict[str, Any]:
        raise ZeroDivisionError("a mistake in the decoder")

    with pytest.raises(ZeroDivisionError):
        convert_jobs.run(tmp_path, decode=mistaken, on_bad_sample="skip")
    assert not list(tmp_path.glob("*.tar"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"video.npy": np.zeros((3, 8, 8, 3), np.uint8)}, "same frames"),
        ({"video.npy": np.zeros((2, 8, 8), np.uint8)}, "uint8"),
        ({"video.npy": np.zeros((2, 8, 8, 3), np.float32)}, "float32"),
        ({"video.npy": np.zeros((0, 8, 8, 3), np.uint8)}, "not empty"),
        ({"segmentations.npy.gz": np.zeros((2, 8, 9, 1), np.uint8)}, "same frames"),
        ({"segmentations.npy.gz": np.zeros((2, 8, 8), np.uint8)}, "objects"),
        ({"segmentations.npy.gz": np.zeros((2, 8, 8, 1))}, "integers"),
        ({"facts.npy": np.array([None])}, "numeric array"),
        ({"code.pkl": b""}, "execute code"),
    ],
)
def test_members_that_do_not_fit_are_bad_samples(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    def decode(item: Item) -> dict[str, Any]:
        return {**convert_jobs.members(1), **(change if item.key == "000000" else {})}

    with pytest.raises(ShardError, match=message):
        convert_jobs.run(tmp_path, decode=decode)
    assert not list(tmp_path.glob("*.tar"))
    assert list(convert_jobs.run(tmp_path, decode=decode, on_bad_sample="skip").skipped) == ["000000"]


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
        with pytest.raises(ShardError, match="free some space"):
            convert_jobs.run(out, on_bad_sample="skip")
    assert sorted(contents(out)) == [".colors-train.plan.json", "colors-train-000000.tar"]
    assert convert_jobs.run(out).kept == 1
    convert_jobs.run(tmp_path / "clean")
    assert contents(out) == contents(tmp_path / "clean")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ShardError, match="file/out"):
        convert_jobs.run(tmp_path / "file" / "out")


def test_a_worker_that_dies_is_named_and_the_folder_stays_usable(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="fewer workers"):
        convert_jobs.run(tmp_path, decode=convert_jobs.die, workers=1)
    assert convert_jobs.run(tmp_path).videos == 12
    assert not list(tmp_path.glob(".*.tmp"))


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    with FileLock(tmp_path / ".convert.lock"), pytest.raises(ShardError, match="only process"):
        convert_jobs.run(tmp_path)
    assert convert_jobs.run(tmp_path).videos == 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples_per_shard": 0}, "samples_per_shard"),
        ({"num_workers": -1}, "num_workers"),
        ({"on_bad_sample": "ignore"}, "ignore"),
        ({"items": []}, "at least one video"),
        ({"items": [Item("a.b", 0)]}, "keys of letters"),
        ({"items": [Item("0", 0), Item("0", 1)]}, "different keys"),
        ({"items": [Item("0", object())]}, "JSON"),
        ({"prefix": "a/b"}, "plain file name"),
        ({"prefix": ".a"}, "plain file name"),
    ],
)
def test_arguments_out_of_range_are_refused_before_anything_is_made(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    arguments = {"items": convert_jobs.items(1), "prefix": "a", "recipe": {}, **change}
    with pytest.raises(ConfigError, match=message):
        convert(arguments.pop("items"), convert_jobs.paint, tmp_path / "out", arguments.pop("prefix"), **arguments)
    assert not (tmp_path / "out").exists()


# -- processes that are killed or interrupted -------------------------------------------------------------------------


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    running: list[subprocess.Popen[bytes]] = []

    def start(out: Path, workers: int, hang: float = 600.0) -> subprocess.Popen[bytes]:
        here = Path(__file__).parent
        settings = {"CONVERT_JOBS_HANG_FROM": "6", "CONVERT_JOBS_HANG_SECONDS": str(hang)}
        paths = os.pathsep.join([str(here), os.environ.get("PYTHONPATH", "")])
        process = subprocess.Popen(
            [sys.executable, str(here / "convert_jobs.py"), str(out), str(workers)],
            env={**os.environ, "PYTHONPATH": paths, **settings},
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        running.append(process)
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
@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_goes_on_where_it_stopped(
    tmp_path: Path, start: Callable[..., subprocess.Popen[bytes]], workers: int
) -> None:
    out, clean = tmp_path / "out", tmp_path / "clean"
    process = start(out, workers)
    # a finished shard, and another one half-written
    wait_for(lambda: bool(list(out.glob("*.tar"))) and any(out.glob(".colors-train-*.tmp")))
    if workers == 0:
        with pytest.raises(ShardError, match="only process"):
            convert_jobs.run(out)
    process.kill()
    process.wait()
    wait_for(lambda: group_is_gone(process.pid))  # workers do not outlive it
    finished = stamps(out)
    assert 0 < len(finished) < 4
    assert not (out / "index.json").exists()
    assert convert_jobs.run(out).kept == len(finished)
    assert finished.items() <= stamps(out).items()
    convert_jobs.run(clean)
    assert contents(out) == contents(clean)


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_control_c_stops_the_workers_and_leaves_a_resumable_folder(
    tmp_path: Path, start: Callable[..., subprocess.Popen[bytes]]
) -> None:
    process = start(tmp_path, 2, hang=5.0)  # workers end the video that they are at
    wait_for(lambda: len(list(tmp_path.glob(".*.tmp"))) == 2)  # both workers are up
    wait_for(lambda: bool(list(tmp_path.glob("*.tar"))))
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert errors.count(b"KeyboardInterrupt") == 1  # the workers print nothing of their own
    wait_for(lambda: group_is_gone(process.pid))
    assert not list(tmp_path.glob(".*.tmp"))
    report = convert_jobs.run(tmp_path)
    assert (report.videos, report.kept > 0) == (12, True)
