"""What the doctor found, what it advises, and both as text."""

from __future__ import annotations

import math
import shlex
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class DoctorReport:
    """Everything that `ssync-pl doctor` says; `kind` is `"lightning"` or `"plain"`."""

    host: str
    kind: str
    batch: str = ""
    adapter: str | None = None
    places: tuple[str, ...] = ()  # modules that are listened to, slot attention first
    shape: tuple[int, ...] = ()  # (B, T, S, N)
    grid: tuple[int, int] | None = None  # (H, W) patches
    kinds: tuple[str, ...] = ()  # "logits" or "probs", of slot attention and of the masks
    numbers: Mapping[str, float] = field(default_factory=dict)  # losses, shares of patches, slots that win a patch
    problems: tuple[str, ...] = ()  # why SSync cannot be used as it is
    hints: tuple[str, ...] = ()
    candidates: tuple[str, ...] = ()  # softmaxes that were looked at, where no map was found
    lines: tuple[str, ...] = ()

    @property
    def ready(self) -> bool:
        """Whether the lines can be added as they are."""
        return not self.problems


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
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
    words = [shlex.quote(f"--trainer.callbacks.{name}={value}") for name, value in values.items()]
    return (
        "from ssync_pl import SSyncCallback",
        f"trainer = L.Trainer(..., callbacks=[SSyncCallback({arguments})])",
        "# or, on the command line of a LightningCLI:",
        " ".join(["python train.py fit ... --trainer.callbacks+=ssync_pl.SSyncCallback", *words]),
    )


def hints(report: DoctorReport, frames: set[int]) -> tuple[str, ...]:
    """Returns what the numbers of a host that can be used suggest; `frames` are the counts that its batch may have."""
    (batch, time, slots, _), loss = report.shape, report.numbers["loss"]
    scale = "the published weights go with one near 1: relative_weight=0.1 adds a tenth of the host's loss instead"
    merging = "Redundant slots are merged by logits only: attention='softmax:path' takes them from inside a module."
    missed = f"SSync sees {batch * time} frames of a batch of {max(frames, default=0)}: check that this is meant."
    advice = [
        (not math.isfinite(loss), f"The host's own loss is {loss}: check the host and the batch."),
        (not 0.2 <= abs(loss) <= 5.0 and math.isfinite(loss), f"The host's own loss is {loss:.3g}, and {scale}."),
        (bool(frames) and batch * time not in frames, missed),
        (slots == 1, "There is one slot: both maps are 1 everywhere, so that SSync is 0 and changes nothing."),
        (report.kinds[0] == "probs", merging),
    ]
    return tuple(text for holds, text in advice if holds)


def render_report(report: DoctorReport) -> str:
    """Writes a report for people."""
    kind = "LightningModule" if report.kind == "lightning" else "plain PyTorch"
    rows = {"host": f"{report.host} ({kind})", "adapter": report.adapter or "none", "batch": report.batch}
    if report.grid is not None:
        sizes = " ".join(f"{name}={size}" for name, size in zip("BTSN", report.shape, strict=True))
        own, boundary, interior, share, same, merged, attention, masks = report.numbers.values()
        rows |= {
            "found at": ", ".join(report.places),
            "maps": f"{sizes}, grid {report.grid[0]} x {report.grid[1]}",
            "attention": f"{report.kinds[0]}, {attention:.1f} slots in use",
            "masks": f"{report.kinds[1]}, {masks:.1f} slots in use",
            "losses": f"host {own:.4g}, SSync {boundary:.4g} (boundary) + {interior:.4g} (interior)",
            "agreement": f"same slot in {same:.0%} of patches, {share:.0%} at borders, {merged:.1f} slots merged",
        }
    text = [f"{name:<13} {value}" for name, value in rows.items() if value]
    if report.candidates:
        text += ["", "what was looked at:", *(f"  {one}" for one in report.candidates)]
    fill = textwrap.TextWrapper(110, "  - ", "    ", break_on_hyphens=False).fill
    for title, notes in (("SSync cannot be used as it is:", report.problems), ("to consider:", report.hints)):
        text += ["", title, *map(fill, notes)] if notes else []
    if report.ready:
        text += ["", "ready. Add:" if report.lines else "ready: nothing to add.", *(f"  {one}" for one in report.lines)]
    return "\n".join(text)
