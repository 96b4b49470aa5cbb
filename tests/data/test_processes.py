from __future__ import annotations

import multiprocessing
import os
import signal

import pytest

from ssync_pl.data.processes import end_with_parent, may_start_processes, one_thread_each


def test_a_daemon_may_not_have_children(monkeypatch: pytest.MonkeyPatch) -> None:
    assert may_start_processes()
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)
    assert not may_start_processes()


def test_a_worker_that_still_imports_the_main_script_is_told_of_the_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with pytest.raises(RuntimeError, match="below `if __name__ == '__main__':`"):
        may_start_processes()


def test_threads_are_limited_for_the_block_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    with one_thread_each():
        assert os.environ["OMP_NUM_THREADS"] == os.environ["MKL_NUM_THREADS"] == "1"
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert "MKL_NUM_THREADS" not in os.environ


def test_the_main_process_keeps_its_signals() -> None:
    before = signal.getsignal(signal.SIGINT)
    end_with_parent()
    assert signal.getsignal(signal.SIGINT) is before
