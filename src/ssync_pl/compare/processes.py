"""Processes of runs: in sessions of their own, and gone when this process is."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["PIPE_VARIABLE", "child_environment", "end_processes", "start_process"]

PIPE_VARIABLE = "SSYNC_COMPARE_PIPE"
"""Asks a process to end when its standard input does: `ssync_pl.compare.keeping.die_with_parent`."""

_GRACE_SECONDS = 5.0


def child_environment(threads: int) -> dict[str, str]:
    """Environment of the processes.

    Args:
        threads: Threads of each.

    Returns:
        This process's environment with what differs.

    Example:
        >>> child_environment(1)["OMP_NUM_THREADS"]
        '1'
    """
    count = str(threads)
    return {**os.environ, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, PIPE_VARIABLE: "1"}


def start_process(
    command: Sequence[str], log: Any, environment: Mapping[str, str], handles: tuple[int, ...] = ()
) -> subprocess.Popen[bytes]:
    """Start a process that ends when this one does.

    Args:
        command: Its words.
        log: Open file that takes what it prints.
        environment: Of `child_environment`.
        handles: Handles of locks that it holds as well.

    Returns:
        The process.
    """
    # A session of its own, so that a child ends together with the workers that it started; and a pipe, whose end tells
    # it that this process is gone, even when that was killed.
    return subprocess.Popen(
        list(command),
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=dict(environment),
        start_new_session=True,
        pass_fds=handles if os.name == "posix" else (),
    )


def end_processes(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End processes and what they started: first politely, then not.

    Args:
        processes: Of `start_process`; those that ended already are left alone.

    Example:
        >>> end_processes([])
    """
    alive = [process for process in processes if process.poll() is None]
    for process in alive:
        _signal(process, signal.SIGTERM)
    deadline = time.monotonic() + _GRACE_SECONDS
    for process in alive:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
        _signal(process, getattr(signal, "SIGKILL", signal.SIGTERM))
        process.wait()


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
