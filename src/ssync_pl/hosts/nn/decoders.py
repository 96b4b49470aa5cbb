"""Decoders from slots to patch features: an MLP per slot and patch, one mixture of slots per patch, or plane waves."""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssync_pl.errors import choose, require
from ssync_pl.hosts.nn.layers import MLP, PatchPosition, has_hooks, init_fan_in_
from ssync_pl.hosts.nn.pixels import DecoderOutput
from ssync_pl.hosts.nn.pixels import SpatialBroadcastDecoder as SpatialBroadcastDecoder  # beside the others
from ssync_pl.hosts.nn.slot_transformer import SlotTransformer
from ssync_pl.method.labels import compute_dtype

# Bytes of one layer's activations that are made at a time: in a CPU's cache, or enough to keep an accelerator busy.
_CHUNK_BYTES = {"cpu": 3 << 20}
_ACCELERATOR_CHUNK_BYTES = 64 << 20


def mix_patches(
    slots: Tensor,
    places: Tensor,
    hidden: Sequence[nn.Module],
    features: tuple[Tensor, Tensor],
    alpha: tuple[Tensor, Tensor],
    *,
    offsets: tuple[Tensor, Tensor] | None = None,
    valid: Tensor | None = None,
    memory_efficient: bool = True,
) -> tuple[Tensor, Tensor]:
    """Decode every slot at every patch by an MLP with ReLUs, and mix over slots.

    The first layer is linear, so that slots `(M, S, H)` and places `(N, H)` pass it apart; the last is linear and masks
    sum to 1, so that hidden activations are mixed first. `memory_efficient` decodes parts, most of them twice.
    """

    def begin(slots: Tensor, places: Tensor, positions: "Tensor | None") -> Tensor:  # quoted: torch 2.4 compiles it so
        values = slots.unsqueeze(2) + places
        if positions is not None and offsets is not None:
            values = values + F.linear(positions, offsets[1])
        for layer in hidden[:-1]:
            values = layer(values.relu())
        return values

    def finish(values: Tensor, valid: "Tensor | None") -> tuple[Tensor, Tensor]:
        values = values.relu()
        for layer in hidden[-1:]:
            values = layer(values).relu()
        mixed, logits = _mix(values, F.linear(values, *alpha), valid)
        return F.linear(mixed, *features), logits

    positions = None if offsets is None else offsets[0]
    if not memory_efficient or torch.compiler.is_compiling():
        return finish(begin(slots, places, positions), valid)
    run = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    size = _CHUNK_BYTES.get(slots.device.type, _ACCELERATOR_CHUNK_BYTES)
    count = max(1, size // max(1, slots.shape[1] * slots.shape[2] * slots.element_size()))
    frames, patches = max(1, count // len(places)), min(count, len(places))
    parts = []
    for at in range(0, len(slots), frames):
        some, seen = slots[at : at + frames], None if valid is None else valid[at : at + frames]
        pieces: list[tuple[Tensor, Tensor]] = []
        for first in range(0, len(places), patches):
            those = slice(first, first + patches)
            moved = None if positions is None else positions[at : at + frames, :, those]
            values = run(begin, some, places[those], moved)
            # Every other piece keeps the last activations: half of that work is not done again.
            pieces.append(finish(values, seen) if len(pieces) % 2 else run(finish, values, seen))
        parts.append((torch.cat([piece[0] for piece in pieces], 1), torch.cat([piece[1] for piece in pieces], 2)))
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def _mix(values: Tensor, logits: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Values `(M, S, N, H)`, mixed over slots by logits `(M, S, N, 1)`; and these as `(M, S, N)`."""
    logits = logits.squeeze(-1)
    logits = logits.to(compute_dtype(logits.dtype))
    seen = logits if valid is None else logits.masked_fill(~valid.unsqueeze(-1), float("-inf"))
    return torch.einsum("msnh,msn->mnh", values, seen.softmax(dim=1).to(values.dtype)), logits


class MLPDecoder(nn.Module):
    """Decodes every slot at every patch by an MLP and mixes over slots (DINOSAUR, arXiv 2209.14860, section 3).

    The MLP's last channel is the mask logit. Parameters have the public checkpoints' names and shapes.
    """

    returns_logits: ClassVar[bool] = True  # as `dots`, so that adapters need not listen to the MLP

    def __init__(
        self, slot_dim: int, output_dim: int, hidden: Sequence[int], patches: int, memory_efficient: bool = True
    ) -> None:
        super().__init__()
        _check_sizes(hidden, patches)
        self.memory_efficient = memory_efficient
        self.mlp = MLP(slot_dim, hidden, output_dim + 1)
        self.pos_emb = nn.Parameter(torch.randn(1, 1, patches, slot_dim) * slot_dim**-0.5)

    def forward(self, slots: Tensor) -> dict[str, Tensor]:
        """Decode the slots of some frames."""
        if has_hooks(self.mlp):
            mixed, dots = _mix(*self.mlp(slots.unsqueeze(2) + self.pos_emb).tensor_split([-1], dim=-1))
            return {"reconstruction": mixed, "masks": dots.softmax(dim=1), "dots": dots}
        first, *hidden, last = (layer for layer in self.mlp.layers if isinstance(layer, nn.Linear))
        mixed, dots = mix_patches(
            first(slots),
            F.linear(self.pos_emb[0, 0], first.weight),
            hidden,
            (last.weight[:-1], last.bias[:-1]),
            (last.weight[-1:], last.bias[-1:]),
            memory_efficient=self.memory_efficient,
        )
        return {"reconstruction": mixed, "masks": dots.softmax(dim=1), "dots": dots}


class SlotMixerDecoder(nn.Module):
    """Mixes the slots at every patch, then decodes the mixture once (VideoSAUR, arXiv 2306.04829, section 3).

    Patches ask by their position which slots they belong to, and an MLP turns the mixed slots into features, as in OSRT
    (arXiv 2206.06922). Parameters have the public checkpoints' names and shapes.
    """

    returns_logits: ClassVar[bool] = True

    def __init__(
        self, slot_dim: int, output_dim: int, hidden: Sequence[int], patches: int, blocks: int = 2, heads: int = 4
    ) -> None:
        super().__init__()
        _check_sizes(hidden, patches)
        self.scale = slot_dim**-0.5
        self.allocator = SlotTransformer(slot_dim, blocks, heads)
        self.renderer = MLP(slot_dim, hidden[:-1], hidden[-1], activate_output=True)
        self.to_q = nn.Linear(slot_dim, slot_dim, bias=False)
        self.to_k = nn.Linear(slot_dim, slot_dim, bias=False)
        self.norm_k = nn.LayerNorm(slot_dim)
        self.norm_q = nn.LayerNorm(slot_dim)
        self.norm_memory = nn.LayerNorm(slot_dim)
        self.output_transform = nn.Linear(hidden[-1], output_dim)
        self.pos_emb = nn.Parameter(torch.randn(1, patches, slot_dim) * slot_dim**-0.5)
        for layer in (self.to_q, self.to_k, self.output_transform):
            nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(self.output_transform.bias)

    def forward(self, slots: Tensor) -> dict[str, Tensor]:
        """Decode the slots `(M, S, D)` of some frames, to what `MLPDecoder` returns."""
        places = self.pos_emb.expand(len(slots), -1, -1)
        queries = self.to_q(self.norm_q(self.allocator(places, self.norm_memory(slots))))
        keys = self.to_k(self.norm_k(slots))
        # Slots come last here and in the softmax, as in the published code, so that its numbers come out.
        dots = torch.einsum("bnd,bsd->bns", queries, keys) * self.scale
        dots = dots.to(compute_dtype(dots.dtype))
        masks = dots.softmax(dim=-1)
        mixed = torch.einsum("bns,bsd->bnd", masks.to(slots.dtype), slots) + places
        rendered = self.output_transform(self.renderer(mixed))
        return {"reconstruction": rendered, "masks": masks.mT, "dots": dots.mT}


class FourierDecoder(nn.Module):
    """Draws each slot's mask as a sum of plane waves over the frame, and gives a slot, or a patch, one feature vector.

    Two MLPs turn a slot into the waves' coefficients and the vector. Where slots hold the mean of a Fourier code of
    their patches' places (`PatchPosition`), they know their shape, and masks follow slot attention after few steps.
    With a `place`, the second sees each patch's mixture of slots and its place, as in `SlotMixerDecoder`.
    """

    returns_logits: ClassVar[bool] = True
    waves: Tensor

    def __init__(
        self, slot_dim: int, channels: int, hidden: Sequence[int], waves: Tensor, place: PatchPosition | None = None
    ) -> None:
        super().__init__()
        _check_sizes(hidden, len(waves))
        self.register_buffer("waves", waves, persistent=False)
        self.place = place
        self.coefficients = MLP(slot_dim, hidden, self.waves.shape[1], layer_norm=True)
        self.mlp = MLP(slot_dim, hidden, channels)
        init_fan_in_(self.coefficients)
        init_fan_in_(self.mlp)
        with torch.no_grad():  # mask logits start with a variance of about 1
            list(self.coefficients.parameters())[-2].mul_(self.waves.shape[1] ** -0.5)

    def forward(self, slots: Tensor) -> dict[str, Tensor]:
        """Decode the slots `(M, S, D)` of some frames, to what `MLPDecoder` returns."""
        dots = F.linear(self.coefficients(slots), self.waves)
        dots = dots.to(compute_dtype(dots.dtype))
        masks = dots.softmax(dim=1)
        given = self.mlp(slots) if self.place is None else slots
        mixed = torch.einsum("msc,msn->mnc", given, masks.to(given.dtype))
        rebuilt = mixed if self.place is None else self.mlp(mixed + self.place())
        return {"reconstruction": rebuilt, "masks": masks, "dots": dots}


class RelativeMixtureDecoder(nn.Module):
    """SOLV's decoder: an MLP gives features and alpha of each slot at each patch (arXiv 2310.06907, section 3.4).

    A learned embedding of the patch and a linear map of its position relative to the slot are added to the slot.
    """

    def __init__(
        self,
        patches: int,
        slot_dim: int = 128,
        feature_dim: int = 768,
        hidden: Sequence[int] = (1024, 1024, 1024, 1024),
        init: str = "default",
        memory_efficient: bool = True,
    ) -> None:
        super().__init__()
        choose("init", init, "default", "fan_in")
        _check_sizes(hidden, min(patches, slot_dim, feature_dim))
        self.memory_efficient = memory_efficient
        self.place = nn.Parameter(0.02 * torch.randn(patches, slot_dim))
        self.from_position = nn.Linear(2, slot_dim)
        self.first = nn.Linear(slot_dim, hidden[0])
        parts: list[nn.Module] = [nn.ReLU()]
        for width, following in pairwise(hidden):
            parts += [nn.Linear(width, following), nn.ReLU()]
        self.mlp = nn.Sequential(*parts)
        self.to_features = nn.Linear(hidden[-1], feature_dim)
        self.to_alpha = nn.Linear(hidden[-1], 1)
        if init == "fan_in":
            init_fan_in_(nn.Sequential(self.first, self.mlp, self.to_features))
            init_fan_in_(self.to_alpha)

    def forward(self, slots: Tensor, positions: Tensor, valid: Tensor) -> DecoderOutput:
        """Decode slots `(B, P, S, D)` that see patches at `(B, P, S, N, 2)`; others than `valid` take no part."""
        videos = slots.shape[:2]
        if has_hooks(self):
            places = self.place + self.from_position(positions)
            values = self.mlp(self.first(slots.unsqueeze(3) + places))
            parts = (self.to_features(values).flatten(0, 1), self.to_alpha(values).flatten(0, 1))
            mixed, logits = _mix(*parts, valid.flatten(0, 1))
            return DecoderOutput(mixed.unflatten(0, videos), logits.unflatten(0, videos))
        width = self.first.weight
        reconstruction, mask_logits = mix_patches(
            self.first(slots.flatten(0, 1)),
            F.linear(self.place + self.from_position.bias, width),
            [layer for layer in self.mlp if isinstance(layer, nn.Linear)],
            (self.to_features.weight, self.to_features.bias),
            (self.to_alpha.weight, self.to_alpha.bias),
            offsets=(positions.flatten(0, 1), width @ self.from_position.weight),
            valid=valid.flatten(0, 1),
            memory_efficient=self.memory_efficient,
        )
        return DecoderOutput(reconstruction.unflatten(0, videos), mask_logits.unflatten(0, videos))


def _check_sizes(hidden: Sequence[int], patches: int) -> None:
    fits = patches >= 1 and len(hidden) > 0 and min(hidden) >= 1
    expected = "a decoder with at least 1 patch and 1 hidden layer (`decoder_hidden`), all sizes positive"
    require(fits, expected, f"{patches} patches", list(hidden))
