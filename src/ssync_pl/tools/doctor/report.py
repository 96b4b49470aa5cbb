"""What the doctor found, what it advises, and both as text."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["CostReport", "DoctorReport", "MapReport", "hints", "lines", "manual_lines", "render_report"]

_LOSS_RANGE = (0.2, 5.0)  # the published weights go with a host loss near 1
_LOW_AGREEMENT = 0.5


@dataclass(frozen=True)
class MapReport:
    """One of the two maps: where it was found, range of its sums over slots, what its gradient reaches."""

    side: str
    places: tuple[str, ...]
    kind: str
    sums: tuple[float, float]
    parameters: int
    reaches: tuple[str, ...]
    used_slots: float

    @property
    def has_gradient(self) -> bool:
        """Whether training can change this map."""
        return self.parameters > 0


@dataclass(frozen=True)
class CostReport:
    """What SSync costs in a training step, measured here and now."""

    device: str
    ssync_seconds: float
    step_seconds: float
    bytes: int

    @property
    def share(self) -> float:
        """Cost of SSync in units of the host's own step."""
        return self.ssync_seconds / max(self.step_seconds, 1e-12)


@dataclass(frozen=True)
class DoctorReport:
    """Everything that `ssync-pl doctor` says; `kind` is `"lightning"` or `"plain"`."""

    host: str
    kind: str
    adapter: str | None = None
    part: str = ""  # path of the part of the host that the adapter listens to
    batch: str = ""
    shape: tuple[int, int, int, int] | None = None  # (B, T, S, N)
    grid: tuple[int, int] | None = None  # (H, W) patches
    maps: tuple[MapReport, ...] = ()
    loss: float | None = None
    boundary_loss: float | None = None
    interior_loss: float | None = None
    boundary_fraction: float | None = None
    agreement: float | None = None  # share of patches that both maps give to the same slot
    merged_slots: float | None = None
    cost: CostReport | None = None
    problems: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()
    candidates: tuple[str, ...] = ()  # softmaxes that were looked at, where no map was found
    lines: tuple[str, ...] = ()

    @property
    def ready(self) -> bool:
        """Whether the lines can be added as they are."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """Returns the report for other programs."""
        values = {"ready": self.ready, **asdict(self)}
        values["maps"] = [asdict(one) | {"has_gradient": one.has_gradient} for one in self.maps]
        if self.cost is not None:
            values["cost"]["share"] = self.cost.share
        return values


def lines(kind: str, settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the lines that add SSync to a script, with `settings` of `SSyncCallback`."""
    arguments = ", ".join(f"{name}={value!r}" for name, value in settings.items())
    if kind != "lightning":
        return (
            "from ssync_pl import attach",
            f"with attach({', '.join(filter(None, ('model', arguments, 'total_steps=...')))}) as ssync:",
            "    ...  # your training loop, and in each step, after the forward pass:",
            "    total = ssync.add(loss)",
            "    total.backward()",
        )
    yaml = ["      init_args:"] if settings else []
    for name, value in settings.items():
        text = str(list(value)) if isinstance(value, tuple) else f'"{value}"' if ":" in str(value) else str(value)
        yaml.append(f"        {name}: {text}")
    return (
        "from ssync_pl import SSyncCallback",
        f"trainer = L.Trainer(..., callbacks=[SSyncCallback({arguments})])",
        "",
        "# or, in the configuration of a LightningCLI:",
        "trainer:",
        "  callbacks+:",
        "    - class_path: ssync_pl.SSyncCallback",
        *yaml,
    )


def manual_lines() -> tuple[str, ...]:
    """Returns the lines for a LightningModule that calls backward itself."""
    return (
        "from ssync_pl import SSyncMaps, SSyncRegularizer",
        "class MyModel(SSyncRegularizer, L.LightningModule):",
        "    def training_step(self, batch, batch_idx):",
        "        loss, dots, alpha = ...  # yours, with both maps as (B, T, S, N)",
        "        maps = SSyncMaps(attention_logits=dots, mask_logits=alpha, grid=(H, W))",
        "        self.manual_backward(self.ssync(loss, maps))",
    )


