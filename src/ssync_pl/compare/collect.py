"""One table row a finished run, out of the files in its folder."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ssync_pl.compare.curves import read_curve
from ssync_pl.data.files import write_bytes
from ssync_pl.errors import ConfigError

__all__ = ["BASELINES", "COLUMNS", "collect_run", "collect_runs", "number", "read_results", "write_results"]

SCORES = (
    "video_fg_ari",
    "video_ari",
    "video_mbo",
    "video_miou",
    "image_fg_ari",
    "image_ari",
    "image_mbo",
    "image_miou",
    "boundary_f",
    "slots_per_object",
    "unused_slots",
    "used_slots",
    "identity",
)
# Of slot attention, where the host has one map a frame: which of its two maps is the better teacher.
ENCODER = ("encoder_video_fg_ari", "encoder_video_ari", "encoder_video_mbo", "encoder_boundary_f")
PROBES = ("probe_position_r2", "probe_color_r2", "probe_shape_accuracy")
COLUMNS = (
    *("set", "slots", "variant", "seed", "step"),
    *SCORES,
    *ENCODER,
    *PROBES,
    *(
        "step_ms",
        "peak_mib",
        "wall_seconds",
        "cpu_seconds",
        "shared_steps",
        "merged_slots",
        "recipe",
        "device",
        "torch",
        "date",
    ),
)
BASELINES = {"untrained": "untrained", "grid": "grid", "k-means RGB": "kmeans_rgb"}

Row = dict[str, Any]


def collect_run(folder: Path) -> Row | None:
    """Read what a finished run left.

    Args:
        folder: Folder of the run.

    Returns:
        Its row by column name; None when the run is not finished.

    Raises:
        ConfigError: A file of a finished run is damaged.

    Example:
        >>> collect_run(Path("none")) is None
        True
    """
    if not (folder / "run.json").is_file():
        return None
    facts, evaluation, summary = (_read(folder / name) for name in ("run.json", "evaluation.json", "summary.json"))
    tables: Mapping[str, Mapping[str, Any]] = summary.get("rows", {})
    found = dict(tables.get("this run", {}))
    found.update({name: value for name, value in evaluation.get("scores", {}).items() if value is not None})
    row: Row = {name: facts.get(name) for name in COLUMNS}
    row.update({name: found.get(name) for name in (*SCORES, *ENCODER)})
    probe = {f"probe_{name.removeprefix('probe_')}": value for name, value in evaluation.get("probe", {}).items()}
    row.update({name: probe.get(name) for name in PROBES})
    row["step"] = evaluation.get("steps", summary.get("step"))
    row.update({name: evaluation.get(name) for name in ("step_ms", "peak_mib")})
    merged = [
        entry["ssync/merged_slots"] for entry in read_curve(folder / "metrics.csv") if "ssync/merged_slots" in entry
    ]
    row["merged_slots"] = float(merged[-1]) if merged else None
    for table, prefix in BASELINES.items():
        row.update({f"{prefix}_{score}": tables[table].get(score) for score in SCORES if table in tables})
    return {name: value for name, value in row.items() if value is not None or name in COLUMNS}


def collect_runs(folders: Iterable[Path]) -> list[Row]:
    """Read all runs that are finished.

    Args:
        folders: Folders of runs.

    Returns:
        Their rows in order.

    Example:
        >>> collect_runs([Path("none")])
        []
    """
    return [row for folder in folders if (row := collect_run(folder)) is not None]


def write_results(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write `results.csv`, complete or not at all.

    Args:
        path: The file.
        rows: One mapping a run; a missing value becomes an empty cell.

    Returns:
        The path.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> path = write_results(Path(folder.name) / "results.csv", [{"set": "c", "seed": 0, "video_mbo": None}])
        >>> read_results(path)[0]["seed"], read_results(path)[0]["video_mbo"]
        ('0', '')
        >>> folder.cleanup()
    """
    more = sorted({name for row in rows for name in row} - set(COLUMNS), key=_place)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [*COLUMNS, *more], restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
    return write_bytes(path, text.getvalue().encode())


def read_results(path: Path) -> list[dict[str, str]]:
    """Read a `results.csv`.

    Args:
        path: The file.

    Returns:
        Its rows, every value as text.
    """
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def number(value: Any) -> float:
    """Read a value of a row.

    Args:
        value: A number, its text, an empty text or None.

    Returns:
        The number; NaN for what is missing.

    Example:
        >>> number("0.5"), number("")
        (0.5, nan)
    """
    if value is None or value == "":
        return math.nan
    return float(value)


def _place(name: str) -> tuple[int, int]:
    for place, prefix in enumerate(BASELINES.values()):
        if name.startswith(f"{prefix}_"):
            return place, SCORES.index(name.removeprefix(f"{prefix}_"))
    return len(BASELINES), 0


def _cell(value: Any) -> Any:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    return value


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"Expected {path} to hold JSON, but it is damaged. Remove the folder and run again."
        ) from error
    return content if isinstance(content, dict) else {}
