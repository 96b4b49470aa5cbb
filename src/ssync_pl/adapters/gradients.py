"""Measures the gradient of the host and that of SSync where both meet: at the two maps."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ssync_pl.errors import ConfigError
from ssync_pl.method.loss import mean_over_ranks
from ssync_pl.method.maps import SSyncMaps

# What adapters do to a host's tensor on the way to (B, T, S, N); a gradient keeps its size through all of them.
_RESHAPES = (
    *("View", "UnsafeView", "ReshapeAlias", "Clone", "Alias", "ToCopy"),
    *("Transpose", "Permute", "Unsqueeze", "Squeeze", "Stack", "Cat"),
)
# As a share of SSync's squared gradient: below it, the rest of the gradient is not the host's.
_ROUNDING = 1e-4
# Of the gradient at a patch, root mean square: below it, weights grow no more while SSync's gradient goes to zero.
_FLOOR = 1e-3
_RUNNING_DECAY = 0.98


class GradientMeter:
    """Compares the host's gradient with SSync's at the two maps, on the device.

    SSync reads a branch of each map, where a hook sees the gradient of SSync alone; the node of the host's graph that
    made the map sees the whole gradient. The gradient of what is added says how all of them are scaled.

    Attributes:
        weight: ``(2,)`` weights that SSync's losses at attention and at masks had in the last backward pass.
        ratio: ``(2,)`` norm of the host's gradient over that of SSync's at weight 1, on running averages; 0 where the
            host has no gradient at either map, NaN where nothing is known yet.
    """

    def __init__(self) -> None:
        self.weight = torch.ones(2, dtype=torch.float32)
        self.ratio = torch.full((2,), torch.nan, dtype=torch.float32)
        self._averages: Tensor | None = None  # (2, 2): of the host and of SSync; at attention and at masks
        # Squares: whole gradient and SSync's at attention, the same at masks, and the gradient of what is added.
        self._sums: Tensor | None = None

    def branch(self, maps: SSyncMaps) -> SSyncMaps:
        """Takes up what the last backward pass measured; returns the same maps, to be measured in the next one."""
        if torch.compiler.is_compiling():
            text = "Expected `gradient_share` outside of compiled graphs, but the training step is compiled."
            raise ConfigError(f"{text} Compile the host alone, or give `relative_weight`.")
        device = maps.attention.device
        # Each rank's own averages would weight ranks differently.
        self._averages = running_average(self._averages, mean_over_ranks(self._norms(device)))
        batch, frames, _, patches = maps.shape
        host, own = self._averages
        ratio = host / own.clamp_min(_FLOOR / math.sqrt(batch * frames * patches))
        self.ratio = torch.where(ratio > 0, ratio, ratio.flip(0))  # a map that the host trains another way
        self._sums = torch.zeros(5, dtype=torch.float32, device=device)
        branches = {}
        for place, name in ((0, "attention"), (2, "mask")):
            kind = f"{name}_logits" if getattr(maps, f"{name}_probs") is None else f"{name}_probs"
            value = getattr(maps, kind)
            if value.requires_grad:
                for node, output in _host_nodes(value):
                    node.register_prehook(_Adder(self._sums[place], output))
                branches[kind] = value.view_as(value)
                branches[kind].register_hook(_Adder(self._sums[place + 1]))
        return replace(maps, **branches)

    def listen(self, term: Tensor, weight: Tensor) -> None:
        """Is told what is added to the host's loss, and the weights in it."""
        self.weight = weight
        if term.requires_grad and self._sums is not None:
            term.register_hook(_Adder(self._sums[4]))

    def host_norms(self) -> list[float]:
        """Returns the host's norms at attention and masks; NaN where unknown. Waits for the device."""
        return [] if self._averages is None else self._averages[0].tolist()

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs, as plain numbers."""
        values = {"sums": self._sums, "averages": self._averages, "weight": self.weight}
        return {name: None if value is None else value.tolist() for name, value in values.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from what `state_dict` returned; something else raises, and changes nothing."""
        shapes = {"sums": (5,), "averages": (2, 2), "weight": (2,)}
        sums, averages, weight = (
            None if state[name] is None else torch.tensor(state[name], dtype=torch.float32).reshape(shape)
            for name, shape in shapes.items()
        )
        self._sums, self._averages = sums, averages
        self.weight = self.weight if weight is None else weight

    def _norms(self, device: torch.device) -> Tensor:
        """(2, 2) norms of the host's gradient and of SSync's at weight 1, at both maps; NaN where SSync had none."""
        if self._sums is None:
            return torch.full((2, 2), torch.nan, dtype=torch.float32, device=device)
        sums = self._sums.to(device)
        whole, own = (sums[:4] / sums[4]).view(2, 2).T
        host = torch.where(whole <= (1 + _ROUNDING) * own, 0.0, whole - own)
        known = (own > 0) & own.isfinite() & whole.isfinite()
        return torch.where(known, torch.stack([host, own / self.weight.to(device) ** 2]), torch.nan).sqrt()


def running_average(average: Tensor | None, value: Tensor) -> Tensor:
    """Moves an average of fifty steps; values that are not finite, as in an overflow, change nothing."""
    value = torch.where(value.isfinite(), value, torch.nan)
    if average is None:
        return value
    average = average.to(value.device)
    moved = average.lerp(value, 1 - _RUNNING_DECAY)
    return torch.where(average.isnan(), value, torch.where(value.isnan(), average, moved))


class _Adder:
    """A hook that adds the square of a gradient, or of one among those of a node, to a sum."""

    def __init__(self, total: Tensor, output: int | None = None) -> None:
        self.total = total
        self.output = output

    def __call__(self, gradient: Any) -> None:
        gradient = gradient if self.output is None else gradient[self.output]
        if gradient is not None:
            self.total += gradient.detach().float().square().sum()


def _host_nodes(value: Tensor) -> set[tuple[Any, int]]:
    """Finds the nodes, and which of their outputs, that made the tensors of which a map is put together."""
    found, waiting = set(), [(value.grad_fn, value.output_nr)]
    while waiting:
        node, output = waiting.pop()
        if node is None:
            continue
        if node.name().rstrip("0123456789").removesuffix("Backward") in _RESHAPES:
            waiting += node.next_functions
        elif not node.name().endswith("AccumulateGrad"):
            found.add((node, output))
    return found
