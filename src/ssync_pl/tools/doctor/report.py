"""What the doctor found, what it advises, and both as text."""

from __future__ import annotations

import math
import shlex
import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class DoctorReport:
    """Everything that `ssync-pl doctor` says; `kind` is `"lightning"` or `"plain"`."""

    host: str
    kind: str
    adapter: str | None = None
    part: str = ""  # path of the part of the host that the adapter listens to
    places: tuple[str, ...] = ()  # modules that are listened to, slot attention first
    batch: str = ""
    shape: tuple[int, int, int, int] | None = None  # (B, T, S, N)
    grid: tuple[int, int] | None = None  # (H, W) patches
    kinds: tuple[str, ...] = ()  # "logits", "probs" or both, of slot attention and of the masks
    used_slots: tuple[float, ...] = ()  # slots that win a patch, in slot attention and in the masks
    loss: float = 1.0
    boundary_loss: float | None = None
    interior_loss: float | None = None
    boundary_fraction: float | None = None
    agreement: float = 1.0  # share of patches that both maps give to the same slot
    merged_slots: float | None = None
    ssync_seconds: float | None = None
    step_seconds: float | None = None  # of the host's own step
    device: str = ""
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
        return {"ready": self.ready, **asdict(self)}


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
    words = ["--trainer.callbacks+=ssync_pl.SSyncCallback"]
    for name, value in settings.items():
        text = str(list(value)) if isinstance(value, tuple) else str(value)
        words.append(shlex.quote(f"--trainer.callbacks.{name}={text}"))
    return (
        "from ssync_pl import SSyncCallback",
        f"trainer = L.Trainer(..., callbacks=[SSyncCallback({arguments})])",
        "# or, on the command line of a LightningCLI:",
        f"python train.py fit ... {' '.join(words)}",
    )


def hints(report: DoctorReport) -> tuple[str, ...]:
    """Returns what the numbers of a host that can be used suggest."""
    found = []
    slots = report.shape[2] if report.shape else 0
    if not math.isfinite(report.loss):
        found.append(f"The host's own loss is {report.loss}: nothing can be trained. Check the host and the batch.")
    elif not 0.2 <= abs(report.loss) <= 5.0:
        found.append(
            f"The host's own loss is {report.loss:.3g}, and the published weights go with one near 1: "
            "relative_weight=0.1 adds a tenth of the host's loss instead."
        )
    if slots == 1:
        found.append("There is one slot: both maps are 1 everywhere, so that SSync is 0 and changes nothing.")
    found += [
        f"In the {side}, {used:.1f} of {slots} slots win a patch: the host is not trained, or has collapsed. SSync "
        "pulls further in that direction: switch it on late (warmup_ratio), and use on_collapse='backoff'."
        for side, used in zip(("attention", "masks"), report.used_slots, strict=False)  # none before the step
        if used < 0.5 * slots
    ]
    if report.agreement < 0.5:
        found.append(
            f"Both maps name the same slot in {report.agreement:.0%} of the patches only, as in an untrained host: "
            "leave the warm-up on (warmup_ratio=0.3 or more). With trained weights this number tells more."
        )
    if report.kinds[:1] == ("probs",):
        found.append(
            "The attention comes as probabilities, so redundant slots are not merged: that needs logits. "
            "attention='softmax:path' takes them from the softmax inside a module."
        )
    return tuple(found)


def render_report(report: DoctorReport) -> str:
    """Writes a report for people."""
    kind = "LightningModule" if report.kind == "lightning" else "plain PyTorch"
    rows = [("host", f"{report.host} ({kind})")]
    rows.append(("adapter", (report.adapter or "none") + (f", at {report.part}" if report.part else "")))
    rows += [("batch", report.batch)] if report.batch else []
    if report.shape is not None and report.ssync_seconds is not None and report.step_seconds is not None:
        sizes = " ".join(f"{name}={size}" for name, size in zip("BTSN", report.shape, strict=True))
        rows.append(("found at", ", ".join(report.places)))
        rows.append(("maps", f"{sizes}, grid {report.grid[0]} x {report.grid[1]}" if report.grid else sizes))
        for side, kind, used in zip(("attention", "masks"), report.kinds, report.used_slots, strict=True):
            rows.append((side, f"{kind}, {used:.1f} slots in use"))
        losses = f"SSync {report.boundary_loss:.4g} (boundary) + {report.interior_loss:.4g} (interior)"
        shares = f"{report.agreement:.0%} of patches, {report.boundary_fraction:.0%} of patches at boundaries"
        times = f"{report.ssync_seconds:.3g} s beside {report.step_seconds:.3g} s of the host's own step"
        share = report.ssync_seconds / max(report.step_seconds, 1e-12)
        rows.append(("losses", f"host {report.loss:.4g}, {losses}"))
        rows.append(("agreement", f"both maps name the same slot in {shares}, {report.merged_slots:.1f} slots merged"))
        rows.append(("cost", f"{times} ({share:.1%}), on {report.device}"))
    text = [f"{name:<13} {value}" for name, value in rows]
    if report.candidates:
        text += ["", "what was looked at:", *(f"  {one}" for one in report.candidates)]
    fill = textwrap.TextWrapper(110, "  - ", "    ", break_on_hyphens=False).fill
    for title, notes in (("SSync cannot be used as it is:", report.problems), ("to consider:", report.hints)):
        text += ["", title, *map(fill, notes)] if notes else []
    if report.lines:
        text += ["", "ready. Add:" if report.ready else "once that is settled:", *(f"  {one}" for one in report.lines)]
    elif report.ready:
        text += ["", "ready: nothing to add."]
    return "\n".join(text)
