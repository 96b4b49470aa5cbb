"""`ssync-pl compare`: the command."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from ssync_pl.errors import ConfigError

__all__ = ["run_compare"]

_DESCRIPTION = """Trains a configuration under several variants, seeds, slot counts and data sets, and says
what differs. All variants of a seed have the same initial weights, data order and number of steps; what they have
in common until SSync switches on is trained once. Finished runs are kept, and a run that was killed goes on from its
last checkpoint: the same command continues."""
_EXAMPLES = """examples:
  ssync-pl compare --config examples/savi_synthetic.yaml --seeds 5 --out runs/compare/savi
  ssync-pl compare --config examples/slotcontrast_synthetic.yaml --variants without,with,no-merging,threshold-0.8 \\
    --slots 7,11 --sets c,cluttered --seeds 3 --out runs/compare/slots
  ssync-pl compare --config mine.yaml --variants without,with,mine_too.yaml --out runs/compare/mine \\
    -- --trainer.precision=16-mixed

exit status: 0 all runs are finished, 1 some failed, 2 wrong usage."""
_SHOW_SECONDS = 10.0


def run_compare(args: list[str], recorder: str | None = None, keep_steps: int | None = None) -> int:
    """Make the runs of a comparison that are not there yet, and print its tables.

    Args:
        args: Words after `ssync-pl compare`; those after `--` go to `ssync-pl fit`.
        recorder: Class path of the callback that writes `evaluation.json`; None takes the package's.
        keep_steps: Steps between checkpoints, beside those that are taken about every minute.

    Returns:
        The exit status: 0 when all runs are finished, 1 when some failed.

    Raises:
        ConfigError: A setting is not understood, or the folder holds another comparison.

    Example:
        >>> run_compare(["--config", "none.yaml", "--out", "none"])
        Traceback (most recent call last):
            ...
        ssync_pl.errors.ConfigError: Expected --config to name a YAML file, but there is no 'none.yaml'.
    """
    from ssync_pl.compare.matrix import build_matrix

    place = args.index("--") if "--" in args else len(args)
    options = _parser().parse_args(args[:place])
    matrix = build_matrix(_asked(options, tuple(args[place + 1 :]), recorder, keep_steps))
    threads = _at_least_one(options.threads, "--threads")
    processes = 1 if _on_gpu(options.device) else max(1, _cpus() // threads)
    if options.processes is not None:
        processes = _at_least_one(options.processes, "--processes")
    if options.dry_run:
        for run in matrix.runs:
            sys.stdout.write(f"# {run.label}\n{shlex.join(run.command)}\n")
        sys.stdout.write(f"# {len(matrix.runs)} runs, {processes} at a time with {threads} threads each\n")
        return 0
    return _compare(matrix, processes, threads, report=not options.no_report)


def _compare(matrix: Any, processes: int, threads: int, report: bool) -> int:
    from ssync_pl.compare.collect import collect_runs, write_results
    from ssync_pl.compare.runner import is_finished, prepare_sets, run_all
    from ssync_pl.compare.table import comparison_tables
    from ssync_pl.data.convert.locking import exclusive
    from ssync_pl.data.files import write_bytes

    out = matrix.asked.out
    _check_folder(matrix)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"Expected --out {out} to be a folder that can be written, but {error.strerror or error}. Pass another one."
        ) from error
    missing = [run for run in matrix.runs if not is_finished(run)]  # refuses before anything is trained
    progress = _Progress()
    try:
        with exclusive(out / ".lock"):
            write_bytes(out / "matrix.json", json.dumps(matrix.to_json(), indent=1).encode())
            if missing:
                prepare_sets(matrix, missing, threads, progress.say)
            failures = run_all(matrix.runs, processes, threads, progress.show)
            progress.close()
            # Those of earlier calls, too: a comparison can grow.
            asked = [run.folder for run in matrix.runs]
            others = {path.parent for path in out.glob("runs/*/*/*/*/run.json")} - set(asked)
            rows = collect_runs([*asked, *sorted(others)])
            write_results(out / "results.csv", rows)
    except BlockingIOError as error:
        raise ConfigError(
            f"Expected {out} to be free, but another `ssync-pl compare` is at work in it. Wait for it, or pass another "
            "--out."
        ) from error
    finally:
        progress.close()
    sys.stdout.write(comparison_tables(rows, matrix.asked.baseline) + "\n\n")
    sys.stdout.write(f"results: {out / 'results.csv'}\n")
    if report and rows:
        sys.stdout.write(_report(out) + "\n")
    for failure in failures:
        sys.stderr.write(
            f"\nfailed: {failure.run.label}: {failure.reason}. {failure.run.folder / 'log.txt'} ends with:\n"
        )
        sys.stderr.write(f"{failure.tail}\n")
    if failures:
        sys.stderr.write(
            f"\nssync-pl compare: {len(failures)} of {len(matrix.runs)} runs failed. The same command tries them again "
            "and keeps the others.\n"
        )
    return 1 if failures else 0


def _report(out: Path) -> str:
    # Deferred: matplotlib is an extra, and everything else works without it.
    try:
        from ssync_pl.compare.report import write_report

        return f"report:  {write_report(out)}"
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "ssync_pl":
            raise
        return f'report:  none, because {error.name} is not installed: pip install "ssync-pl[bench]"'


def _parser() -> argparse.ArgumentParser:
    from ssync_pl.compare.variants import known_variants

    parser = argparse.ArgumentParser(
        prog="ssync-pl compare",
        usage="ssync-pl compare --config FILE --out FOLDER [OPTIONS] [-- OPTIONS OF ssync-pl fit]",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", action="append", default=[], type=Path, metavar="FILE", help="of `ssync-pl fit`; may be repeated")
    add("--out", required=True, type=Path, metavar="FOLDER", help="folder of the comparison, e.g. runs/compare/NAME")
    add("--variants", default="with,without", metavar="A,B", help=f"{known_variants()} (default: %(default)s)")
    add(
        "--baseline", default="without", metavar="A", help="variant that differences are against (default: %(default)s)"
    )
    add("--seeds", default="3", metavar="N", help="seeds 0 to N-1, or a list like 3,4 (default: %(default)s)")
    add("--slots", default="", metavar="A,B", help="numbers of slots (default: the configuration's)")
    add(
        "--sets",
        default="",
        metavar="A,B",
        help="presets of the synthetic data, whose own scenes then take the place of the configuration's, or YAML "
        "files that are laid over it; `default` is the configuration's data",
    )
    add("--steps", type=int, metavar="N", help="optimizer steps of each run (default: the configuration's)")
    add("--processes", type=int, metavar="N", help="runs at a time (default: CPUs / threads; 1 on a GPU)")
    add("--threads", type=int, default=1, metavar="N", help="threads of a run (default: %(default)s)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: the configuration's accelerator")
    add("--data", type=Path, metavar="FOLDER", help="root of the generated data (default: the configuration's)")
    add("--no-sharing", action="store_true", help="train the warm-up of every run, though it is the same")
    add("--no-report", action="store_true", help="print tables only, draw nothing")
    add("--dry-run", action="store_true", help="print the runs with their commands, and start none")
    return parser


def _asked(options: argparse.Namespace, extra: tuple[str, ...], recorder: str | None, keep_steps: int | None) -> Any:
    from ssync_pl.compare.matrix import RECORDER, Asked
    from ssync_pl.compare.sets import parse_numbers, parse_seeds

    if options.steps is not None:
        _at_least_one(options.steps, "--steps")
    variants = _names(options.variants)
    if not variants:
        raise ConfigError("Expected --variants to name variants, as in with,without, but got none.")
    return Asked(
        configs=tuple(options.config),
        out=options.out,
        variants=variants,
        seeds=parse_seeds(options.seeds),
        slots=parse_numbers(options.slots, "--slots") if options.slots else (),
        sets=_names(options.sets),
        baseline=options.baseline,
        steps=options.steps,
        device=options.device,
        data=options.data,
        extra=extra,
        recorder=recorder or RECORDER,
        keep_steps=keep_steps,
        share=not options.no_sharing,
    )


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _at_least_one(value: int, option: str) -> int:
    if value < 1:
        raise ConfigError(f"Expected {option} to be at least 1, but got {value}.")
    return value


def _on_gpu(device: str) -> bool:
    """Whether runs share a GPU, where several at a time are the user's to ask for."""
    import torch

    return device != "cpu" and torch.cuda.is_available()


