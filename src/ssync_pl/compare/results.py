"""What a comparison left in its folder: a row, learning curves and pictures per finished run."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from ssync_pl.compare.matrix import run_folder
from ssync_pl.compare.runs import log_lines
from ssync_pl.data.files import write_bytes
from ssync_pl.errors import ConfigError
from ssync_pl.metrics.table import METRICS, metric_names

__all__ = [
    "COLUMNS",
    "REFERENCES",
    "Comparison",
    "Record",
    "RunKey",
    "load_comparison",
    "read_results",
    "write_results",
]

REFERENCES = {"untrained": "untrained", "grid": "grid", "kmeans_rgb": "k-means RGB"}
"""Baselines without learning: prefix of their columns, and row of `summary.json`."""

_PROBES = metric_names("probe")
COLUMNS = (
    *("set", "slots", "variant", "seed", "step"),
    *(name for name in METRICS if name not in _PROBES),
    *(f"encoder_{name}" for name, info in METRICS.items() if info.both_maps),
    *_PROBES,
    *("wall_seconds", "cpu_seconds", "shared_steps", "merged_slots"),
    *("recipe", "device", "torch", "date"),
)
"""Columns of `results.csv`; behind them come the scores of the baselines."""


class RunKey(NamedTuple):
    """Which run of a comparison."""

    set: str
    slots: int
    variant: str
    seed: int

    @property
    def label(self) -> str:
        """Name of the run in messages."""
        return f"{self.set}, {self.slots} slots, {self.variant}, seed {self.seed}"


@dataclass(frozen=True)
class Record:
    """A finished run: its row of `results.csv`, its logged values by step, its pictures and its command."""

    row: Mapping[str, Any]
    curves: pd.DataFrame
    pictures: list[dict[str, Any]]
    command: str


@dataclass(frozen=True)
class Comparison:
    """All runs: content of `matrix.json`, records of the finished ones, and why others are not among them."""

    folder: Path
    matrix: Mapping[str, Any]
    records: Mapping[RunKey, Record]
    missing: Mapping[RunKey, str]
    damaged: Mapping[RunKey, str]

    @property
    def frame(self) -> pd.DataFrame:
        """The rows of the finished runs."""
        frame = pd.DataFrame([record.row for record in self.records.values()])
        return frame.reindex(columns=[*COLUMNS, *(name for name in frame.columns if name not in COLUMNS)])


def load_comparison(folder: Path) -> Comparison:
    """Reads what `ssync-pl compare` left in a folder, earlier calls included; refuses any other folder."""
    try:
        matrix = _read_json(folder / "matrix.json")
        names = [str(one["name"]) for one in matrix["variants"]]
        asked = [
            RunKey(str(of), int(slots), name, int(seed))
            for of in matrix["sets"]
            for slots in matrix["slots"]
            for seed in matrix["seeds"]
            for name in names
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"Expected {folder} to be the folder of a comparison, with a whole matrix.json, but got "
            f"{type(error).__name__}. Pass the folder that `ssync-pl compare --out` wrote."
        ) from error
    found = sorted(
        RunKey(path.parts[-5], int(path.parts[-4][6:]), path.parts[-3], int(path.parts[-2][5:]))
        for path in folder.glob("runs/*/slots_[0-9]*/*/seed_[0-9]*/run.json")
    )
    records: dict[RunKey, Record] = {}
    missing: dict[RunKey, str] = {}
    damaged: dict[RunKey, str] = {}
    for key in dict.fromkeys([*asked, *found]):
        place = run_folder(folder, *key)
        if not (place / "run.json").is_file():
            missing[key] = _reason(place)
            continue
        try:
            records[key] = _read_record(place, key)
        except _DamagedError as error:
            damaged[key] = f"{error} is damaged or missing; remove {place} and give the same command again"
    return Comparison(folder, matrix, records, missing, damaged)


def write_results(path: Path, frame: pd.DataFrame) -> Path:
    """Writes `results.csv`, complete or not at all."""
    return write_bytes(path, frame.to_csv(index=False, lineterminator="\n").encode())


def read_results(path: Path) -> pd.DataFrame:
    """Reads a `results.csv`; what is missing becomes NaN."""
    return pd.read_csv(path, dtype={"set": str, "variant": str})


class _DamagedError(Exception):
    """Its message names the file."""


def _read_record(place: Path, key: RunKey) -> Record:
    facts, evaluation = (_read(place / name, _read_json) for name in ("run.json", "evaluation.json"))
    summary = _read(place / "summary.json", _read_json, {})
    pictures = _read(place / "pictures.json", lambda path: json.loads(path.read_text(encoding="utf-8")), [])
    curves = _read(place / "metrics.csv", _read_curves, pd.DataFrame())
    shared = int(evaluation.get("first_step") or 0)
    if shared and facts.get("source"):
        source = place.parents[1] / str(facts["source"]) / place.name / "metrics.csv"
        before = _read(source, _read_curves, pd.DataFrame())
        curves = pd.concat([before[before.index < shared], curves[curves.index >= shared]])
    tables = summary.get("rows", {})
    row: dict[str, Any] = {name: value for name, value in facts.items() if name in COLUMNS}
    row |= tables.get("this run", {})
    row |= {name: value for name, value in evaluation["scores"].items() if value is not None}
    row |= {f"probe_{name}": value for name, value in evaluation.get("probe", {}).items()}
    row |= {name: evaluation.get(name) for name in ("device", "torch")}
    row |= {**key._asdict(), "step": evaluation.get("steps"), "shared_steps": shared}
    if "ssync/merged_slots" in curves:
        row["merged_slots"] = curves["ssync/merged_slots"].dropna().iloc[-1]
    row = {name: value for name, value in row.items() if name in COLUMNS}
    for prefix, table in REFERENCES.items():
        row |= {f"{prefix}_{name}": value for name, value in tables.get(table, {}).items() if name in METRICS}
    return Record(row, curves, pictures, shlex.join(map(str, facts.get("command", []))))


def _read(path: Path, read: Callable[[Path], Any], absent: Any = None) -> Any:
    if absent is not None and not path.is_file():
        return absent
    try:
        return read(path)
    except (OSError, ValueError, KeyError) as error:
        raise _DamagedError(path.name) from error


def _read_json(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no object")
    return content


def _read_curves(path: Path) -> pd.DataFrame:
    """What was logged, by training step."""
    curves = pd.read_csv(path).apply(pd.to_numeric, errors="coerce").dropna(subset="step").dropna(axis=1, how="all")
    return curves.set_index("step").sort_index()


def _reason(place: Path) -> str:
    if not (place / "log.txt").is_file():
        return "not started"
    said = log_lines(place)
    return (
        f"did not finish; its log ends with: {said[-1].strip()[:300]}" if said else "did not finish; its log is empty"
    )
