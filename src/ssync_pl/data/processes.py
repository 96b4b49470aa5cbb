"""Worker processes that behave: one thread each, and no longer alive than the process that started them."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import resource_tracker
from typing import Any

from ssync_pl.errors import ShardError

_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


def cpu_count() -> int:
    """Counts the CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def may_start_processes() -> bool:
    """Whether this process may have children: a daemon, such as a loader's worker, may not."""
    process = multiprocessing.current_process()
    if getattr(process, "_inheriting", False):
        raise RuntimeError(
            "Expected the main script to start processes only below `if __name__ == '__main__':`, but it does while a "
            "worker imports it. Add the guard, or pass num_workers=0."
        )
    return not process.daemon


@contextlib.contextmanager
def mapper(workers: int) -> Iterator[Callable[..., Iterator[Any]]]:
    """A `map` in other processes, which end with the first error or Ctrl-C; in this one with 0 workers."""
    if workers == 0 or not may_start_processes():
        yield map
        return
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")  # forking a process with threads (PyTorch, a logger) can hang
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, "1"))  # workers with more threads would fight for the same CPUs
    try:
        with ProcessPoolExecutor(workers, context, _end_with_parent) as pool:

            def apply(*given: Any) -> Iterator[Any]:
                with deaf_children():  # which are started here
                    return pool.map(*given)

            try:
                yield apply
            except BaseException:
                for worker in set(multiprocessing.active_children()) - others:
                    worker.terminate()  # what it is at may take minutes
                raise
    except BrokenProcessPool as error:
        raise ShardError(
            "Expected worker processes to live until all is done, but one was killed: memory ran out, or the main "
            "script lacks `if __name__ == '__main__':`. Run again with fewer workers: finished shards are kept."
        ) from error
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@contextlib.contextmanager
def deaf_children() -> Iterator[None]:
    """Lets processes that are started in the block leave Ctrl-C to this one, which hears it when the block is over."""
    resource_tracker.ensure_running()  # it would unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent() -> None:
    """Makes this worker end when its parent was killed."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
