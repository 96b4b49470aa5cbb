"""What a comparison left in its folder: a row, learning curves and a sheet of pictures per finished run."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ssync_pl.compare.matrix import RunKey
from ssync_pl.compare.runs import log_lines
from ssync_pl.errors import ConfigError
from ssync_pl.metrics.table import METRICS

__all__ = ["COLUMNS", "REFERENCES", "Comparison", "Record", "load_comparison", "read_results"]

_TAIL = 15  # lines of a log
_UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)

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
    *(f"encoder_{name}" for name, info in METRICS.items() if info.both_maps),
    *("wall_seconds", "cpu_seconds", "shared_steps", "merged_slots"),
    *("recipe", "device", "torch", "date"),
)
"""Columns of `results.csv`; behind them come the scores of `REFERENCES`."""


@dataclass(frozen=True)
class Record:
    """A finished run: its row of `results.csv`, its logged values by step, its last sheet of pictures, its command."""

    row: Mapping[str, Any]
    curves: pd.DataFrame
    sheet: Path | None
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
        keys = [
            RunKey(int(slots), str(variant["name"]), int(seed))
            for slots in matrix["slots"]
            for seed in matrix["seeds"]
            for variant in matrix["variants"]
        ]
    except _UNREADABLE as error:
        raise ConfigError(
            f"Expected {folder} to be the folder of a comparison, with a whole matrix.json, but got {error}. Pass the "
            "folder that `ssync-pl compare --out` wrote."
        ) from error
    keys += sorted(
        RunKey(int(path.parts[-4][6:]), path.parts[-3], int(path.parts[-2][5:]))
        for path in folder.glob("runs/slots_[0-9]*/*/seed_[0-9]*/evaluation.json")
    )
    records: dict[RunKey, Record] = {}
    absent: dict[RunKey, str] = {}
    for key in dict.fromkeys(keys):
        place = key.folder(folder)
        if (place / "evaluation.json").is_file():
            try:
                records[key] = _read_record(place, key)
            except _UNREADABLE as error:  # our own are ValueErrors, too
                absent[key] = str(error)
        else:
            lines = "\n".join(log_lines(place)[-_TAIL:])
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
    row: dict[str, Any] = {**rows.get("this run", {}), **evaluation, **evaluation.get("scores", {}), **key._asdict()}
    row |= {"recipe": job.get("recipe"), "shared_steps": shared}
    if "ssync/merged_slots" in curves:
        row["merged_slots"] = curves["ssync/merged_slots"].dropna().iloc[-1]
    row = {name: value for name, value in row.items() if name in COLUMNS}
    rows = {**rows, "untrained": evaluation.get("untrained", {})}
    for prefix, (name, _) in REFERENCES.items():
        row |= {f"{prefix}_{score}": value for score, value in rows.get(name, {}).items() if score in METRICS}
    sheets = sorted((place / "pictures").glob("step-*.png"))
    return Record(row, curves, sheets[-1] if sheets else None, shlex.join(map(str, job.get("command", []))))


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
