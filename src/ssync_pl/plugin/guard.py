"""Notices when slots fall out of use after SSync was switched on, and says what to do."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssync_pl.method.labels import compute_dtype, hard_labels, mask_slots, slot_areas
from ssync_pl.method.loss import mean_over_ranks
from ssync_pl.method.maps import SSyncMaps
from ssync_pl.plugin.config import CollapseAction

_SMALLEST_FACTOR = 1 / 64
# Slots on average by which a host has to grow, so that hosts that drop another number in each batch do not count.
_GROWTH = 0.5
_STATE = ("factor", "before", "existing_before", "count", "told", "on")


def used_slots(maps: SSyncMaps) -> Tensor:
    """Returns ``(2,)``: mean number of slots that win a patch of the clip in the encoder's and the decoder's map."""
    with torch.no_grad():
        counts = []
        for value in (maps.attention, maps.masks):
            scores = mask_slots(value.to(compute_dtype(value.dtype)), maps.slot_valid)
            areas = slot_areas(hard_labels(scores), scores.shape[2], maps.patch_valid)
            counts.append((areas > 0).sum(1).float().mean())
        return torch.stack(counts)


def existing_slots(maps: SSyncMaps) -> Tensor | float:
    """Returns the mean number of slots that exist in a video; a plain number where all of them do."""
    return float(maps.shape[2]) if maps.slot_valid is None else maps.slot_valid.sum(1).float().mean()


@dataclass(frozen=True)
class GuardVerdict:
    """What the guard found at the end of a window; the message is empty when there is nothing new."""

    collapsed: bool
    message: str = ""
    stop: bool = False


class CollapseGuard:
    """Compares the slots in use with those before SSync was switched on.

    "Everything in one slot" has zero SSync loss: no boundary, one interior. A host whose own loss is small or that has
    not found its objects can fall into it, so the number of slots that win a patch is watched, for both maps. Counts
    stay on the device; they are read once per window.

    Some hosts change how many slots exist. Where they drop slots, only those that exist can be missed; where they add
    slots, later windows are compared with the count in use then, if it is larger.
    """

    def __init__(self, action: CollapseAction, threshold: float, window: int) -> None:
        self.action = action
        self.threshold = threshold
        self.window = window
        self.factor = 1.0  # what "backoff" makes of the weight
        self.before: tuple[float, float] | None = None
        self.latest: tuple[float, float] | None = None  # mean slots in use of encoder and decoder in the last window
        self._existing = math.inf
        self.existing_before: float | None = None
        self._sum: Tensor | None = None
        self.count = 0
        self.told = False
        self.on = False

    def watch(self, used: Tensor, existing: Tensor | float = math.inf) -> None:
        """Counts slots in use before switching on; arguments as in `step`."""
        used = used.detach().float()
        existing = existing.detach().to(used) if isinstance(existing, Tensor) else used.new_full((), existing)
        counts = torch.cat([used, existing.reshape(1)])
        self._sum = counts if self._sum is None else self._sum.to(used.device) + counts
        self.count += 1

    def step(self, used: Tensor, existing: Tensor | float = math.inf) -> GuardVerdict | None:
        """Counts slots in use with SSync on; gives a verdict at the end of a window, None in between.

        ``used`` is ``(2,)``, the mean slots in use of the encoder's and the decoder's map; ``existing`` the mean number
        of slots that exist in a video, infinity when unknown.
        """
        if self._sum is not None:
            # A loaded state is on the CPU, and ranks may only be able to sum on their devices.
            self._sum = self._sum.to(used.device)
        if not self.on:
            self.on = True
            self.before = self._take() if self.count else None
            self.existing_before = None if self.before is None else self._existing
        self.watch(used, existing)
        if self.count < self.window:
            return None
        self.latest = self._take()
        if self.before is None or self.existing_before is None:
            # No warm-up: the first window stands for "before".
            self.before, self.existing_before = self.latest, self._existing
        verdict = self._judge(self.before, self.latest)
        if self.existing_before < self._existing - _GROWTH:
            self.before = (max(self.before[0], self.latest[0]), max(self.before[1], self.latest[1]))
            self.existing_before = self._existing
        return verdict

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs, as plain numbers."""
        total = None if self._sum is None else self._sum.tolist()
        return {**{name: getattr(self, name) for name in _STATE}, "sum": total}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from what `state_dict` returned; what is of another type or size raises, and changes nothing."""
        before, existing, total = state["before"], state["existing_before"], state["sum"]
        on, told, factor, count = bool(state["on"]), bool(state["told"]), float(state["factor"]), int(state["count"])
        pair = None if before is None else (float(before[0]), float(before[1]))
        existing = None if existing is None else float(existing)
        self._sum = None if total is None else torch.tensor([*map(float, total)]).reshape(3)
        self.before, self.existing_before, self.factor, self.count, self.told = pair, existing, factor, count, told
        self.on = on and None not in (pair, existing)

    def _judge(self, before: tuple[float, float], now: tuple[float, float]) -> GuardVerdict:
        before = (min(before[0], self._existing), min(before[1], self._existing))
        share = min(n / max(b, 1.0) for n, b in zip(now, before, strict=True))
        if share >= self.threshold:
            self.told = False
            if self.factor < 1.0:
                self.factor = min(1.0, max(self.factor * 2, _SMALLEST_FACTOR))
            return GuardVerdict(collapsed=False)
        if self.action == "backoff":
            self.factor = self.factor / 2 if self.factor > _SMALLEST_FACTOR else 0.0
        new, self.told = not self.told, True
        return GuardVerdict(True, self._message(before, now) if new else "", stop=self.action == "stop")

    def _message(self, before: tuple[float, float], now: tuple[float, float]) -> str:
        done = {
            "warn": "Nothing was changed; on_collapse='backoff' lowers the weight by itself.",
            "backoff": f"The weight of SSync is halved (now x {self.factor:g}) until they recover.",
            "stop": "The training stops after this step (in a loop of your own: look at `should_stop`).",
        }[self.action]
        return (
            f"Slots fall out of use since SSync was switched on: encoder {before[0]:.1f} -> {now[0]:.1f}, decoder "
            f"{before[1]:.1f} -> {now[1]:.1f} (threshold {self.threshold:.0%}). One slot for everything has zero SSync "
            f"loss. {done} A longer warm-up, a ramp or `relative_weight` (0.1, say) help immature hosts."
        )

    def _take(self) -> tuple[float, float]:
        total = torch.zeros(3) if self._sum is None else self._sum / max(self.count, 1)
        self._sum, self.count = None, 0
        # All ranks have to come to the same verdict.
        encoder, decoder, self._existing = mean_over_ranks(total).tolist()
        return encoder, decoder
