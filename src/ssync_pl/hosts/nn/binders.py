"""SOLV's two binders: slots to the patches of each frame, and slots of neighbouring frames to each other."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ssync_pl.errors import choose, require
from ssync_pl.hosts.nn.initializers import FeatureSlots, group_patches
from ssync_pl.hosts.nn.layers import init_fan_in_, unit_grid
from ssync_pl.hosts.nn.slot_attention import init_soft_kmeans_

# A grid cell's position is divided by this many spreads of the slot, so that relative positions are of order 1.
_REACH = 5.0
# Added to the attention before it is normalised over tokens.
_EPS = 1e-8
# In standard deviations of a projected patch: how far its values are lifted above a ReLU's kink to pass it unchanged.
_LINEAR_ABOVE = 2.0
# Added to a slot's variance: the root stays differentiable, and a slot on one patch keeps a spread of 0.01.
_VARIANCE_FLOOR = 1e-4


class BoundSlots(NamedTuple):
    """Slots `(B, T, S, D)`; logits `(B, T, S, N')` of the last iteration; attention, their softmax, over tokens."""

    slots: Tensor
    logits: Tensor
    attention: Tensor


class SlotPose(NamedTuple):
    """Where slots are, `(..., S, 2)` as x and y in the units of the grid, and how far they reach, `(..., S, 2)` > 0."""

    position: Tensor
    spread: Tensor

    def relative(self, points: Tensor) -> Tensor:
        """Turn points `(..., N, 2)` into coordinates of each slot, `(..., S, N, 2)` in units of five spreads."""
        offset = points.unsqueeze(-3) - self.position.unsqueeze(-2)
        return offset / (_REACH * self.spread.unsqueeze(-2))


def attention_pose(attention: Tensor, points: Tensor) -> SlotPose:
    """Mean and deviation of the points `(..., N, 2)` that slots attend to by `(..., S, N)`, which sums to 1 over N."""
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

    Linear layers are moved out of the S x N' pairs, with the same result: patches and positions pass `f`'s first layer
    apart; its second comes after the sum over patches (values) or is moved to the query (keys).

    Source: Aydemir et al. 2023 (arXiv 2310.06907), section 3.2; Biza et al. 2023 (arXiv 2302.04973).
    """

    def __init__(
        self,
        grid: tuple[int, int],
        num_slots: int,
        slot_dim: int,
        feature_dim: int,
        iterations: int = 3,
        dropout: float = 0.1,
        init: str = "default",
        sharpness: float | None = None,
        slot_init: str = "learned",
    ) -> None:
        super().__init__()
        choose("slot_init", slot_init, "learned", "features")
        require(len(grid) == 2 and min(grid) >= 1, "argument `grid` to be two positive integers", grid)
        sizes = (num_slots, slot_dim, iterations)
        fits = 1 <= min(sizes) <= max(sizes) < 1e6
        require(fits, "`num_slots`, `slot_dim` and `iterations` to be from 1 to 999,999", *sizes)
        choose("corrector_init", init, "default", "kmeans")
        require(sharpness is None or sharpness > 0, "`corrector_sharpness` to be None or above 0", sharpness)
        self.iterations = iterations
        self.scale = slot_dim**-0.5
        self.points = nn.Parameter(unit_grid(grid).flip(-1))  # x and y
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
        self.initializer: FeatureSlots | None = None
        if slot_init == "features":
            self.initializer = FeatureSlots(num_slots, slot_dim, slot_dim)
            for unused in (self.slots, self.position, self.log_spread):
                unused.requires_grad_(False)
        if init == "kmeans":
            self._start_as_kmeans(1.5 if sharpness is None else sharpness)

    def forward(self, tokens: Tensor, indices: Tensor, first: Tensor | None = None) -> BoundSlots:
        """Bind slots to tokens `(B, T, N', C)` at places `(B, T, N')` of the N patches, each frame by itself."""
        points = F.embedding(indices, self.points)
        embedded = self.embed(tokens)
        pair = self.pair_in.weight
        bias = F.linear(self.from_position.bias, pair, self.pair_in.bias)
        keys = F.linear(embedded, pair @ self.to_k.weight, bias).unsqueeze(2)
        values = F.linear(embedded, pair @ self.to_v.weight, bias).unsqueeze(2)
        from_position = pair @ self.from_position.weight
        slots, pose = self.slots[:], SlotPose(self.position, self.log_spread.exp())
        if self.initializer is not None and first is not None:
            groups = group_patches(first, self.slots.shape[0])
            slots = self.initializer.to_slots(groups @ self.embed(first)).unsqueeze(1)
            pose = SlotPose(*(part.unsqueeze(1) for part in attention_pose(groups, self.points)))
        slots = slots.expand(*tokens.shape[:2], -1, -1)
        for iteration in range(self.iterations + 1):
            offsets = F.linear(pose.relative(points), from_position)
            query = self.to_q(self.norm_slots(slots))
            seen = torch.einsum("btsd,btsnd->btsn", query @ self.pair_out.weight, (keys + offsets).relu())
            logits = ((seen + (query @ self.pair_out.bias).unsqueeze(-1)) * self.scale).float()
            attention = logits.softmax(dim=2) + _EPS
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
        init_soft_kmeans_(self, sharpness)
        nn.init.zeros_(self.from_position.bias)
        # Far above zero a ReLU is linear; the second layer takes the shift back.
        shift = _LINEAR_ABOVE * sharpness
        for layer, bias in ((self.pair_in, shift), (self.pair_out, -shift)):
            nn.init.eye_(layer.weight)
            nn.init.constant_(layer.bias, bias)


