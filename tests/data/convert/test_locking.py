from __future__ import annotations

import errno
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from ssync_pl.data.convert import locking
from ssync_pl.data.convert.locking import exclusive


def test_waits_for_another_holder(tmp_path: Path) -> None:
    path, order = tmp_path / "lock", []
    held = threading.Event()

    def hold() -> None:
        with exclusive(path):
            held.set()
            time.sleep(0.2)
            order.append("first")

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    with exclusive(path, timeout=30):
        order.append("second")
    thread.join()
    assert order == ["first", "second"]
    assert not path.exists()


def test_many_threads_never_hold_it_together(tmp_path: Path) -> None:
    inside, most = [0], [0]

    def work() -> None:
        for _ in range(5):
            with exclusive(tmp_path / "lock", timeout=60):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(0.001)
                inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]


def test_a_leftover_file_is_no_lock(tmp_path: Path) -> None:
    (tmp_path / "lock").write_bytes(b"")
    with exclusive(tmp_path / "lock"):
        pass
    assert not (tmp_path / "lock").exists()


@pytest.mark.skipif(os.name == "nt", reason="replaces a module that Windows lacks")
def test_a_disk_without_locks_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import fcntl

    def refuse(*args: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with caplog.at_level(logging.WARNING, logger=locking.__name__), exclusive(tmp_path / "lock"):
        pass
    assert "has no locks" in caplog.text
