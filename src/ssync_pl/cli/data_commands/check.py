"""`ssync-pl data check`: what shards hold, and what is wrong with them."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Add `check` to the commands of `ssync-pl data`.

    Args:
        commands: What `ArgumentParser.add_subparsers` returned.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> add_parser(parser.add_subparsers())
        >>> parser.parse_args(["check", "data/train-*.tar"]).deep
        True
    """
    text = (
        "Read shards through and report counts, damaged and refused members, duplicates and leaks between sets. "
        "Exit status: 0 clean, 1 problems found, 2 wrong usage."
    )
    parser = commands.add_parser("check", help="report what shards hold and what is wrong with them", description=text)
    parser.add_argument(
        "patterns",
        nargs="+",
        metavar="PATTERN",
        help="shards: paths, globs, braces or URLs; give training and validation to find videos that are in both",
    )
    depth = parser.add_mutually_exclusive_group()
    depth.add_argument(
        "--deep", action="store_true", default=True, help="decode every member and compare all videos (default)"
    )
    depth.add_argument("--quick", action="store_false", dest="deep", help="read headers only")
    parser.add_argument("--workers", type=int, metavar="N", help="processes; 0 uses this one only (default: by size)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the whole report as JSON as well")
    parser.add_argument("--rebuild-index", action="store_true", help="write index.json of the folders anew")
    parser.add_argument("--max-objects", type=int, metavar="N", help="report videos with more objects")
    parser.set_defaults(run=_check)


def _check(options: argparse.Namespace) -> int:
    from dataclasses import replace

    from ssync_pl.data.check import check_shards, group_shards, render_report
    from ssync_pl.data.files import write_bytes

    sets, missing = group_shards(options.patterns)
    report = check_shards(
        sets,
        deep=options.deep,
        max_objects=options.max_objects,
        num_workers=options.workers,
        rebuild_index=options.rebuild_index,
        progress=sys.stderr.isatty(),
    )
    report = replace(report, problems=(*missing, *report.problems))
    if options.json is not None:
        write_bytes(options.json, (json.dumps(report.to_json(), indent=1, ensure_ascii=False) + "\n").encode())
    sys.stdout.write(render_report(report) + "\n")
    return 0 if report.clean else 1
