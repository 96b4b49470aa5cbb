"""What a comparison left in its folder: a row, learning curves and a sheet of pictures per finished run."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ssync_pl.compare.matrix import RunKey
from ssync_pl.compare.runs import log_lines
from ssync_pl.data.files import write_bytes
from ssync_pl.errors import ConfigError
from ssync_pl.metrics.table import METRICS

__all__ = ["COLUMNS", "REFERENCES", "Comparison", "Record", "load_comparison", "read_results", "write_results"]

REFERENCES = {
    "untrained": ("untrained", "untrained host"),
    "grid": ("grid", "fixed grid"),
    "kmeans_rgb": ("k-means RGB", "k-means on RGB"),
    "kmeans_features": ("k-means features", "k-means on the same features"),
}
"""What needs no learning: prefix of its columns, its row of `summary.json`, and its title in tables."""

COLUMNS = (
    *("set", "slots", "variant", "seed", "step"),
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
        keys = [
            RunKey(str(of), int(slots), str(variant["name"]), int(seed))
            for of in matrix["sets"]
            for slots in matrix["slots"]
            for seed in matrix["seeds"]
            for variant in matrix["variants"]
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"Expected {folder} to be the folder of a comparison, with a whole matrix.json, but got "
            f"{type(error).__name__}. Pass the folder that `ssync-pl compare --out` wrote."
        ) from error
    keys += sorted(
        RunKey(path.parts[-5], int(path.parts[-4][6:]), path.parts[-3], int(path.parts[-2][5:]))
        for path in folder.glob("runs/*/slots_[0-9]*/*/seed_[0-9]*/evaluation.json")
    )
    records: dict[RunKey, Record] = {}
    missing: dict[RunKey, str] = {}
    damaged: dict[RunKey, str] = {}
    for key in dict.fromkeys(keys):
        place = key.folder(folder)
        if not (place / "evaluation.json").is_file():
            last = log_lines(place)[-1:]
            started = (place / "log.txt").is_file()
            missing[key] = f"did not finish; its log ends with: {''.join(last)[:300]}" if started else "not started"
            continue
        try:
            records[key] = _read_record(place, key)
        except ConfigError as error:
            damaged[key] = str(error)
    return Comparison(folder, matrix, records, missing, damaged)


def write_results(path: Path, frame: pd.DataFrame) -> Path:
    """Writes `results.csv`, complete or not at all."""
    return write_bytes(path, frame.to_csv(index=False, lineterminator="\n").encode())


def read_results(path: Path) -> pd.DataFrame:
    """Reads a `results.csv`; what is missing becomes NaN."""
    return pd.read_csv(path, dtype={"set": str, "variant": str})


def _read_record(place: Path, key: RunKey) -> Record:
    job, evaluation = (_read(place / name, _read_json) for name in ("job.json", "evaluation.json"))
    rows = _read(place / "summary.json", lambda path: _read_json(path)["rows"], {})
    curves = _read(place / "metrics.csv", _read_curves, pd.DataFrame())
    shared = int(evaluation.get("first_step") or 0)
    if shared and job.get("source"):
        source = key._replace(variant=str(job["source"])).folder(place.parents[4])
        before = _read(source / "metrics.csv", _read_curves, pd.DataFrame())
        curves = pd.concat([before[before.index < shared], curves[curves.index >= shared]])
    row: dict[str, Any] = {**rows.get("this run", {}), **evaluation, **evaluation.get("scores", {}), **key._asdict()}
    row |= {"recipe": job.get("recipe"), "shared_steps": shared}
    if "ssync/merged_slots" in curves:
        row["merged_slots"] = curves["ssync/merged_slots"].dropna().iloc[-1]
    row = {name: value for name, value in row.items() if name in COLUMNS}
    for prefix, (name, _) in REFERENCES.items():
        row |= {f"{prefix}_{score}": value for score, value in rows.get(name, {}).items() if score in METRICS}
    sheets = sorted((place / "pictures").glob("step-*.png"))
    return Record(row, curves, sheets[-1] if sheets else None, shlex.join(map(str, job.get("command", []))))


def _read(path: Path, read: Callable[[Path], Any], absent: Any = None) -> Any:
    """Reads a file of a run; `absent` takes the place of one that is not there."""
    if absent is not None and not path.is_file():
        return absent
    try:
        return read(path)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"{path.name} is damaged or missing; remove {path.parent} and give the same command again"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no object")
    return content


def _read_curves(path: Path) -> pd.DataFrame:
    """What was logged, by training step."""
    curves = pd.read_csv(path).apply(pd.to_numeric, errors="coerce").dropna(subset="step").dropna(axis=1, how="all")
    return curves.set_index("step").sort_index()
