"""Learning curves of runs that were killed and continued, whole again."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from ssync_pl.data.files import write_bytes

__all__ = ["complete_curve", "join_curves", "read_curve", "set_curve_aside", "write_curve"]

Row = dict[str, str]


def read_curve(path: Path) -> list[Row]:
    """Read a `metrics.csv`.

    Args:
        path: The file; it may be missing, and its last line may be cut short.

    Returns:
        Its rows with a step, without what is empty.

    Example:
        >>> read_curve(Path("none.csv"))
        []
    """
    if not path.is_file():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        rows = [{key: value for key, value in row.items() if key and value} for row in csv.DictReader(file)]
    return [row for row in rows if row.get("step", "").isdecimal()]


def join_curves(before: Sequence[Row], after: Sequence[Row]) -> list[Row]:
    """Put the curve of a continued run behind that of the run before.

    Args:
        before: Rows until the run was killed.
        after: Rows since it goes on, from a checkpoint before that.

    Returns:
        The rows of both; what was done twice comes from `after`.

    Example:
        >>> join_curves([{"step": "1"}, {"step": "3", "a": "x"}], [{"step": "3", "a": "y"}])
        [{'step': '1'}, {'step': '3', 'a': 'y'}]
    """
    if not after:
        return list(before)
    first = min(int(row["step"]) for row in after)
    return [*(row for row in before if int(row["step"]) < first), *after]


def write_curve(path: Path, rows: Sequence[Row]) -> None:
    """Write a `metrics.csv`, complete or not at all.

    Args:
        path: The file.
        rows: Its rows.
    """
    names = sorted({name for row in rows for name in row})
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, names)
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(path, text.getvalue().encode())


def set_curve_aside(folder: Path) -> None:
    """Keep the curve of a killed run, because the logger of the run that goes on starts its file anew.

    Args:
        folder: Folder of the run.
    """
    rows = join_curves(read_curve(folder / "metrics_before.csv"), read_curve(folder / "metrics.csv"))
    if rows:
        write_curve(folder / "metrics_before.csv", rows)
    (folder / "metrics.csv").unlink(missing_ok=True)


def complete_curve(folder: Path) -> None:
    """Put what was set aside and what came after it into one `metrics.csv`.

    Args:
        folder: Folder of the run.
    """
    aside = folder / "metrics_before.csv"
    if aside.is_file():
        write_curve(folder / "metrics.csv", join_curves(read_curve(aside), read_curve(folder / "metrics.csv")))
        aside.unlink()
