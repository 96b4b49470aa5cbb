"""Slot attention in each slot's own frame of reference (Biza et al. 2023), SOLV's spatial binder."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssync_pl.errors import ConfigError, ShapeError
from ssync_pl.hosts.nn.weights import init_fan_in_

__all__ = ["BoundSlots", "RelativeSlotAttention", "SlotPose", "attention_pose"]

# A grid cell's position is divided by this many spreads of the slot, so that relative positions are of order 1.
_REACH = 5.0
# In standard deviations of a projected patch: how far its values are lifted above a ReLU's kink to pass it unchanged.
_LINEAR_ABOVE = 2.0
# Added to a slot's variance: the root stays differentiable, and a slot on one patch keeps a spread of 0.01.
_VARIANCE_FLOOR = 1e-4


class BoundSlots(NamedTuple):
    """What `RelativeSlotAttention` returns.

    Args:
        slots: `(B, T, S, D)`.
        logits: float32 `(B, T, S, N')`, query · key · scale of the last iteration, before the softmax over slots.
        attention: float32 `(B, T, S, N')`, the softmax over slots, normalised over tokens.

    Example:
        >>> BoundSlots._fields
        ('slots', 'logits', 'attention')
    """

    slots: Tensor
    logits: Tensor
    attention: Tensor


class SlotPose(NamedTuple):
    """Where slots are, and how far they reach.

    Args:
        position: `(..., S, 2)`, x and y, in the units of the grid.
        spread: `(..., S, 2)`, above 0.

    Example:
        >>> SlotPose(torch.zeros(3, 2), torch.ones(3, 2)).relative(torch.zeros(5, 2)).shape
        torch.Size([3, 5, 2])
    """

    position: Tensor
    spread: Tensor

    def relative(self, points: Tensor) -> Tensor:
        """Coordinates of points as the slots see them.

        Args:
            points: `(..., N, 2)`.

        Returns:
            `(..., S, N, 2)`, in units of five spreads.
        """
        offset = points.unsqueeze(-3) - self.position.unsqueeze(-2)
        return offset / (_REACH * self.spread.unsqueeze(-2))

    def split(self, size: int, dim: int) -> list[SlotPose]:
        """Pieces along an axis.

        Args:
            size: length of a piece; the last may be shorter.
            dim: the axis.

        Returns:
            The pieces in their order.
        """
        pieces = zip(self.position.split(size, dim), self.spread.split(size, dim), strict=True)
        return [SlotPose(position, spread) for position, spread in pieces]


def attention_pose(attention: Tensor, points: Tensor) -> SlotPose:
    """Mean and standard deviation of the points that slots attend to.

    Args:
        attention: `(..., S, N)`, sums to 1 over N.
        points: `(..., N, 2)` coordinates.

    Returns:
        Position and spread of each slot.

    Example:
        >>> attention_pose(torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[0.0, 0.0], [2.0, 0.0], [9.0, 9.0]])).position
        tensor([[1., 0.]])
    """
    # Written out, since autocast would run a matrix product in half precision.
    weights, points = attention.unsqueeze(-1), points.unsqueeze(-3)
    position = (weights * points).sum(-2)
    variance = (weights * (points - position.unsqueeze(-2)).square()).sum(-2)
    return SlotPose(position, (variance + _VARIANCE_FLOOR).sqrt())


class RelativeSlotAttention(nn.Module):
    """Binds learned slots to the patches of each frame, with keys and values that see patches relative to the slot.

    Key and value of patch n for slot s are `f(K x_n + g(r_sn))` and `f(V x_n + g(r_sn))` with an MLP `f` of two layers
    and the relative position `r_sn` of SlotPose. A slot's pose is learned at first and then the mean and spread of its
    attention. The attention is computed once more after the last update.

    The published network is evaluated in another order, with the same result: `f`'s first layer is linear before its
    ReLU, so that patches and positions pass it apart; its second layer comes after the sum over patches (values) or is
    moved to the query (keys). That leaves no matrix product on the S x N' pairs, a hundredth of the multiplications.

    Args:
        grid: `(h, w)` of the patches, N = h * w.
        num_slots: S.
        slot_dim: D.
        feature_dim: C, channels of the tokens.
        iterations: updates of the slots.
        dropout: in the slots' MLP, in [0, 1).
        eps: added to the attention before it is normalised over tokens.
        init: `"default"` is PyTorch's initialisation; with `"kmeans"` the untrained module is soft k-means on the
            embedded patches: queries and keys are turned alike, values are the patches, `f` is nearly linear, and slots
            move to the mean of what they attend to. Small models learn objects sooner from there.
        sharpness: size of the initial query and key weights: their standard deviation in units of `1 / sqrt(inputs)`.
            None is PyTorch's 0.58, or 1.5 with `"kmeans"`. Larger lets slots differ from the start.

    Raises:
        ConfigError: a size or `sharpness` is out of range, or `init` is unknown.

    Example:
        >>> binder = RelativeSlotAttention((3, 4), num_slots=5, slot_dim=16, feature_dim=8)
        >>> tokens, indices = torch.randn(2, 3, 6, 8), torch.arange(6).expand(2, 3, 6)
        >>> bound = binder(tokens, indices)
        >>> bound.slots.shape, bound.logits.shape
        (torch.Size([2, 3, 5, 16]), torch.Size([2, 3, 5, 6]))

    Source: Aydemir et al. 2023 (arXiv 2310.06907), section 3.2; Biza et al. 2023 (arXiv 2302.04973).
    """

    def __init__(
        self,
        grid: tuple[int, int],
        num_slots: int = 8,
        slot_dim: int = 128,
        feature_dim: int = 768,
        iterations: int = 3,
        dropout: float = 0.1,
        eps: float = 1e-8,
        init: Literal["default", "kmeans"] = "default",
        sharpness: float | None = None,
    ) -> None:
        super().__init__()
        if len(grid) != 2 or min(grid) < 1:
            raise ConfigError(f"Expected argument `grid` to be two positive integers, but got {grid}. Use [24, 36].")
        if num_slots < 1 or iterations < 1 or slot_dim < 1 or feature_dim < 1:
            raise ConfigError(
                "Expected arguments `num_slots`, `slot_dim`, `feature_dim` and `iterations` to be at least 1, but got "
                f"{num_slots}, {slot_dim}, {feature_dim} and {iterations}."
            )
        if init not in ("default", "kmeans"):
            raise ConfigError(f"Expected argument `init` to be 'default' or 'kmeans', but got {init!r}. Choose one.")
        if sharpness is not None and sharpness <= 0:
            raise ConfigError(f"Expected argument `sharpness` to be None or above 0, but got {sharpness}. Try 2.")
        self.grid = (int(grid[0]), int(grid[1]))
        self.iterations = iterations
        self.eps = eps
        self.scale = slot_dim**-0.5
        self.points = nn.Parameter(_unit_grid(self.grid))
        self.slots = nn.Parameter(torch.empty(num_slots, slot_dim))
        nn.init.xavier_uniform_(self.slots)
        self.position = nn.Parameter(0.02 * torch.randn(num_slots, 2))
        self.log_spread = nn.Parameter(torch.full((num_slots, 2), 0.5).log())
        self.embed = nn.Sequential(
            nn.LayerNorm(feature_dim),
            nn.Linear(feature_dim, feature_dim),
            nn.ReLU(),
            nn.Linear(feature_dim, slot_dim),
            nn.LayerNorm(slot_dim),
        )
        self.norm_slots = nn.LayerNorm(slot_dim)
        self.to_q = nn.Linear(slot_dim, slot_dim, bias=False)
        self.to_k = nn.Linear(slot_dim, slot_dim, bias=False)
        self.to_v = nn.Linear(slot_dim, slot_dim, bias=False)
        if sharpness is not None:
            for layer in (self.to_q, self.to_k):
                nn.init.normal_(layer.weight, std=sharpness * layer.in_features**-0.5)
        self.from_position = nn.Linear(2, slot_dim)
        self.pair_in = nn.Linear(slot_dim, slot_dim)
        self.pair_out = nn.Linear(slot_dim, slot_dim)
        self.gru = nn.GRUCell(slot_dim, slot_dim)
        self.mlp = nn.Sequential(
            nn.LayerNorm(slot_dim),
            nn.Linear(slot_dim, 4 * slot_dim),
            nn.ReLU(),
            nn.Linear(4 * slot_dim, slot_dim),
            nn.Dropout(dropout),
        )
        self.to_output = nn.Linear(slot_dim, slot_dim)
        if init == "kmeans":
            self._start_as_kmeans(1.5 if sharpness is None else sharpness)

    def forward(self, tokens: Tensor, indices: Tensor) -> BoundSlots:
        """Bind slots to each frame by itself.

        Args:
            tokens: `(B, T, N', C)`.
            indices: int64 `(B, T, N')`, the tokens' places among the N patches.

        Returns:
            Slots, logits and attention of the last iteration.

        Raises:
            ShapeError: the inputs do not fit.
        """
        if tokens.ndim != 4 or indices.shape != tokens.shape[:3]:
            raise ShapeError(
                "Expected arguments `tokens` and `indices` to be (B, T, N', C) and (B, T, N'), but got "
                f"{tuple(tokens.shape)} and {tuple(indices.shape)}."
            )
        points = F.embedding(indices, self.points)
        embedded = self.embed(tokens)
        pair = self.pair_in.weight
        bias = F.linear(self.from_position.bias, pair, self.pair_in.bias)
        keys = F.linear(embedded, pair @ self.to_k.weight, bias).unsqueeze(2)
        values = F.linear(embedded, pair @ self.to_v.weight, bias).unsqueeze(2)
        from_position = pair @ self.from_position.weight
        slots = self.slots.expand(*tokens.shape[:2], -1, -1)
        pose = SlotPose(self.position, self.log_spread.exp())
        for iteration in range(self.iterations + 1):
            offsets = F.linear(pose.relative(points), from_position)
            query = self.to_q(self.norm_slots(slots))
            seen = torch.einsum("btsd,btsnd->btsn", query @ self.pair_out.weight, (keys + offsets).relu())
            logits = ((seen + (query @ self.pair_out.bias).unsqueeze(-1)) * self.scale).float()
            attention = logits.softmax(dim=2) + self.eps
            attention = attention / attention.sum(dim=-1, keepdim=True)
            if iteration == self.iterations:
                break
            mixed = torch.einsum("btsn,btsnd->btsd", attention.to(values.dtype), (values + offsets).relu())
            update = self.pair_out(mixed)
            slots = self.gru(update.flatten(0, 2), slots.flatten(0, 2)).view(update.shape)
            slots = slots + self.mlp(slots)
            pose = attention_pose(attention, points)
        return BoundSlots(self.to_output(self.norm_slots(slots)), logits, attention)

    @torch.no_grad()
    def _start_as_kmeans(self, sharpness: float) -> None:
        init_fan_in_(self.embed)
        dim = self.to_q.in_features
        turn = sharpness * nn.init.orthogonal_(torch.empty(dim, dim))
        self.to_q.weight.copy_(turn)
        self.to_k.weight.copy_(turn)
        nn.init.eye_(self.to_v.weight)
        nn.init.zeros_(self.from_position.bias)
        # Far above zero a ReLU is linear; the second layer takes the shift back.
        shift = _LINEAR_ABOVE * sharpness
        for layer, bias in ((self.pair_in, shift), (self.pair_out, -shift)):
            nn.init.eye_(layer.weight)
            nn.init.constant_(layer.bias, bias)
        # Gates in PyTorch's order: reset, update (below 0.5: take the new value), new.
        self.gru.weight_ih.mul_(0.1)
        self.gru.weight_hh.mul_(0.1)
        self.gru.weight_ih[2 * dim :] += torch.eye(dim)
        nn.init.zeros_(self.gru.bias_ih)
        nn.init.zeros_(self.gru.bias_hh)
        self.gru.bias_ih[dim : 2 * dim] = -1.5


def _unit_grid(grid: tuple[int, int]) -> Tensor:
    """Float `(h * w, 2)`: x and y of each cell, row by row, each from -1 to 1."""
    rows, columns = (torch.linspace(-1.0, 1.0, length) for length in grid)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([x, y], dim=-1).flatten(0, 1)
