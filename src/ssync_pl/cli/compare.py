"""`ssync-pl compare`: the command."""

from __future__ import annotations

import argparse
import shlex
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from jsonargparse.typing import PositiveFloat, PositiveInt

from ssync_pl.cli import key_values

__all__ = ["compare"]


def compare(parser: argparse.ArgumentParser, words: list[str]) -> int:
    """Train a configuration under several variants, seeds and slot counts, and say what differs.

    All variants of a seed have the same initial weights, data order and number of steps; what they have in common until
    SSync switches on is trained once. The same command continues a comparison that was stopped: finished runs are kept.

    example:
      ssync-pl compare --config mine.yaml --variants without,with,no-merging,mine_too.yaml --slots 7,11 \\
        --out runs/compare/mine --launcher slurm --partition gpu --gpus 1 --hours 12 -- --trainer.precision=16-mixed

    exit status: 0 all runs are finished, 1 some failed or are damaged, 2 wrong usage.
    """
    from ssync_pl.compare.matrix import Asked, build_matrix, parse_numbers, parse_seeds

    place = words.index("--") if "--" in words else len(words)
    _add_options(parser)
    options = parser.parse_args(words[:place])
    slurm = key_values(options.slurm, "--slurm") | ({"partition": options.partition} if options.partition else {})
    named: dict[str, Any] = {name: getattr(options, name) for name in ("out", "variants", "baseline", "share")}
    slots = parse_numbers(options.slots, "--slots") if options.slots else ()
    named |= {"seeds": parse_seeds(options.seeds), "slots": slots, "extra": tuple(words[place + 1 :])}
    matrix = build_matrix(Asked(tuple(options.config), **named))
    if options.dry_run:
        for run in matrix.runs:
            sys.stdout.write(f"# {run.key.label}\n{shlex.join(run.command)}\n")
        sys.stdout.write(f"# {len(matrix.runs)} runs\n")
        return 0
    for name in ("submitit", "pandas", "jinja2", "matplotlib"):
        import_module(name)  # what is missing is said now rather than after the training
    from ssync_pl.compare.report import write_report
    from ssync_pl.compare.results import load_comparison
    from ssync_pl.compare.runs import Launcher, run_matrix
    from ssync_pl.compare.tables import printed_tables

    remote, kinds = options.launcher == "slurm", (options.processes, options.threads, options.gpus, options.hours)
    launcher = Launcher(options.out / "jobs", remote, *kinds, slurm)
    run_matrix(matrix, launcher, options.out, ["ssync-pl", "compare", *words])
    report, comparison = write_report(options.out), load_comparison(options.out)
    sys.stdout.write(f"{printed_tables(comparison.frame, options.baseline)}\n\nreport: {report}\n")
    for key, why in comparison.absent.items():
        sys.stderr.write(f"\nnot finished: {key.label} ({key.folder(options.out)}): {why}\n")
    if comparison.absent:
        sys.stderr.write(f"\n{len(comparison.absent)} runs are not finished. The same command tries them again.\n")
    return int(bool(comparison.absent))


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _add_options(parser: argparse.ArgumentParser) -> None:
    from ssync_pl.compare.variants import known_variants

    parser.usage = "ssync-pl compare --config FILE --out FOLDER [OPTIONS] [-- OPTIONS OF ssync-pl fit]"
    variants = f"{known_variants()} (default: %(default)s)"
    add: Any = parser.add_argument
    add("--config", action="append", default=[], type=Path, metavar="FILE", help="of `ssync-pl fit`; may be repeated")
    add("--out", required=True, type=Path, metavar="FOLDER", help="folder of the comparison, e.g. runs/compare/NAME")
    add("--variants", default="with,without", type=_names, metavar="A,B", help=variants)
    add("--baseline", default="without", metavar="A", help="variant to compare with (default: %(default)s)")
    add("--seeds", default="3", metavar="N", help="seeds 0 to N-1, or a list like 3,4 (default: %(default)s)")
    add("--slots", default="", metavar="A,B", help="numbers of slots (default: the configuration's)")
    add("--processes", type=PositiveInt, metavar="N", help="runs at a time (default: as they fit; Slurm: all)")
    add("--threads", type=PositiveInt, default=1, metavar="N", help="CPU threads per run (default: %(default)s)")
    add("--launcher", choices=("local", "slurm"), default="local", help="where runs are started (default: %(default)s)")
    add("--gpus", type=PositiveInt, metavar="N", help="GPUs per run (default: on this machine all, for each run)")
    add("--hours", type=PositiveFloat, metavar="H", help="time limit of a run (default: none; 24 on Slurm)")
    add("--partition", metavar="NAME", help="Slurm partition")
    add("--slurm", action="append", default=[], metavar="KEY=VALUE", help="another option of sbatch; may be repeated")
    add("--no-sharing", action="store_false", dest="share", help="train the same warm-up in every run")
    add("--dry-run", action="store_true", help="print the runs with their commands, and start none")