def hints(report: DoctorReport) -> tuple[str, ...]:
    """Returns what the numbers of a host that can be used suggest."""
    found = []
    slots = report.shape[2] if report.shape is not None else 0
    if report.loss is not None and not math.isfinite(report.loss):
        found.append(f"The host's own loss is {report.loss}: nothing can be trained. Check the host and the batch.")
    elif report.loss is not None and not _LOSS_RANGE[0] <= abs(report.loss) <= _LOSS_RANGE[1]:
        found.append(
            f"The host's own loss is {report.loss:.3g}, and the published weights go with one near 1: "
            "relative_weight=0.1 adds a tenth of the host's loss instead."
        )
    if slots == 1:
        found.append("There is one slot: both maps are 1 everywhere, so that SSync is 0 and changes nothing.")
    found += [
        f"In the {one.side}, {one.used_slots:.1f} of {slots} slots win a patch: the host is not trained, or has "
        "collapsed. SSync pulls further in that direction: switch it on late (warmup_ratio), and use "
        "on_collapse='backoff'."
        for one in report.maps
        if one.used_slots < 0.5 * slots
    ]
    if report.agreement is not None and report.agreement < _LOW_AGREEMENT:
        found.append(
            f"Both maps name the same slot in {report.agreement:.0%} of the patches only, as in an untrained host: "
            "leave the warm-up on (warmup_ratio=0.3 or more). With trained weights this number tells more."
        )
    if report.maps and report.maps[0].kind == "probs":
        found.append(
            "The attention comes as probabilities, so redundant slots are not merged: that needs logits. "
            "attention='softmax:path' takes them from the softmax inside a module."
        )
    return tuple(found)


def render_report(report: DoctorReport) -> str:
    """Writes a report for people."""
    kind = "LightningModule" if report.kind == "lightning" else "plain PyTorch"
    text = [_row("host", f"{report.host} ({kind})")]
    text.append(_row("adapter", (report.adapter or "none") + (f", at {report.part}" if report.part else "")))
    if report.batch:
        text.append(_row("batch", report.batch))
    if report.shape is not None:
        sizes = " ".join(f"{name}={size}" for name, size in zip("BTSN", report.shape, strict=True))
        text.append(_row("maps", f"{sizes}, grid {report.grid[0]} x {report.grid[1]}" if report.grid else sizes))
    for one in report.maps:
        low, high = one.sums
        sums = "sums are 1" if max(abs(low - 1), abs(high - 1)) < 0.01 else f"sums from {low:.3g} to {high:.3g}"
        reach = f"gradient reaches {one.parameters} parameters in {', '.join(one.reaches)}"
        text.append(_row("object masks" if one.side == "masks" else one.side, ", ".join(one.places)))
        text.append(
            _row(
                "", f"{one.kind}, {sums}, {one.used_slots:.1f} slots in use, {reach if one.reaches else 'NO gradient'}"
            )
        )
    if report.cost is not None:  # then all numbers are there
        losses = f"SSync {report.boundary_loss:.4g} (boundary) + {report.interior_loss:.4g} (interior)"
        text.append(_row("losses", f"host {report.loss:.4g}, {losses}"))
        shares = f"{report.agreement:.0%} of patches, {report.boundary_fraction:.0%} of patches at boundaries"
        text.append(
            _row("agreement", f"both maps name the same slot in {shares}, {report.merged_slots:.1f} slots merged")
        )
        cost = f"{report.cost.ssync_seconds:.3g} s beside {report.cost.step_seconds:.3g} s of the host's own step"
        size = f"{report.cost.bytes / 2**20:.3g} MiB, on {report.cost.device}"
        text.append(_row("cost", f"{cost} ({report.cost.share:.1%}), {size}"))
    if report.candidates:
        text += ["", "what was looked at:", *(f"  {one}" for one in report.candidates)]
    if report.problems:
        text += ["", "SSync cannot be used as it is:", *map(_item, report.problems)]
    if report.hints:
        text += ["", "to consider:", *map(_item, report.hints)]
    if report.lines:
        text += ["", "ready. Add:" if report.ready else "once that is settled:"]
        text += [f"  {line}".rstrip() for line in report.lines]
    elif report.ready:
        text += ["", "ready: nothing to add."]
    return "\n".join(text)


def _row(name: str, text: str) -> str:
    return f"{name:<13} {text}"


def _item(text: str) -> str:
    return textwrap.fill(text, 110, initial_indent="  - ", subsequent_indent="    ", break_on_hyphens=False)
