"""The doctor's report as text."""

from __future__ import annotations

import textwrap

from ssync_pl.tools.doctor.report import CostReport, DoctorReport, MapReport

__all__ = ["render_report"]

_WIDTH = 110
_NAMES = {"attention": "attention", "masks": "object masks"}


def render_report(report: DoctorReport) -> str:
    """Write a report for people."""
    kind = "LightningModule" if report.kind == "lightning" else "plain PyTorch"
    adapter = report.adapter or "none"
    rows = [
        ("host", f"{report.host} ({kind})"),
        ("adapter", f"{adapter}, at {report.part}" if report.part else adapter),
    ]
    if report.batch:
        rows.append(("batch", report.batch))
    if report.shape is not None:
        sizes = " ".join(f"{name}={size}" for name, size in zip("BTSN", report.shape, strict=True))
        rows.append(("maps", f"{sizes}, grid {report.grid[0]} x {report.grid[1]}" if report.grid else sizes))
    rows += [(name, text) for one in report.maps for name, text in zip((_NAMES[one.side], ""), _map(one), strict=True)]
    rows += _numbers(report)
    if report.cost is not None:
        rows.append(("cost", _cost(report.cost)))
    lines = [f"{name:<13} {text}" for name, text in rows]
    if report.candidates:
        lines += ["", "what was looked at:", *(f"  {one}" for one in report.candidates)]
    if report.problems:
        lines += ["", "SSync cannot be used as it is:", *(_item(one) for one in report.problems)]
    if report.hints:
        lines += ["", "to think of:", *(_item(one) for one in report.hints)]
    if report.ready and not report.lines:
        lines += ["", "ready: nothing to add."]
    if report.lines:
        ready = "ready. Add:" if report.ready else "once that is settled:"
        lines += ["", ready, *(f"  {line}".rstrip() for line in report.lines)]
    return "\n".join(lines)


def _map(one: MapReport) -> list[str]:
    low, high = one.sums
    sums = "sums are 1" if max(abs(low - 1), abs(high - 1)) < 0.01 else f"sums from {low:.3g} to {high:.3g}"
    reach = f"gradient reaches {one.parameters} parameters in {', '.join(one.reaches)}"
    return [
        f"{', '.join(one.places) or 'not known'}",
        f"{one.kind}, {sums}, {one.used_slots:.1f} slots in use, {reach if one.has_gradient else 'NO gradient'}",
    ]


def _numbers(report: DoctorReport) -> list[tuple[str, str]]:
    rows = []
    if report.boundary_loss is not None and report.interior_loss is not None:
        host = "" if report.loss is None else f"host {report.loss:.4g}, "
        ssync = f"SSync {report.boundary_loss:.4g} (boundary) + {report.interior_loss:.4g} (interior)"
        rows.append(("losses", host + ssync))
    if report.agreement is not None:
        boundary = f", {report.boundary_fraction:.0%} of patches at boundaries" if report.boundary_fraction else ""
        merged = f", {report.merged_slots:.1f} slots merged" if report.merged_slots is not None else ""
        rows.append(
            ("agreement", f"both maps name the same slot in {report.agreement:.0%} of patches{boundary}{merged}")
        )
    return rows


def _cost(cost: CostReport) -> str:
    return (
        f"{_time(cost.ssync_seconds)} beside {_time(cost.step_seconds)} of the host's own step ({cost.share:.1%}), "
        f"{_size(cost.bytes)}, on {cost.device}"
    )


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.0f} KiB"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _item(text: str) -> str:
    return textwrap.fill(text, _WIDTH, initial_indent="  - ", subsequent_indent="    ", break_on_hyphens=False)
