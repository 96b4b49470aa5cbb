"""The folder of a comparison, read into plain data. Runs that lack files lose what these would have told."""

from __future__ import annotations

import csv
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ssync_pl.compare.curves import read_curve
from ssync_pl.compare.report.records import Comparison, Curve, Group, Missing, Run, number
from ssync_pl.compare.report.scores import COLUMNS, REFERENCES
from ssync_pl.errors import ConfigError

__all__ = ["load_comparison"]


def load_comparison(folder: Path) -> Comparison:
    """Read what `ssync-pl compare` left in a folder.

    Args:
        folder: The folder; `matrix.json`, `results.csv` and files of runs may be missing.

    Returns:
        The comparison.

    Raises:
        ConfigError: There is nothing of a comparison in it.

    Example:
        >>> load_comparison(Path("none"))
        Traceback (most recent call last):
            ...
        ssync_pl.errors.ConfigError: Expected the folder of a comparison, ... but none has no finished or planned run...
    """
    matrix = _json(folder / "matrix.json")
    runs = {(run.set, run.slots, run.variant, run.seed): run for run in _runs(folder)}
    asked = _asked(matrix)
    if not runs and not asked:
        raise ConfigError(
            f"Expected the folder of a comparison, with matrix.json or results.csv, but {folder} has no finished or "
            "planned run. Give the folder that `ssync-pl compare --out` wrote."
        )
    described = matrix.get("variants")
    known = {str(one.get("name")): str(one.get("description", "")) for one in described or [] if isinstance(one, dict)}
    names = list(dict.fromkeys([*known, *(key[2] for key in runs)]))
    wanted = str(matrix.get("baseline", "without"))
    baseline = wanted if wanted in names else names[0]
    names = [baseline, *(name for name in names if name != baseline)]
    planned = list(dict.fromkeys([*(key[:2] for key in asked), *(key[:2] for key in runs)]))
    groups = []
    for place in planned:
        mine = tuple(run for key, run in runs.items() if key[:2] == place)
        present = tuple(name for name in names if any(run.variant == name for run in mine))
        if mine:
            groups.append(Group(*place, present, baseline, mine))
    absent = [key for key in asked if key not in runs] or [key for key in _folders(folder) if key not in runs]
    missing = tuple(Missing(_label(key), _reason(_place(folder, key))) for key in absent)
    name = folder.resolve().name
    return Comparison(name, folder, matrix, {key: known.get(key, "") for key in names}, tuple(groups), missing)


Key = tuple[str, int, str, int]


def _asked(matrix: Mapping[str, Any]) -> list[Key]:
    try:
        names = [str(one["name"]) for one in matrix["variants"]]
        return [
            (str(of), int(slots), name, int(seed))
            for of in matrix["sets"]
            for slots in matrix["slots"]
            for name in names
            for seed in matrix["seeds"]
        ]
    except (KeyError, TypeError, ValueError):
        return []


def _folders(folder: Path) -> Iterator[Key]:
    for path in sorted((folder / "runs").glob("*/slots_*/*/seed_*")):
        slots, seed = path.parts[-3].removeprefix("slots_"), path.name.removeprefix("seed_")
        if slots.isdecimal() and seed.isdecimal():
            yield path.parts[-4], int(slots), path.parts[-2], int(seed)


def _place(folder: Path, key: Key) -> Path:
    return folder / "runs" / key[0] / f"slots_{key[1]}" / key[2] / f"seed_{key[3]}"


def _label(key: Key) -> str:
    return f"{key[0]}, {key[1]} slots, {key[2]}, seed {key[3]}"


def _runs(folder: Path) -> Iterator[Run]:
    rows = _rows(folder / "results.csv")
    keys = [
        *rows,
        *(key for key in _folders(folder) if key not in rows and (_place(folder, key) / "run.json").is_file()),
    ]
    for key in keys:
        place = _place(folder, key)
        facts = _json(place / "run.json")
        row = {**dict(zip(COLUMNS[:4], map(str, key), strict=True)), **_row(place, facts), **rows.get(key, {})}
        command = facts.get("command", "")
        words = shlex.join(map(str, command)) if isinstance(command, list) else str(command)
        yield Run(*key, row, place, _curves(place / "metrics.csv"), words)


def _rows(path: Path) -> dict[Key, dict[str, str]]:
    if not path.is_file():
        return {}
    found = {}
    with open(path, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            full = {name: text for name, text in row.items() if name and text}
            slots, seed = full.get("slots", ""), full.get("seed", "")
            if slots.isdecimal() and seed.isdecimal() and "variant" in full:
                found[(full.get("set", "default"), int(slots), full["variant"], int(seed))] = full
    return found


def _row(place: Path, facts: Mapping[str, Any]) -> dict[str, str]:
    """What `results.csv` would say of a run that is not in it, from the run's own files."""
    evaluation, summary = _json(place / "evaluation.json"), _json(place / "summary.json")
    lines = summary.get("rows") or {}
    row: dict[str, Any] = {"step": summary.get("step", evaluation.get("steps")), **(lines.get("this run") or {})}
    row.update(evaluation.get("scores") or {})
    for name, value in (evaluation.get("probe") or {}).items():
        row[f"probe_{name.removeprefix('probe_')}"] = value
    for prefix, title in zip(REFERENCES, ("untrained", "grid", "k-means RGB"), strict=True):
        row.update({f"{prefix}_{key}": value for key, value in (lines.get(title) or {}).items()})
    row.update({name: evaluation.get(name) for name in ("step_ms", "peak_mib")})
    row.update({name: facts.get(name) for name in ("wall_seconds", "cpu_seconds", "recipe", "device", "torch", "date")})
    return {name: str(row[name]) for name in COLUMNS if row.get(name) is not None}


def _curves(path: Path) -> dict[str, Curve]:
    points: dict[str, dict[int, float]] = {}
    for row in read_curve(path):
        for name, text in row.items():
            value = number(text) if name.startswith(("val/", "ssync/")) else None
            if value is not None:
                points.setdefault(name, {})[int(row["step"])] = value
    return {name: np.array(sorted(found.items()), dtype=np.float64).T for name, found in points.items()}


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _reason(place: Path) -> str:
    try:
        lines = (place / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "not started"
    said = [re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", line).strip() for line in lines if line.strip()]
    return f"did not finish; its log ends with: {said[-1][:300]}" if said else "did not finish; its log is empty"
