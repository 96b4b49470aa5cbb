"""Launches the runs of a comparison through submitit: on this machine, or as Slurm jobs.

A finished run is recognised by its scores, `evaluation.json`; what a killed run left is removed, and the run is made
again. Nothing here imports PyTorch at the top, since jobs only wait for their training.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ssync_pl.compare.matrix import Matrix, Run
from ssync_pl.data.decode import parse_json
from ssync_pl.data.files import exclusive, refuse_foreign, write_bytes
from ssync_pl.data.processes import cpu_count
from ssync_pl.errors import ShardError, printable, require

_PAUSE = 0.2
_CANCEL_SECONDS = 10.0
_LOCAL_HOURS, _SLURM_HOURS = 24.0 * 365, 24.0
_ALIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED")
# What a run leaves in its folder beside job.json; all else is of the user, or of callbacks of theirs.
_LEFT = (
    *("submitted.json", "evaluation.json", "summary.json", "config.yaml", "hparams.yaml", "metrics.csv"),
    *("log.txt", "log_[0-9]*.txt", "pictures/step-*.png", "checkpoints/*.ckpt"),
)
_ADVICE = "Pass another --out, or remove that folder."


@dataclass(frozen=True)
class Launcher:
    """Where and how runs are started.

    `at_once` runs at a time (None: no limit) get `threads` CPU threads, `gpus` GPUs (None: all that are visible here)
    and `hours` (None: no limit here, 24 under Slurm); `options` go to Slurm.
    """

    folder: Path
    slurm: bool = False
    at_once: int | None = None
    threads: int = 1
    gpus: int | None = None
    hours: float | None = None
    options: Mapping[str, str] = field(default_factory=dict)

    def submit(self, run: Run, place: int) -> Any:
        """Starts a run; `place` says which of the runs at a time it is, so that each has its own GPUs."""
        import submitit

        shared = run.checkpoint is not None and run.checkpoint.is_file()
        job = {
            "recipe": run.recipe,
            "source": run.source if shared else None,
            "command": [*run.command, *(["--ckpt_path", str(run.checkpoint)] if shared else [])],
            "threads": self.threads,
            "gpus": self._devices(place),
            "owner": None if self.slurm else os.getpid(),
        }
        _lay_out(run, job)
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
        submitted = executor.submit(run_job, str(run.folder.resolve()))
        if self.slurm:
            write_bytes(run.folder / "submitted.json", json.dumps({"id": submitted.job_id}).encode())
        return submitted

    def adopt(self, run: Run) -> Any | None:
        """Finds the Slurm job that an earlier call left in the queue for a run."""
        import submitit

        submitted = _read_json(run.folder / "submitted.json")
        if not self.slurm or not submitted.get("id"):
            return None
        tasks = list(range(self.gpus or 1))
        job: Any = submitit.SlurmJob(folder=self.folder.resolve(), job_id=str(submitted["id"]), tasks=tasks)
        return job if str(job.get_info().get("State")).split()[0] in _ALIVE else None

    def _devices(self, place: int) -> str | None:
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        if self.gpus is None or self.slurm:
            return named
        import torch

        known = named.split(",") if named else [str(index) for index in range(torch.cuda.device_count())]
        return ",".join(known[place * self.gpus : (place + 1) * self.gpus])


def run_matrix(matrix: Matrix, launcher: Launcher, out: Path, command: Sequence[str]) -> None:
    """Makes the runs that are not in the folder yet, as many at a time as fit; one that fails does not stop the others.

    Refuses a folder that holds anything but this comparison; more seeds, variants or slots are welcome.
    """
    kept = _read_json(out / "matrix.json")
    empty = not out.exists() or (out.is_dir() and all(one.name == ".lock" for one in out.iterdir()))
    require(bool(kept) or empty, f"{out} to be empty or to hold a comparison", "other files", advice=_ADVICE)
    other = [name for name in ("config", "extra", "version") if kept and kept.get(name) != matrix.facts[name]]
    require(not other, f"{out} to hold this comparison", f"one with another {' and '.join(other)}", advice=_ADVICE)
    earlier_figures(out)
    for run in matrix.runs:
        is_finished(run)  # refuses what is no run, before anything is trained
    if launcher.at_once is None and not launcher.slurm:
        launcher = replace(launcher, at_once=_fitting(launcher))
    out.mkdir(parents=True, exist_ok=True)
    with exclusive(out / ".lock"):
        write_bytes(out / "matrix.json", json.dumps({**matrix.facts, "command": [*command]}, indent=1).encode())
        run_all(matrix.runs, launcher)


def earlier_figures(out: Path) -> list[Path]:
    """Returns the figures of an earlier report of a comparison; refuses files of others in the places of a report."""
    refuse_foreign(out / "results.csv", "slots,variant,seed,step,")
    refuse_foreign(out / "report" / "index.html", '"ssync_pl report"')
    pictures = (out / "report").glob("*.png")
    figures = [path for path in pictures if re.fullmatch(r"(paired|learning|merging)_\d+\.png", path.name)]
    for path in figures:
        refuse_foreign(path, "Software\0ssync_pl report")
    return figures


def _fitting(launcher: Launcher) -> int:
    import torch

    if torch.cuda.is_available():
        return max(1, torch.cuda.device_count() // launcher.gpus) if launcher.gpus else 1
    return max(1, cpu_count() // launcher.threads)


def is_finished(run: Run) -> bool:
    """Says whether the scores of a run are there; refuses a folder with anything but this run."""
    job = _read_json(run.folder / "job.json")
    there = run.folder.is_dir() and any(one.name != ".lock" for one in run.folder.iterdir())
    require(bool(job) or not there, f"{run.folder} to be empty or to hold a run", "other files", advice=_ADVICE)
    expected = f"{run.folder} to hold a run of this configuration, version and options (recipe {run.recipe})"
    recipe = job.get("recipe")
    require(not job or recipe == run.recipe, expected, f"one of another (recipe {recipe})", advice=_ADVICE)
    return (run.folder / "evaluation.json").is_file()


def run_all(runs: Sequence[Run], launcher: Launcher) -> None:
    """Makes all runs that are not finished; what a run that fails has to say stands in its `log.txt`."""
    from tqdm import tqdm

    waiting = [run for run in runs if not is_finished(run)]
    running: dict[int, tuple[Run, Any]] = {}  # by place, which decides on GPUs
    failed = 0
    jobs: list[Any] = []
    every = 0.5 if sys.stderr.isatty() else 30.0
    with _ending(jobs), tqdm(total=len(runs), desc="runs", mininterval=every, maxinterval=every) as bar:
        while waiting or running:
            for run in list(waiting):
                if launcher.at_once is not None and len(running) >= launcher.at_once:
                    break
                if not _may_start(run, runs, waiting, [one for one, _ in running.values()]):
                    continue
                waiting.remove(run)
                place = next(number for number in range(len(running) + 1) if number not in running)
                job = launcher.adopt(run) or launcher.submit(run, place)
                jobs.append(job)
                running[place] = (run, job)
            bar.set_postfix_str(f"{failed} failed, {len(running)} running", refresh=False)
            time.sleep(_PAUSE)
            for place, (run, job) in list(running.items()):
                if job.done():
                    del running[place]
                    if not is_finished(run):
                        failed += 1
                        if not log_lines(run.folder):  # the training did not start
                            write_bytes(run.folder / "log.txt", (job.stderr() or "").encode())
            bar.update(len(runs) - len(waiting) - len(running) - failed - bar.n)


def run_job(folder: str) -> None:
    """Runs the `command` of a `job.json` until it ends, or its `owner`, the comparison here (null under Slurm)."""
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
            with contextlib.suppress(ProcessLookupError):
                while training.poll() is None:
                    if owner is not None:
                        os.kill(owner, 0)  # asks whether it is there
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        training.wait(0.5)
        finally:
            with contextlib.suppress(ProcessLookupError):  # workers that the training started are in its group
                os.killpg(training.pid, signal.SIGKILL)
            training.wait()


def log_lines(folder: Path) -> list[str]:
    """Returns the lines of a run's log, without colours and empty ones."""
    log = folder / "log.txt"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    return [printable(re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", line).rstrip()) for line in lines if line.strip()]


def _may_start(run: Run, runs: Sequence[Run], waiting: Sequence[Run], running: Sequence[Run]) -> bool:
    """Whether the checkpoint that a run starts from and its data are there, or nobody makes them."""
    if run.checkpoint is not None:
        source = run.checkpoint.parent.parent
        if any(one.folder == source for one in waiting):  # what is in this folder will go
            return False
        if any(one.folder == source for one in running) and not run.checkpoint.is_file():
            return False
    # The first run makes the data, and writes its configuration when they are there.
    return not running or any((one.folder / "config.yaml").is_file() for one in runs)


def _lay_out(run: Run, job: Mapping[str, Any]) -> None:
    """Removes what an earlier run left in a folder, once nothing is at work in it, and writes what its job reads."""
    import yaml

    run.folder.mkdir(parents=True, exist_ok=True)
    with exclusive(run.folder / ".lock", timeout=30):
        for path in (path for pattern in _LEFT for path in run.folder.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        write_bytes(run.folder / "job.json", json.dumps(job, indent=1).encode())
        for name, content in run.files.items():
            plain = json.loads(json.dumps(content, default=str))
            write_bytes(run.folder / name, yaml.safe_dump(plain, sort_keys=False).encode())


@contextlib.contextmanager
def _ending(jobs: list[Any]) -> Iterator[None]:
    """Ends jobs that still run when the block is left, also by SIGTERM."""

    def stop(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, stop) if main else None
    try:
        yield
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
    with contextlib.suppress(OSError, ShardError):
        return dict(parse_json(path.read_bytes(), str(path), dict))
    return {}
