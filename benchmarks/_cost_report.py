"""Tables, exponents and figure of `cost.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from _timing import exponent

__all__ = ["draw", "fitted", "size_of", "sweep", "tables"]

AXES = {"videos": "videos B", "frames": "frames T", "side": "patches N", "slots": "slots S"}
COLOURS = {
    "torch": "tab:blue",
    "triton": "tab:purple",
    "vectorised": "tab:gray",
    "loop": "tab:orange",
    "dense": "tab:red",
}


def size_of(row: dict[str, Any], axis: str) -> int:
    """Size that a sweep varies.

    Args:
        row: Of the results.
        axis: ``"videos"``, ``"frames"``, ``"side"`` or ``"slots"``.

    Returns:
        Patches of a frame for ``"side"``, else the number itself.
    """
    return int(row[axis]) ** 2 if axis == "side" else int(row[axis])


def sweep(rows: list[dict[str, Any]], axis: str, method: str, key: str) -> tuple[list[float], list[float]]:
    """Sizes and values of one line of the figure.

    Args:
        rows: Of the results.
        axis: The sweep.
        method: Its name.
        key: A column.

    Returns:
        Sizes, ascending, and values.
    """
    mine = sorted((size_of(r, axis), float(r[key])) for r in rows if (r["table"], r["method"]) == (axis, method))
    return [float(size) for size, _ in mine], [value for _, value in mine]


def tables(rows: list[dict[str, Any]]) -> str:
    """The main and the rival shapes, with ratios to the vectorised version.

    Args:
        rows: Of the results.

    Returns:
        Text.
    """
    on_device = any(row.get("graph_ms") for row in rows)
    more = (" graph ms | kernels | waits |", "---|---|---|") if on_device else ("", "")
    lines = [
        "| shape | method | ms (quartiles) | fastest | × vectorised | peak MiB | operators |" + more[0],
        "|---|---|---|---|---|---|---|" + more[1],
    ]
    for table in ("main", "rival"):
        part = [row for row in rows if row["table"] == table]
        for shape in dict.fromkeys(_shape(row) for row in part):
            here = [row for row in part if _shape(row) == shape]
            base = [float(row["min_ms"]) for row in here if row["method"] == "vectorised"]
            for row in here:
                ratio = f"{float(row['min_ms']) / base[0]:.2f}" if base else ""
                spread = f"{_ms(row['median_ms'])} ({_ms(row['low_ms'])} – {_ms(row['high_ms'])})"
                lines.append(
                    f"| {shape} | {row['method']} | {spread} | {_ms(row['min_ms'])} | {ratio} "
                    f"| {_number(row, 'peak_mib', '.1f')} | {_number(row, 'ops', '.0f')} |"
                    + (_device_cells(row) if on_device else "")
                )
    return "\n".join(lines)


def fitted(rows: list[dict[str, Any]]) -> str:
    """Exponents of time, over a whole sweep and between its two largest sizes.

    Args:
        rows: Of the results.

    Returns:
        Text.
    """
    lines = ["| sweep | method | sizes | exponent | of the last step |", "|---|---|---|---|---|"]
    for axis in AXES:
        for method in COLOURS:
            sizes, times = sweep(rows, axis, method, "min_ms")
            if len(sizes) > 1:
                whole, last = exponent(sizes, times), exponent(sizes[-2:], times[-2:])
                span = f"{sizes[0]:.0f} – {sizes[-1]:.0f}"
                lines.append(f"| {AXES[axis]} | {method} | {span} | {whole:.2f} | {last:.2f} |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Time and memory over each sweep.

    Args:
        rows: Of the results.
        path: The PNG file.
        title: Machine and versions.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    axes = [axis for axis in AXES if any(row["table"] == axis for row in rows)]
    if not axes:
        return
    figure, grid = plt.subplots(2, len(axes), figsize=(3.6 * len(axes), 6.4), squeeze=False, sharey="row")
    for column, axis in enumerate(axes):
        for method, colour in COLOURS.items():
            sizes, times = sweep(rows, axis, method, "min_ms")
            if not sizes:
                continue
            slope = f" ({exponent(sizes, times):.2f})" if len(sizes) > 1 else ""
            grid[0][column].plot(sizes, times, "o-", ms=3, color=colour, label=method + slope)
            grid[1][column].plot(*sweep(rows, axis, method, "peak_mib"), "o-", ms=3, color=colour)
        for line in grid:
            line[column].set_xscale("log", base=2)
            line[column].set_yscale("log")
            line[column].grid(alpha=0.3)
        grid[0][column].legend(fontsize=7, title="exponent in brackets", title_fontsize=7)
        grid[1][column].set_xlabel(AXES[axis])
    grid[0][0].set_ylabel("forward and backward, ms (fastest call)")
    grid[1][0].set_ylabel("peak memory beside the maps, MiB")
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _device_cells(row: dict[str, Any]) -> str:
    return "".join(f" {_number(row, *cell)} |" for cell in (("graph_ms", ".4f"), ("kernels", ".0f"), ("syncs", ".0f")))


def _number(row: dict[str, Any], key: str, form: str) -> str:
    return "" if row.get(key) in (None, "") else format(float(row[key]), form)


def _shape(row: dict[str, Any]) -> str:
    return f"B{row['videos']} T{row['frames']} S{row['slots']} {row['side']}²"


def _ms(value: Any) -> str:
    value = float(value)
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
