"""Runs the trainings of a comparison, some at a time, each in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from ssync_pl.compare.curves import complete_curve, set_curve_aside
from ssync_pl.compare.matrix import Matrix, Run
from ssync_pl.compare.processes import child_environment, end_processes, start_process
from ssync_pl.compare.sharing import shared_steps, take_over
from ssync_pl.data.convert.locking import exclusive
from ssync_pl.data.files import write_bytes
from ssync_pl.errors import ConfigError

__all__ = ["Failure", "is_finished", "prepare_sets", "run_all"]

_PAUSE = 0.2
_TAIL = 15
# A process whose parent was killed ends as soon as its imports are done.
_ORPHAN_SECONDS = 60.0


@dataclass(frozen=True)
class Failure:
    """A run that failed.

    Args:
        run: The run.
        reason: What happened.
        tail: Last lines of its log.

    Example:
        >>> Failure.__dataclass_fields__.keys()
        dict_keys(['run', 'reason', 'tail'])
    """

    run: Run
    reason: str
    tail: str


@dataclass
class _Child:
    run: Run
    process: subprocess.Popen[bytes]
    locks: contextlib.ExitStack
    started: float
    share: float  # of its steps that were done when it started
    cpu: float = 0.0
    progress: dict[str, Any] = field(default_factory=dict)


def is_finished(run: Run) -> bool:
    """Say whether a run is there already.

    Args:
        run: The run.

    Returns:
        Whether its `run.json` is written.

    Raises:
        ConfigError: Its folder holds a run of another recipe, finished or not.
    """
    for name in ("run.json", "started.json"):
        kept = _read_json(run.folder / name)
        if kept and kept.get("recipe") != run.recipe:
            raise ConfigError(
                f"Expected {run.folder} to be empty or to hold a run of this configuration, but it holds one of "
                f"another (recipe {kept.get('recipe')}, now {run.recipe}): files, steps, version or options differ. "
                "Pass another --out, or remove that folder."
            )
        if kept and name == "run.json":
            return True
    return False


def prepare_sets(matrix: Matrix, runs: Sequence[Run], threads: int, say: Callable[[str], None]) -> None:
    """Render videos and store features of the sets of some runs, one set after the other.

    Args:
        matrix: The comparison.
        runs: Runs that are still to be made.
        threads: Threads of the process.
        say: Takes a line of progress.

    Raises:
        ConfigError: A set could not be made.
    """
    names = list(dict.fromkeys(run.set for run in runs))
    for place, name in enumerate(names, start=1):
        say(f"preparing data {place}/{len(names)}: {name}")
        log = matrix.asked.out / f"prepare_{name}.txt"
        with open(log, "wb") as stream:
            process = start_process(matrix.prepare[name], stream, child_environment(threads))
            try:
                code = process.wait()
            finally:
                end_processes([process])
        if code != 0:
            raise ConfigError(
                f"The data of set {name!r} could not be made (status {code}). {log} ends with:\n{_tail(log)}"
            )
        log.unlink()


def run_all(runs: Sequence[Run], processes: int, threads: int, show: Callable[[str], None]) -> list[Failure]:
    """Make all runs that are not finished; one that fails does not stop the others.

    Args:
        runs: The runs.
        processes: How many at a time.
        threads: Threads of each.
        show: Takes the line that says how far it is.

    Returns:
        What failed.

    Raises:
        ConfigError: A folder holds a run of another recipe, or another process is at work in it.
    """
    waiting = [run for run in runs if not is_finished(run)]
    done = len(runs) - len(waiting)
    begun = time.monotonic()
    running: list[_Child] = []
    failures: list[Failure] = []
    gained = 0.0  # shares of runs that were trained in this call
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                running.append(_launch(waiting.pop(_next(waiting, running)), threads))
            time.sleep(_PAUSE)
            for child in list(running):
                code = _poll(child)
                child.progress = _read_json(child.run.folder / "progress.json") or child.progress
                if code is None:
                    continue
                running.remove(child)
                failure = _finish(child, code)
                gained += 1.0 - child.share
                done += failure is None
                failures += [failure] if failure else []
            now = gained + sum(_share(child.progress) - child.share for child in running)
            left = sum(1.0 - _expected(run) for run in waiting)
            left += sum(1.0 - _share(child.progress) for child in running)
            show(_line(done, len(runs), len(failures), running, _left(now, left, time.monotonic() - begun)))
    finally:
        end_processes([child.process for child in running])
        for child in running:
            child.locks.close()
    return failures


def _next(waiting: Sequence[Run], running: Sequence[_Child]) -> int:
    """The first run that others wait for, else the first that need not wait itself; no process idles for a warm-up."""
    begun = {child.run.folder for child in running}
    busy = {run.folder for run in waiting} | begun
    sources = {source for run in waiting if (source := _waits_for(run, busy)) is not None} - begun
    for wanted in (sources, busy):
        for place, run in enumerate(waiting):
            if run.folder in wanted and _waits_for(run, busy) is None:
                return place
    return 0


def _waits_for(run: Run, busy: set[Path]) -> Path | None:
    """Folder of the run whose warm-up this one waits for."""
    if run.shared is None or (run.folder / "checkpoints" / "last.ckpt").is_file():
        return None
    source = run.shared.parent.parent
    return source if source in busy and shared_steps(run.shared) is None else None


def _launch(run: Run, threads: int) -> _Child:
    checkpoint = run.folder / "checkpoints" / "last.ckpt"
    found = None
    run.folder.mkdir(parents=True, exist_ok=True)
    locks = contextlib.ExitStack()
    try:
        handle = locks.enter_context(_lock(run))
        goes_on = checkpoint.is_file() and (run.folder / "started.json").is_file()
        if goes_on:
            set_curve_aside(run.folder)
        else:
            for name in ("metrics.csv", "metrics_before.csv", "progress.json", "checkpoints/last.ckpt"):
                (run.folder / name).unlink(missing_ok=True)
            for path in run.folder.glob("checkpoints/warmup_*"):
                path.unlink()
            found = shared_steps(run.shared)
            if run.shared is not None and found is not None:
                take_over(run.shared, run.folder)
                checkpoint = run.shared
        for name, content in (("overlay.yaml", run.overlay), ("settings.yaml", run.settings)):
            write_bytes(run.folder / name, _yaml(content))
        if not goes_on:
            started = {"recipe": run.recipe, "shared_steps": found[0] if found else 0}
            write_bytes(run.folder / "started.json", json.dumps(started).encode())
        command = [*run.command, *(["--ckpt_path", str(checkpoint)] if goes_on or found else [])]
        with open(run.folder / "log.txt", "ab" if goes_on else "wb") as log:
            process = start_process(command, log, child_environment(threads), (handle,))
    except BaseException:
        locks.close()
        raise
    progress = (_read_json(run.folder / "progress.json") or {}) if goes_on else {}
    if found is not None:
        progress = {"step": found[0], "total": found[1]}
    return _Child(run, process, locks, time.monotonic(), _share(progress), progress=progress)


@contextlib.contextmanager
def _lock(run: Run) -> Iterator[int]:
    try:
        with exclusive(run.folder / ".lock", timeout=_ORPHAN_SECONDS) as handle:
            yield handle
    except BlockingIOError as error:
        if Path(str(error.filename)).parent != run.folder:
            raise
        raise ConfigError(
            f"Expected {run.folder} to be free, but another process is at work in it. Wait for it, or pass another "
            "--out."
        ) from error


def _poll(child: _Child) -> int | None:
    process = child.process
    if process.returncode is None and hasattr(os, "wait4"):
        identity, status, usage = os.wait4(process.pid, os.WNOHANG)
        if identity:
            child.cpu = usage.ru_utime + usage.ru_stime
            process.returncode = os.waitstatus_to_exitcode(status)
        return process.returncode
    return process.poll()


def _finish(child: _Child, code: int) -> Failure | None:
    """Write `run.json`, or say why not."""
    run = child.run
    if child.process.stdin is not None:
        child.process.stdin.close()
    try:
        started = _read_json(run.folder / "started.json") or {}
        if code != 0:
            shared = started.get("shared_steps")
            hint = f"; it went on from the warm-up of {run.shared}, which --no-sharing leaves out" if shared else ""
            return Failure(run, f"ended with status {code}{hint}", _tail(run.folder / "log.txt"))
        if not (run.folder / "evaluation.json").is_file():
            return Failure(run, "ended without evaluation.json", _tail(run.folder / "log.txt"))
        complete_curve(run.folder)
        final = run.folder / "checkpoints" / "final.ckpt"
        if final.is_file():
            os.replace(final, final.with_name("last.ckpt"))
        before = child.progress.get("before") or {}
        facts = {
            "set": run.set,
            "slots": run.slots,
            "variant": run.variant,
            "seed": run.seed,
            "recipe": run.recipe,
            "command": list(run.command),
            "wall_seconds": round(time.monotonic() - child.started + float(before.get("wall", 0.0)), 1),
            "shared_steps": started.get("shared_steps", 0),
            "cpu_seconds": round(child.cpu + float(before.get("cpu", 0.0)), 1),
            "device": child.progress.get("device"),
            "torch": child.progress.get("torch"),
            "date": date.today().isoformat(),
        }
        write_bytes(run.folder / "run.json", json.dumps(facts, indent=1).encode())
        for name in ("started.json", "progress.json"):
            (run.folder / name).unlink(missing_ok=True)
        return None
    finally:
        child.locks.close()


def _share(progress: Mapping[str, Any]) -> float:
    total = progress.get("total")
    return min(1.0, progress.get("step", 0) / total) if total else 0.0


def _expected(run: Run) -> float:
    """Share of a run's steps that it need not train, as far as that is known."""
    step, total = shared_steps(run.shared) or (0, 1)
    return step / total


def _left(now: float, left: float, seconds: float) -> str:
    # The first percent is imports and the untrained host's validation, and says little.
    if now < 0.01:
        return "?"
    minutes = seconds / now * left / 60
    return f"{minutes / 60:.1f} h" if minutes >= 90 else f"{max(minutes, 1):.0f} min"


def _line(done: int, total: int, failed: int, running: Sequence[_Child], left: str) -> str:
    steps = []
    for child in running:
        run, progress = child.run, child.progress
        at = f"{progress.get('step', 0)}/{progress.get('total') or '?'}" if progress else "starting"
        steps.append(f"{run.set}/{run.slots}/{run.variant}/{run.seed} {at}")
    bad = f", {failed} failed" if failed else ""
    return (
        f"runs {done}/{total} done{bad}; {left} left; {', '.join(steps)}" if steps else f"runs {done}/{total} done{bad}"
    )


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    return "\n".join(f"  {line}" for line in lines[-_TAIL:])


def _yaml(content: Mapping[str, Any]) -> bytes:
    import yaml

    return yaml.safe_dump(json.loads(json.dumps(content, default=str)), sort_keys=False).encode()


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return content if isinstance(content, dict) else None
