"""What a comparison left in its folder: a row, learning curves and a sheet of pictures per finished run."""

import itertools
import json
import math
import shlex
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ssync_pl.compare.matrix import RunKey
from ssync_pl.compare.runs import log_lines
from ssync_pl.errors import ConfigError
from ssync_pl.metrics.table import MAPS, METRICS

_UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
_WORDS = ("recipe", "device", "torch", "date")

REFERENCES = {
    "untrained": ("untrained", "untrained host"),
    "grid": ("grid", "fixed grid"),
    "kmeans_rgb": ("k-means RGB", "k-means on RGB"),
    "kmeans_features": ("k-means features", "k-means on the same features"),
}
"""What needs no learning: prefix of its columns, its row of `summary.json`, and its title in tables."""

COLUMNS = (
    *("slots", "variant", "seed", "step"),
    *METRICS,
    *(f"{of}{name}" for of in MAPS if of for name, info in METRICS.items() if info.both_maps),
    *("wall_seconds", "cpu_seconds", "shared_steps", "merged_slots"),
    *_WORDS,
)
"""Columns of `results.csv`; behind them come the scores of `REFERENCES`."""


@dataclass(frozen=True)
class Record:
    """A finished run: its row of `results.csv`, its logged values by step, its last sheet of pictures, its command."""

    row: Mapping[str, Any]
    curves: pd.DataFrame
    sheet: bytes | None
    command: str


@dataclass(frozen=True)
class Comparison:
    """Content of `matrix.json`, records of the finished runs, and why others are not among them."""

    matrix: Mapping[str, Any]
    records: Mapping[RunKey, Record]
    absent: Mapping[RunKey, str]

    @property
    def frame(self) -> pd.DataFrame:
        """The rows of the finished runs."""
        frame = pd.DataFrame([record.row for record in self.records.values()])
        return frame.reindex(columns=[*COLUMNS, *(name for name in frame.columns if name not in COLUMNS)])


def load_comparison(folder: Path) -> Comparison:
    """Reads what `ssync-pl compare` left in a folder, earlier calls included; refuses any other folder."""
    try:
        matrix = _read(folder / "matrix.json")
        names = [str(variant["name"]) for variant in matrix["variants"]]
        places = itertools.product(matrix["slots"], matrix["seeds"], names)
        keys = [RunKey(int(slots), name, int(seed)) for slots, seed, name in places]
        matrix |= {name: [*map(str, matrix.get(name, ()))] for name in ("command", "config")}
    except _UNREADABLE as error:
        raise ConfigError(
            f"Expected {folder} to be the folder of a comparison, with a whole matrix.json, but got {error}. Pass the "
            "folder that `ssync-pl compare --out` wrote."
        ) from error
    ends = (path.parts[-4:-1] for path in folder.glob("runs/slots_*/*/seed_*/evaluation.json"))
    found = [(slots[6:], variant, seed[5:]) for slots, variant, seed in ends]
    keys += sorted(RunKey(int(a), name, int(b)) for a, name, b in found if a.isdecimal() and b.isdecimal())
    records: dict[RunKey, Record] = {}
    absent: dict[RunKey, str] = {}
    for key in dict.fromkeys(keys):
        place = key.folder(folder)
        if (place / "evaluation.json").is_file():
            try:
                records[key] = _read_record(place, key)
            except _UNREADABLE as error:  # our own are ValueErrors, too
                other = f"a file of it is damaged ({error}); remove {place} and give the same command again"
                absent[key] = str(error) if isinstance(error, ConfigError) else other
        else:
            lines = "\n".join(log_lines(place)[-15:])
            absent[key] = f"did not finish; its log ends with:\n{lines}" if lines else "not started"
    return Comparison(matrix, records, absent)


def read_results(path: Path) -> pd.DataFrame:
    """Reads a `results.csv`; what is missing becomes NaN."""
    return pd.read_csv(path, dtype={"variant": str})


def _read_record(place: Path, key: RunKey) -> Record:
    job, evaluation = _read(place / "job.json"), _read(place / "evaluation.json")
    rows = _read(place / "summary.json", {"rows": {}})["rows"]
    curves = _read(place / "metrics.csv", pd.DataFrame())
    shared = int(evaluation.get("first_step") or 0)
    if shared and job.get("source"):
        source = key._replace(variant=str(job["source"])).folder(place.parents[3])
        before = _read(source / "metrics.csv", pd.DataFrame())
        curves = pd.concat([before[before.index < shared], curves[curves.index >= shared]])
    numbers = {**rows.get("this run", {}), **evaluation, **evaluation.get("scores", {})}
    row = _numbers(numbers, [name for name in COLUMNS if name not in _WORDS]) | key._asdict()
    row |= {name: str(value) for name, value in {**evaluation, "recipe": job.get("recipe")}.items() if name in _WORDS}
    row["shared_steps"] = shared
    if "ssync/merged_slots" in curves:
        row["merged_slots"] = curves["ssync/merged_slots"].dropna().iloc[-1]
    rows = {**rows, "untrained": evaluation.get("untrained", {})}
    for prefix, (name, _) in REFERENCES.items():
        row |= {f"{prefix}_{score}": value for score, value in _numbers(rows.get(name, {}), METRICS).items()}
    sheets = sorted(path for path in (place / "pictures").glob("step-*.png") if path.is_file())
    sheet = sheets[-1].read_bytes() if sheets else None
    return Record(row, curves, sheet, shlex.join(map(str, job.get("command", []))))


def _numbers(given: Mapping[str, Any], names: Container[str]) -> dict[str, Any]:
    """Returns the finite numbers of these names; raises for values of another kind."""
    known = {name: value for name, value in given.items() if name in names and value is not None}
    return {name: value for name, value in known.items() if math.isfinite(value)}


def _read(path: Path, absent: Any = None) -> Any:
    """Reads a JSON object, or what was logged by training step; `absent` stands for a file that is not there."""
    if absent is not None and not path.is_file():
        return absent
    try:
        if path.suffix == ".json":
            return {**json.loads(path.read_text(encoding="utf-8"))}
        curves = pd.read_csv(path).apply(pd.to_numeric, errors="coerce").dropna(subset="step")
        return curves.dropna(axis=1, how="all").set_index("step").sort_index()
    except _UNREADABLE as error:
        advice = f"remove {path.parent} and give the same command again"
        raise ConfigError(f"{path.name} is damaged or missing; {advice}") from error
