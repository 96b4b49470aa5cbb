"""What a launcher runs for each run: the training, in a process group of its own.

Nothing here imports PyTorch, since this process only waits for the training.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from pathlib import Path

__all__ = ["run_job"]


def run_job(folder: str) -> None:
    """Runs what `job.json` of a folder says: `command` with `threads`, and `gpus` (null: all).

    `owner` is the process of the comparison on this machine, with which the training ends; null under Slurm.
    """
    import submitit
    from filelock import FileLock

    place = Path(folder)
    rank = submitit.JobEnvironment().global_rank
    job = json.loads((place / "job.json").read_text(encoding="utf-8"))
    owner = job["owner"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(job["threads"]), "MKL_NUM_THREADS": str(job["threads"])}
    if owner is not None:
        environment.pop("CUDA_VISIBLE_DEVICES", None)  # submitit hides the GPUs of jobs that ask for none
        environment |= {} if job["gpus"] is None else {"CUDA_VISIBLE_DEVICES": job["gpus"]}
    with (
        contextlib.nullcontext() if owner is None else FileLock(place / ".lock"),
        open(place / ("log.txt" if rank == 0 else f"log_{rank}.txt"), "wb") as log,
    ):
        training = subprocess.Popen(
            job["command"], stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            while training.poll() is None and (owner is None or _exists(owner)):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    training.wait(0.5)
        finally:
            with contextlib.suppress(ProcessLookupError):  # workers that the training started are in its group
                os.killpg(training.pid, signal.SIGKILL)
            training.wait()


def _exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