def _cpus() -> int:
    if hasattr(os, "sched_getaffinity"):  # containers give a process fewer than the machine has
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _check_folder(matrix: Any) -> None:
    """Refuse a folder of another comparison; more seeds, variants, slots or sets are welcome."""
    path = matrix.asked.out / "matrix.json"
    if not path.is_file():
        return
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"Expected {path} to hold JSON, but it is damaged. Remove it, or pass another --out."
        ) from error
    if not isinstance(kept, dict):
        raise ConfigError(f"Expected {path} to hold a comparison, but it is damaged. Remove it, or pass another --out.")
    now = matrix.to_json()
    other = [name for name in ("config", "steps", "extra", "version") if kept.get(name) != now[name]]
    if other:
        raise ConfigError(
            f"Expected {matrix.asked.out} to be empty or to hold this comparison, but it holds one with another "
            f"{' and '.join(other)}. Pass another --out, or remove that folder."
        )


class _Progress:
    """One line on standard error: rewritten on a terminal, else repeated now and then."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._shown = ""
        self._when = -float("inf")

    def say(self, text: str) -> None:
        self.close()
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()

    def show(self, text: str) -> None:
        due = time.monotonic() - self._when >= (0.5 if self._terminal else _SHOW_SECONDS)
        if text == self._shown or not (due or self._is_end(text)):
            return
        self._when = time.monotonic()
        if self._terminal:
            sys.stderr.write(f"\r\x1b[K{text}")
        else:
            sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
        self._shown = text

    def close(self) -> None:
        if self._terminal and self._shown:
            sys.stderr.write("\n")
        self._shown = ""

    @staticmethod
    def _is_end(text: str) -> bool:
        return " left" not in text
