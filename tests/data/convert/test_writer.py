import errno
import logging
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import convert_jobs
import numpy as np
import pytest
from convert_jobs import PaintExcept, die, members, run
from folder_sets import contents, load_back

from ssync_pl.data.index import read_index
from ssync_pl.errors import ConfigError, ShardError

RECORD = ".colors-train.plan.json"


def stamps(folder):
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in sorted(folder.glob("*.tar"))}


def test_shards_load_back_exactly_and_the_index_names_all_prefixes(tmp_path):
    report = run(tmp_path, range(7))
    assert [shard.name for shard in report.shards] == [f"colors-train-{number:06d}.tar" for number in range(3)]
    assert (report.videos, report.kept, report.skipped) == (7, 0, {})
    for number, sample in enumerate(load_back(tmp_path)["colors-train"]):
        expected = {"key": f"{number:06d}", **members(number)}
        assert sample.keys() == expected.keys()
        assert all(np.array_equal(sample[name], expected[name]) for name in expected)
    run(tmp_path, range(2), "colors-test", recipe={"a": (1, 2)})
    assert read_index(tmp_path).recipe == {
        "colors-train": {"source": "paint", "videos": 7, "samples_per_shard": 3, "skipped": {}},
        "colors-test": {"a": [1, 2], "videos": 2, "samples_per_shard": 3, "skipped": {}},
    }


@pytest.mark.parametrize("how", ["finished", "truncated", "missing", "index"])
def test_finished_shards_are_kept_and_others_are_made_again(tmp_path, how):
    run(tmp_path)
    before, seen = contents(tmp_path), stamps(tmp_path)
    path = tmp_path / "colors-train-000001.tar"
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:2000])
    elif how != "finished":
        (path if how == "missing" else tmp_path / "index.json").unlink()
    damaged = how in ("truncated", "missing")
    assert run(tmp_path, decode=convert_jobs.paint if damaged else die).kept == 4 - damaged
    assert contents(tmp_path) == before
    assert all(stamps(tmp_path)[name] == stamp for name, stamp in seen.items() if not damaged or "000001" not in name)


def test_foreign_shards_records_and_files_are_refused(tmp_path):
    run(tmp_path, range(2))
    before, record = contents(tmp_path), tmp_path / RECORD
    for options, message in (
        ({"samples_per_shard": 2}, "samples_per_shard 3, not 2"),
        ({"recipe": {"source": "paint", "size": 8}}, "size null, not 8"),
        ({"colors": range(1)}, "videos 2, not 1"),
        ({"colors": [1, 0]}, "sources"),
        ({"colors": []}, "at least one video"),
    ):
        with pytest.raises((ShardError, ConfigError), match=message):
            run(tmp_path, **{"colors": range(2), **options})
        assert contents(tmp_path) == before
    head = '{"format": "ssync_pl.conversion", "version": '
    for foreign in (head + "9}", head + "2}", head + '2, "settings": []}', '{"plan": []}', "{}", "[]", "text"):
        record.write_text(foreign)
        with pytest.raises(ShardError, match=r"plan\.json to be the record.*--prefix"):
            run(tmp_path, range(2))
        assert record.read_text() == foreign
    record.unlink()
    with pytest.raises(ShardError, match="no record"):
        run(tmp_path, range(2))
    # `colors` is the start of the other prefix, and none of its shards
    assert run(tmp_path, range(2), "colors").videos == 2
    record.write_bytes(before[RECORD])
    for name in ("colors-train-000009.tar", "colors-train-000000.tar", ".convert.lock"):
        (tmp_path / name).write_bytes(b"mine")
        with pytest.raises(ShardError, match=name):
            run(tmp_path, range(2))
        assert (tmp_path / name).read_bytes() == b"mine"
        (tmp_path / name).unlink()
    (tmp_path / "colors-train-000000.tar").symlink_to(tmp_path / "a disk that is not mounted")
    with pytest.raises(ShardError, match="000000"):
        run(tmp_path, range(2))
    for out in (record, record / "out"):
        with pytest.raises(ShardError, match="choose another folder"):
            run(out)


