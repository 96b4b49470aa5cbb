"""Launches the runs of a comparison through submitit: on this machine, or as Slurm jobs.

A finished run is recognised by its record, `run.json`; what a killed run left is removed, and the run is made again.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ssync_pl.compare.job import run_job
from ssync_pl.compare.matrix import Matrix, Run
from ssync_pl.data.files import write_bytes
from ssync_pl.errors import ConfigError

__all__ = ["Failure", "Launcher", "check_folder", "is_finished", "log_lines", "prepare_sets", "run_all", "runs_at_once"]

_PAUSE = 0.2
_TAIL = 15
_CANCEL_SECONDS = 10.0
_LOCAL_HOURS, _SLURM_HOURS = 24.0 * 365, 24.0
_ALIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED")


@dataclass(frozen=True)
class Failure:
    """A run that did not finish, and the end of its log."""

    run: Run
    tail: str


@dataclass
class Launcher:
    """Where and how runs are started.

    `at_once` runs at a time (None: no limit) get `threads` CPU threads, `gpus` GPUs (None: all that are visible here)
    and `hours` (None: no limit here, 24 under Slurm); `options` go to Slurm.
    """

    folder: Path
    slurm: bool = False
    at_once: int | None = 1
    threads: int = 1
    gpus: int | None = None
    hours: float | None = None
    options: Mapping[str, str] = field(default_factory=dict)

    def submit(self, folder: Path, place: int = 0) -> Any:
        """Starts the job of a folder; `place` says which of the runs at a time it is, so that each has its own GPUs."""
        import submitit

        owner = "" if self.slurm else str(os.getpid())
        gpus = "" if self.slurm or self.gpus is None else ",".join(self._devices(place))
        executor = submitit.AutoExecutor(self.folder.resolve(), cluster="slurm" if self.slurm else "local")
        hours = self.hours or (_SLURM_HOURS if self.slurm else _LOCAL_HOURS)
        executor.update_parameters(timeout_min=max(1, round(60 * hours)))
        if self.slurm:
            executor.update_parameters(
                name="ssync_pl",
                tasks_per_node=self.gpus or 1,  # as Lightning expects: a task per device
                cpus_per_task=self.threads,
                slurm_additional_parameters=dict(self.options),
                **({"gpus_per_node": self.gpus} if self.gpus else {}),
            )
        job = executor.submit(run_job, str(folder.resolve()), str(self.threads), owner, gpus)
        if self.slurm:
            write_bytes(folder / "submitted.json", json.dumps({"id": job.job_id}).encode())
        return job

    def adopt(self, folder: Path) -> Any | None:
        """Finds the Slurm job that an earlier call left in the queue for a folder."""
        import submitit

        submitted = _read_json(folder / "submitted.json")
        if not self.slurm or not submitted:
            return None
        tasks = list(range(self.gpus or 1))
        job: Any = submitit.SlurmJob(folder=self.folder.resolve(), job_id=str(submitted["id"]), tasks=tasks)
        return job if str(job.get_info().get("State")).split()[0] in _ALIVE else None

    def _devices(self, place: int) -> list[str]:
        import torch

        named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        known = named.split(",") if named else [str(index) for index in range(torch.cuda.device_count())]
        first = place * (self.gpus or 0)
        return known[first : first + (self.gpus or 0)]


def runs_at_once(device: str, threads: int, gpus: int | None) -> int:
    """Returns how many runs have a GPU or CPUs of their own on this machine."""
    import torch

    if device != "cpu" and torch.cuda.is_available():
        return max(1, torch.cuda.device_count() // gpus) if gpus else 1
    # Containers give a process fewer CPUs than the machine has.
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cpus // threads)


def check_folder(matrix: Matrix) -> None:
    """Refuses a folder with anything but this comparison; more seeds, variants, slots or sets are welcome."""
    out = matrix.asked.out
    path = out / "matrix.json"
    kept = _read_json(path)
    if path.is_file() and not kept:
        raise ConfigError(f"Expected {path} to hold a comparison, but it is damaged. Remove it, or pass another --out.")
    if not kept and out.exists() and (not out.is_dir() or any(one.name != ".lock" for one in out.iterdir())):
        raise ConfigError(
            f"Expected {out} to be empty or to hold a comparison, but it holds other files. Pass another --out."
        )
    now = matrix.to_json()
    other = [name for name in ("config", "steps", "extra", "version") if kept and kept.get(name) != now[name]]
    if other:
        raise ConfigError(
            f"Expected {out} to be empty or to hold this comparison, but it holds one with another "
            f"{' and '.join(other)}. Pass another --out, or remove that folder."
        )


def is_finished(run: Run) -> bool:
    """Says whether the record of a run is there; refuses a folder with anything but this run."""
    for name in ("run.json", "job.json"):
        kept = _read_json(run.folder / name)
        recipe = kept.get("recipe", kept.get("facts", {}).get("recipe")) if kept else None
        if kept and recipe != run.recipe:
            raise ConfigError(
                f"Expected {run.folder} to be empty or to hold a run of this configuration, but it holds one of "
                f"another (recipe {recipe}, now {run.recipe}): files, steps, version or options differ. Pass another "
                "--out, or remove that folder."
            )
        if kept:
            return name == "run.json"
    if run.folder.is_dir() and any(run.folder.iterdir()):
        raise ConfigError(
            f"Expected {run.folder} to be empty or to hold a run of `ssync-pl compare`, but it holds other files. Pass "
            "another --out, or remove that folder."
        )
    return False


def prepare_sets(matrix: Matrix, runs: Sequence[Run], launcher: Launcher, say: Callable[[str], Any]) -> None:
    """Renders videos and stores features of the sets of some runs, one set after the other."""
    names = list(dict.fromkeys(run.set for run in runs))
    for place, name in enumerate(names, start=1):
        say(f"preparing data {place}/{len(names)}: {name}\n")
        folder = matrix.asked.out / "sets" / name
        command = [sys.executable, "-m", "ssync_pl.cli.prepare", *matrix.prepare[name]]
        _lay_out(folder, command, {})
        with _ending([launcher.submit(folder)]) as jobs:
            while not jobs[0].done():
                time.sleep(_PAUSE)
        if not (folder / "run.json").is_file():
            raise ConfigError(
                f"The data of set {name!r} could not be made. {folder / 'log.txt'} ends with:\n"
                f"{_log_tail(folder, jobs[0])}"
            )


def run_all(runs: Sequence[Run], launcher: Launcher, show: Callable[[int, int, list[Run]], None]) -> list[Failure]:
    """Makes all runs that are not finished; one that fails does not stop the others.

    Calls `show` with the numbers of finished and failed runs and the running ones, and returns what failed.
    """
    waiting = [run for run in runs if not is_finished(run)]
    running: dict[int, tuple[Run, Any]] = {}  # by place, which decides on GPUs
    failures: list[Failure] = []
    jobs: list[Any] = []
    with _ending(jobs):
        while waiting or running:
            later, now = {run.folder for run in waiting}, {run.folder for run, _ in running.values()}
            for run in list(waiting):
                if launcher.at_once is not None and len(running) >= launcher.at_once:
                    break
                if _waits(run, later, now):
                    continue
                waiting.remove(run)
                place = next(number for number in range(len(running) + 1) if number not in running)
                job = launcher.adopt(run.folder) or _launch(run, launcher, place)
                jobs.append(job)
                running[place] = (run, job)
            show(
                len(runs) - len(waiting) - len(running) - len(failures), len(failures), [r for r, _ in running.values()]
            )
            time.sleep(_PAUSE)
            for place, (run, job) in list(running.items()):
                if job.done():
                    del running[place]
                    if not (run.folder / "run.json").is_file():
                        failures.append(Failure(run, _log_tail(run.folder, job)))
    show(len(runs) - len(failures), len(failures), [])
    return failures


def log_lines(folder: Path) -> list[str]:
    """Returns the lines of a run's log, without colours and empty ones."""
    log = folder / "log.txt"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    return [re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", line).rstrip() for line in lines if line.strip()]


def _log_tail(folder: Path, job: Any) -> str:
    """The last lines of a run's log, or of its job's where the training did not start."""
    lines = log_lines(folder) or (job.stderr() or "").splitlines()
    return "\n".join(f"  {line}" for line in lines[-_TAIL:])


def _waits(run: Run, later: set[Path], now: set[Path]) -> bool:
    """Whether the checkpoint that a run starts from is still to come; one in a folder that is made again will go."""
    if run.checkpoint is None:
        return False
    source = run.checkpoint.parent.parent
    return source in later or (source in now and not run.checkpoint.is_file())


def _launch(run: Run, launcher: Launcher, place: int) -> Any:
    command, source = list(run.command), None
    if run.checkpoint is not None and run.checkpoint.is_file():
        command += ["--ckpt_path", str(run.checkpoint)]
        source = run.source
    names = ("set", "slots", "variant", "seed", "recipe")
    _lay_out(run.folder, command, {**{name: getattr(run, name) for name in names}, "source": source}, run.files)
    return launcher.submit(run.folder, place)


def _lay_out(
    folder: Path, command: Sequence[str], facts: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]] | None = None
) -> None:
    """Empties the folder of a run, once nothing is at work in it, and writes what its job reads."""
    import yaml
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=30):
            for path in folder.iterdir():
                if path.name != ".lock":
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            for name, content in (files or {}).items():
                plain = json.loads(json.dumps(content, default=str))
                write_bytes(folder / name, yaml.safe_dump(plain, sort_keys=False).encode())
            job: dict[str, Any] = {"command": list(command), "facts": facts}
            job["once"] = not facts  # also where a training has a task per GPU
            job["visible"] = os.environ.get("CUDA_VISIBLE_DEVICES")
            write_bytes(folder / "job.json", json.dumps(job, indent=1).encode())
    except Timeout as error:
        raise ConfigError(f"Expected {folder} to be free, but a training is at work in it. Wait for it.") from error


@contextlib.contextmanager
def _ending(jobs: list[Any]) -> Iterator[list[Any]]:
    """Ends jobs that still run when the block is left, also by SIGTERM."""

    def stop(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, stop) if main else None
    try:
        yield jobs
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)
        alive = [job for job in jobs if not job.done()]
        for job in alive:
            job.cancel(check=False)
        deadline = time.monotonic() + _CANCEL_SECONDS
        while any(not job.done() for job in alive) and time.monotonic() < deadline:
            time.sleep(_PAUSE)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
