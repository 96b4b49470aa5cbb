"""One process a shard."""

import os
import subprocess
import sys

import pytest

from ssync_pl.data.features.claim import claim


def test_a_second_claim_gets_nothing(tmp_path):
    with claim(tmp_path / "a.tar") as first:
        with claim(tmp_path / "a.tar") as second:
            assert second is None
        first.stream.write(b"whole")
        first.finish()
    assert (tmp_path / "a.tar").read_bytes() == b"whole"
    assert os.listdir(tmp_path) == ["a.tar"]


def test_an_unfinished_file_is_removed(tmp_path):
    def fail():
        with claim(tmp_path / "a.tar") as mine:
            mine.stream.write(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert os.listdir(tmp_path) == []


def test_a_finished_shard_is_never_emptied_by_a_late_claim(tmp_path, monkeypatch):
    """The owner renames the file after a second process opened it and before that one locks it."""
    from ssync_pl.data.features import claim as module

    owner = claim(tmp_path / "a.tar")
    mine = owner.__enter__()
    mine.stream.write(b"whole")
    lock = module._lock

    def late(stream):
        mine.finish()
        owner.__exit__(None, None, None)
        return lock(stream)

    monkeypatch.setattr(module, "_lock", late)
    with claim(tmp_path / "a.tar") as second:
        assert second is None
    assert (tmp_path / "a.tar").read_bytes() == b"whole"
    assert os.listdir(tmp_path) == ["a.tar"]


_DIE = """
import os, pathlib, sys
from ssync_pl.data.features.claim import claim
with claim(pathlib.Path(sys.argv[1])) as mine:
    mine.stream.write(b"half")
    mine.stream.flush()
    os._exit(9)
"""


def test_what_a_killed_process_left_is_taken_over(tmp_path):
    result = subprocess.run([sys.executable, "-c", _DIE, str(tmp_path / "a.tar")], check=False)
    assert result.returncode == 9
    assert (tmp_path / ".a.tar.tmp").read_bytes() == b"half"
    with claim(tmp_path / "a.tar") as mine:
        mine.stream.write(b"whole")
        mine.finish()
    assert (tmp_path / "a.tar").read_bytes() == b"whole"
