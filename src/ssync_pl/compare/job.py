"""What a launcher runs for each run: the training in a process group of its own, then its record.

Nothing here imports PyTorch, since this process only waits for the training.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import time
from datetime import date
from pathlib import Path

from ssync_pl.data.files import write_bytes

__all__ = ["run_job"]


def run_job(folder: str, threads: str, owner: str, gpus: str) -> None:
    """Trains one run in a process group of its own, and writes its record.

    The folder has `job.json`, with the command and the facts for the record. `owner` is the process of the comparison
    on this machine, with which the training ends; empty under Slurm. Empty `gpus` are those that the comparison sees.
    """
    import submitit
    from filelock import FileLock

    place = Path(folder)
    rank = submitit.JobEnvironment().global_rank
    job = json.loads((place / "job.json").read_text(encoding="utf-8"))
    if rank and job["once"]:
        return
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    if owner:  # submitit hides the GPUs of jobs that ask for none
        environment["CUDA_VISIBLE_DEVICES"] = gpus or job["visible"] or ""
        if not gpus and job["visible"] is None:
            del environment["CUDA_VISIBLE_DEVICES"]
    started = time.monotonic()
    with (
        FileLock(place / ".lock") if owner else contextlib.nullcontext(),
        open(place / ("log.txt" if rank == 0 else f"log_{rank}.txt"), "wb") as log,
    ):
        training = subprocess.Popen(
            job["command"], stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            while training.poll() is None and (not owner or _exists(int(owner))):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    training.wait(0.5)
        finally:
            with contextlib.suppress(ProcessLookupError):  # workers that the training started are in its group
                os.killpg(training.pid, signal.SIGKILL)
            training.wait()
        if training.returncode == 0 and rank == 0:
            facts = {**job["facts"], "wall_seconds": round(time.monotonic() - started, 1)}
            facts |= {"cpu_seconds": _cpu_seconds(), "date": date.today().isoformat(), "command": job["command"]}
            write_bytes(place / "run.json", json.dumps(facts, indent=1).encode())


def _exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return round(usage.ru_utime + usage.ru_stime, 1)