def frame_windows(values: Tensor, radius: int) -> Tensor:
    """Windows `(B, T, 2 * radius + 1, ...)` around every frame of `(B, T, ...)`; outside of the clip are zeros."""
    outside = values.new_zeros(values.shape[0], radius, *values.shape[2:])
    padded = torch.cat([outside, values, outside], dim=1)
    return padded.unfold(1, 2 * radius + 1, 1).movedim(-1, 2)


class TemporalBinder(nn.Module):
    """A transformer over the frames of a window, for each slot index by itself, read at the centre.

    Source: Aydemir et al. 2023 (arXiv 2310.06907), section 3.2.
    """

    def __init__(self, slot_dim: int, window: int, blocks: int = 3, heads: int = 8, dropout: float = 0.1) -> None:
        super().__init__()
        require(window % 2 == 1, "argument `clip_length` to be odd", window, advice="Use 5 or 3.")
        require(blocks >= 1, "argument `temporal_blocks` to be at least 1", blocks)
        require(heads >= 1 and slot_dim % heads == 0, f"`temporal_heads` to divide the slot size {slot_dim}", heads)
        self.window = window
        self.place = nn.Parameter(0.02 * torch.randn(window, 1, slot_dim))
        block = nn.TransformerEncoderLayer(slot_dim, heads, 4 * slot_dim, dropout, batch_first=True)
        self.blocks = nn.TransformerEncoder(block, blocks, enable_nested_tensor=False)

    def forward(self, slots: Tensor, valid: Tensor) -> Tensor:
        """Bind windows `(B, P, F, S, D)` of frames that exist `(B, P, F)` to slots `(B, P, S, D)` of their centres."""
        centre = self.window // 2
        here = torch.arange(self.window, device=valid.device) == centre
        hidden = ~(valid | here)  # attention over nothing would be NaN
        hidden = hidden.unsqueeze(2).expand(-1, -1, slots.shape[3], -1).flatten(0, 2)
        flat = rearrange(slots + self.place, "b p f s d -> (b p s) f d")
        bound = self.blocks(flat, src_key_padding_mask=hidden)[:, centre]
        return rearrange(bound, "(b p s) d -> b p s d", b=slots.shape[0], p=slots.shape[1])
