"""`ssync-pl compare`: the command."""

from __future__ import annotations

import argparse
import importlib.util
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from jsonargparse.typing import PositiveInt

from ssync_pl.cli.words import run_command
from ssync_pl.errors import ConfigError, require

__all__ = ["run_compare"]


def run_compare(words: list[str]) -> int:
    """Makes the runs of a comparison that are not there yet, and prints its tables; returns the exit status."""
    return run_command("ssync-pl compare", _compare, words)


def _compare(parser: argparse.ArgumentParser, words: list[str]) -> int:
    """Train a configuration under several variants, seeds, slot counts and data sets, and say what differs.

    All variants of a seed have the same initial weights, data order and number of steps; what they have in common until
    SSync switches on is trained once. The same command continues a comparison that was stopped: finished runs are kept.

    examples:
      ssync-pl compare --config examples/savi_synthetic.yaml --seeds 5 --out runs/compare/savi
      ssync-pl compare --config mine.yaml --variants without,with,no-merging,mine_too.yaml --slots 7,11 \\
        --out runs/compare/mine --launcher slurm --partition gpu --gpus 1 --hours 12 -- --trainer.precision=16-mixed

    exit status: 0 all runs are finished, 1 some failed or are damaged, 2 wrong usage.
    """
    from ssync_pl.compare.matrix import Asked, build_matrix, parse_numbers, parse_seeds

    place = words.index("--") if "--" in words else len(words)
    _add_options(parser)
    options = parser.parse_args(words[:place])
    variants, sets = (
        tuple(part.strip() for part in text.split(",") if part.strip()) for text in (options.variants, options.sets)
    )
    require(bool(variants), "--variants to name variants, as in with,without", "none")
    wrong = [pair for pair in options.slurm if "=" not in pair]
    require(not wrong, "--slurm to be KEY=VALUE, as in account=lab", *map(repr, wrong))
    require(options.hours is None or options.hours > 0, "--hours to be above 0", options.hours)
    slots = parse_numbers(options.slots, "--slots") if options.slots else ()
    matrix = build_matrix(
        Asked(
            configs=tuple(options.config),
            out=options.out,
            variants=variants,
            seeds=parse_seeds(options.seeds),
            slots=slots,
            sets=sets,
            baseline=options.baseline,
            extra=tuple(words[place + 1 :]),
            share=not options.no_sharing,
        )
    )
    if options.dry_run:
        for run in matrix.runs:
            sys.stdout.write(f"# {run.key.label}\n{shlex.join(run.command)}\n")
        sys.stdout.write(f"# {len(matrix.runs)} runs\n")
        return 0
    needed = ("submitit", "pandas", "jinja2", "matplotlib")
    lacking = [name for name in needed if importlib.util.find_spec(name) is None]
    advice = 'Run: pip install "ssync-pl[bench]"'
    require(not lacking, "the extra `bench`", f"no {', '.join(lacking)}", advice=advice)
    return _run(matrix, options, ["ssync-pl", "compare", *words])


def _run(matrix: Any, options: argparse.Namespace, words: list[str]) -> int:
    from filelock import FileLock, Timeout
    from tqdm import tqdm

    from ssync_pl.compare.report import write_report
    from ssync_pl.compare.results import load_comparison, write_results
    from ssync_pl.compare.runs import Launcher, check_folder, is_finished, run_all, runs_at_once
    from ssync_pl.compare.tables import printed_tables
    from ssync_pl.data.files import write_bytes

    out = options.out
    check_folder(out, matrix)
    for run in matrix.runs:
        is_finished(run)  # refuses what is no run, before anything is trained
    slurm = dict(pair.split("=", 1) for pair in options.slurm)
    slurm |= {"partition": options.partition} if options.partition else {}
    at_once, remote = options.processes, options.launcher == "slurm"
    if at_once is None and not remote:
        at_once = runs_at_once(options.threads, options.gpus, matrix.on_cpu)
    launcher = Launcher(out / "jobs", remote, at_once, options.threads, options.gpus, options.hours, slurm)
    out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out / ".lock", timeout=0):
            write_bytes(out / "matrix.json", json.dumps({**matrix.facts, "command": words}, indent=1).encode())
            every = 0.5 if sys.stderr.isatty() else 30.0
            with tqdm(total=len(matrix.runs), desc="runs", mininterval=every, maxinterval=every) as bar:

                def show(done: int, failed: int, running: list[Any]) -> None:
                    bar.set_postfix_str(f"{failed} failed, {len(running)} running", refresh=False)
                    bar.update(done - bar.n)

                failures = run_all(matrix.runs, launcher, show)
            comparison = load_comparison(out)
            write_results(out / "results.csv", comparison.frame)
            report = write_report(out)
    except Timeout as error:
        raise ConfigError(
            f"Expected {out} to be free, but another `ssync-pl compare` is at work in it. Wait for it, or pass another "
            "--out."
        ) from error
    sys.stdout.write(f"{printed_tables(comparison.frame, options.baseline)}\n\nresults: {out / 'results.csv'}\n")
    sys.stdout.write(f"report:  {report}\n")
    for failure in failures:
        log = failure.run.folder / "log.txt"
        sys.stderr.write(f"\nfailed: {failure.run.key.label}. {log} ends with:\n{failure.tail}\n")
    for key, why in comparison.damaged.items():
        sys.stderr.write(f"\ndamaged: {key.label}: {why}.\n")
    if failures:
        sys.stderr.write(f"\n{len(failures)} of {len(matrix.runs)} runs failed. The same command tries them again.\n")
    return int(bool(failures or comparison.damaged))


def _add_options(parser: argparse.ArgumentParser) -> None:
    from ssync_pl.compare.variants import known_variants

    parser.usage = "ssync-pl compare --config FILE --out FOLDER [OPTIONS] [-- OPTIONS OF ssync-pl fit]"
    add = parser.add_argument
    sets = "presets of the synthetic data, or YAML files laid over the configuration; `default`: its own data"
    add("--config", action="append", default=[], type=Path, metavar="FILE", help="of `ssync-pl fit`; may be repeated")
    add("--out", required=True, type=Path, metavar="FOLDER", help="folder of the comparison, e.g. runs/compare/NAME")
    add("--variants", default="with,without", metavar="A,B", help=f"{known_variants()} (default: %(default)s)")
    add("--baseline", default="without", metavar="A", help="variant to compare with (default: %(default)s)")
    add("--seeds", default="3", metavar="N", help="seeds 0 to N-1, or a list like 3,4 (default: %(default)s)")
    add("--slots", default="", metavar="A,B", help="numbers of slots (default: the configuration's)")
    add("--sets", default="", metavar="A,B", help=sets)
    add(
        "--processes",
        type=PositiveInt,
        metavar="N",
        help="runs at a time (default: as they fit; Slurm: all)",
    )
    add("--threads", type=PositiveInt, default=1, metavar="N", help="CPU threads per run (default: %(default)s)")
    add("--launcher", choices=("local", "slurm"), default="local", help="where runs are started (default: %(default)s)")
    add("--gpus", type=PositiveInt, metavar="N", help="GPUs per run (default: on this machine all, for each run)")
    add("--hours", type=float, metavar="H", help="time limit of a run (default: none; 24 on Slurm)")
    add("--partition", metavar="NAME", help="Slurm partition")
    add("--slurm", action="append", default=[], metavar="KEY=VALUE", help="another option of sbatch; may be repeated")
    add("--no-sharing", action="store_true", help="train the warm-up of every run, though it is the same")
    add("--dry-run", action="store_true", help="print the runs with their commands, and start none")
