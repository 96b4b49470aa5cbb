"""What the doctor found, as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["CostReport", "DoctorReport", "MapReport"]


@dataclass(frozen=True)
class MapReport:
    """One of the two maps."""

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
    """Everything that `ssync-pl doctor` says.

    Args:
        host: Class of the model.
        kind: ``"lightning"`` or ``"plain"``.
        adapter: Name of the adapter that serves it; None when there is none.
        part: Path of the part of the host that the adapter listens to; empty for the host itself.
        batch: Shapes of the batch, in words.
        shape: ``(B, T, S, N)`` of the maps.
        grid: ``(H, W)`` patches.
        maps: Attention and masks.
        loss: The host's own loss; None where the step gave none.
        boundary_loss: Of SSync, decoder side.
        interior_loss: Of SSync, encoder side.
        boundary_fraction: Share of boundary patches.
        agreement: Share of patches that both maps give to the same slot.
        merged_slots: Mean number of slots that took the label of another one.
        cost: Time and memory.
        problems: Why SSync cannot be used; empty when it can.
        hints: What to think of.
        candidates: What was looked at, where no map was found.
        lines: What to add to the user's script.

    Example:
        >>> DoctorReport(host="Net", kind="plain", problems=("no slots",)).ready
        False
    """

    host: str
    kind: str
    adapter: str | None = None
    part: str = ""
    batch: str = ""
    shape: tuple[int, int, int, int] | None = None
    grid: tuple[int, int] | None = None
    maps: tuple[MapReport, ...] = ()
    loss: float | None = None
    boundary_loss: float | None = None
    interior_loss: float | None = None
    boundary_fraction: float | None = None
    agreement: float | None = None
    merged_slots: float | None = None
    cost: CostReport | None = None
    problems: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()
    candidates: tuple[str, ...] = ()
    lines: tuple[str, ...] = field(default=())

    @property
    def ready(self) -> bool:
        """Whether the lines can be added as they are."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """The report for other programs."""
        values = {"ready": self.ready, **asdict(self)}
        for entry, one in zip(values["maps"], self.maps, strict=True):
            entry["has_gradient"] = one.has_gradient
        if self.cost is not None:
            values["cost"]["share"] = self.cost.share
        return values