def test_bad_samples_are_left_out_named_and_tried_again(tmp_path, caplog):
    out, bad = tmp_path / "out", tmp_path / "bad.json"
    bad.write_text("[1, 3, 4, 5]")
    options = {"decode": PaintExcept(bad), "on_bad_sample": "skip"}
    with caplog.at_level(logging.WARNING):
        report = run(out, workers=2, **options)
    expected = {f"{n:06d}": f"Expected colour {n} to be good, but it is bad." for n in (1, 3, 4, 5)}
    assert (report.skipped, report.videos) == (expected, 8)
    # every video of the second shard is bad
    assert [shard.name for shard in report.shards] == [f"colors-train-{n:06d}.tar" for n in (0, 2, 3)]
    assert "Left out video 000003: Expected colour 3" in caplog.text
    assert read_index(out).recipe["colors-train"]["skipped"] == expected
    again = run(out, **options)
    assert (again.skipped, again.kept, again.videos) == (expected, 3, 8)
    seen = stamps(out)
    bad.write_text("[0, 1, 2, 3, 4, 5]")  # sources that went away take no finished video with them
    assert run(out, **options).videos == 8
    with pytest.raises(ShardError, match="colour 0"):
        run(out, decode=PaintExcept(bad))
    assert stamps(out) == seen
    bad.write_text("[]")
    assert run(out, decode=PaintExcept(bad)).kept == 2
    run(tmp_path / "clean")
    assert contents(out) == contents(tmp_path / "clean")


def test_a_set_without_a_good_video_and_mistakes_of_the_code_leave_nothing(tmp_path):
    def mistaken(color):
        raise ZeroDivisionError("a mistake in the decoder")

    (tmp_path / "bad.json").write_text(str([*range(12)]))
    for decode, error, message in (
        (PaintExcept(tmp_path / "bad.json"), ShardError, "12 bad ones, the first because: .*colour 0"),
        (lambda color: {"code.pkl": b""}, ShardError, "execute code"),
        (mistaken, ZeroDivisionError, "mistake"),
    ):
        with pytest.raises(error, match=message):
            run(tmp_path, decode=decode, on_bad_sample="skip")
    assert not list(tmp_path.glob("*.tar"))
    assert run(tmp_path, samples_per_shard=4).videos == 12  # a record without shards is replaced


def test_a_full_disk_loses_nothing_and_leaves_nothing_half(tmp_path, monkeypatch):
    out, real, written = tmp_path / "out", tarfile.TarFile.addfile, []

    def addfile(self, info, stream=None):
        written.append(info.name)
        if len(written) > 14:  # in the second sample of the second shard
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, info, stream)

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "addfile", addfile)
        with pytest.raises(ShardError, match="make room"):
            run(out, on_bad_sample="skip")
    assert sorted(contents(out)) == [RECORD, "colors-train-000000.tar"]
    assert run(out).kept == 1
    run(tmp_path / "clean")
    assert contents(out) == contents(tmp_path / "clean")


def test_a_worker_that_dies_is_named(tmp_path):
    with pytest.raises(ShardError, match="fewer workers"):
        run(tmp_path, decode=die, workers=1)
    assert run(tmp_path).videos == 12
    assert not list(tmp_path.glob(".*.tmp"))


def wait_for(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def group_is_gone(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_run_goes_on_where_it_was(tmp_path, sign):
    out, here = tmp_path / "out", Path(convert_jobs.__file__).parent
    paths = os.pathsep.join([str(here), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, str(here / "convert_jobs.py"), str(out)],
        env={**os.environ, "PYTHONPATH": paths, "CONVERT_JOBS_HANG_FROM": "4"},
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        # a finished shard, and another half-written
        wait_for(lambda: len(list(out.glob("*.tar"))) == 1 and list(out.glob(".*000001.*.tmp")))
        with pytest.raises(ShardError, match="another process"):
            run(out)
        finished = stamps(out)
        if sign is signal.SIGINT:
            os.killpg(process.pid, sign)
            _, errors = process.communicate(timeout=60)
            assert errors.count(b"KeyboardInterrupt") == 1  # the worker prints nothing of its own
            assert not list(out.glob(".*.tmp"))
    finally:
        process.kill()
        process.communicate()
    wait_for(lambda: group_is_gone(process.pid))  # workers do not outlive it
    assert not (out / "index.json").exists()
    assert run(out).kept == 1
    assert finished.items() <= stamps(out).items()
    run(tmp_path / "clean")
    assert contents(out) == contents(tmp_path / "clean")
