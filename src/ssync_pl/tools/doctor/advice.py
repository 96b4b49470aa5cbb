"""What to write, and what to think of before."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ssync_pl.adapters.pairing import MapKind
from ssync_pl.tools.doctor.report import DoctorReport

__all__ = ["Wanted", "hints", "lines", "manual_lines"]

# The published weights go with a host loss near 1.
_LOSS_RANGE = (0.2, 5.0)
_LOW_AGREEMENT = 0.5


@dataclass(frozen=True)
class Wanted:
    """How a host is to be read; the arguments of `SSyncCallback` with the same names."""

    adapter: str = "auto"
    attention: str | None = None
    masks: str | None = None
    attention_kind: MapKind = "probs"
    masks_kind: MapKind = "probs"
    grid: tuple[int, int] | None = None

    def values(self) -> dict[str, object]:
        """Arguments that are not the default."""
        plain = Wanted()
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: value for name, value in values.items() if value != getattr(plain, name)}

    def arguments(self) -> str:
        """Arguments as they are written in a call."""
        return ", ".join(f"{name}={value!r}" for name, value in self.values().items())


def lines(kind: str, wanted: Wanted) -> tuple[str, ...]:
    """The lines that add SSync to a script."""
    if kind != "lightning":
        arguments = ", ".join(text for text in ("model", wanted.arguments(), "total_steps=...") if text)
        return (
            "from ssync_pl import attach",
            f"with attach({arguments}) as ssync:",
            "    ...  # your training loop, and in each step, after the forward pass:",
            "    total = ssync.add(loss)",
            "    total.backward()",
        )
    yaml = ["trainer:", "  callbacks+:", "    - class_path: ssync_pl.SSyncCallback"]
    if wanted.values():
        yaml.append("      init_args:")
        yaml += [f"        {name}: {_yaml(value)}" for name, value in wanted.values().items()]
    return (
        "from ssync_pl import SSyncCallback",
        f"trainer = L.Trainer(..., callbacks=[SSyncCallback({wanted.arguments()})])",
        "",
        "# or, in the configuration of a LightningCLI:",
        *yaml,
    )


def manual_lines(wanted: Wanted) -> tuple[str, ...]:
    """The lines for a LightningModule that calls backward itself."""
    return (
        "from ssync_pl import SSyncMaps, SSyncRegularizer",
        "class MyModel(SSyncRegularizer, L.LightningModule):",
        "    def training_step(self, batch, batch_idx):",
        "        loss, dots, alpha = ...  # yours, with both maps as (B, T, S, N)",
        "        maps = SSyncMaps(attention_logits=dots, mask_logits=alpha, grid=(H, W))",
        "        self.manual_backward(self.ssync(loss, maps))",
    )


def hints(report: DoctorReport) -> tuple[str, ...]:
    """What the numbers of a host that can be used suggest."""
    found = []
    if report.loss is not None and not math.isfinite(report.loss):
        found.append(
            f"The host's own loss is {report.loss}: nothing can be trained like this. Check the host and the batch."
        )
    elif report.loss is not None and not _LOSS_RANGE[0] <= abs(report.loss) <= _LOSS_RANGE[1]:
        found.append(
            f"The host's own loss is {report.loss:.3g}, and the published weights go with one near 1: "
            "relative_weight=0.1 adds a tenth of the host's loss instead."
        )
    if report.shape is not None and report.shape[2] == 1:
        found.append("There is one slot: both maps are 1 everywhere, so that SSync is 0 and changes nothing.")
    if report.shape is not None:
        for one in report.maps:
            if one.used_slots < 0.5 * report.shape[2]:
                found.append(
                    f"In the {one.side}, {one.used_slots:.1f} of {report.shape[2]} slots win a patch: the host is not "
                    "trained, or has collapsed. SSync pulls further in that direction: switch it on late "
                    "(warmup_ratio), and use on_collapse='backoff'."
                )
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


def _yaml(value: object) -> str:
    return str(list(value)) if isinstance(value, tuple) else f'"{value}"' if ":" in str(value) else str(value)
