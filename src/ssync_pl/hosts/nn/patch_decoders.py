"""Decoders from slots to patch features: an MLP a slot and patch, or one mixture of slots a patch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from ssync_pl.errors import ConfigError
from ssync_pl.hosts.nn.mlp import MLP
from ssync_pl.hosts.nn.patch_mixture import PatchMLP, linear_layers, mix_patches
from ssync_pl.hosts.nn.slot_transformer import SlotTransformer
from ssync_pl.method.labels import compute_dtype

__all__ = ["MLPDecoder", "SlotMixerDecoder"]


class MLPDecoder(nn.Module):
    """Decodes every slot at every patch by an MLP and mixes over slots (DINOSAUR, arXiv 2209.14860, section 3).

    The MLP's last channel is the mask logit. Parameters have the public checkpoints' names and shapes.

    The plain layout makes C channels for all M * S * N pairs of slot and patch, keeps the activations of all layers for
    the backward pass, and mixes at the end. `memory_efficient` gives the same result and gradients with less of both,
    see `mix_patches`. The plain layout is taken where modules of the MLP have hooks or were replaced, and under
    `torch.compile`.

    Args:
        slot_dim: size D of a slot.
        output_dim: channels C of a reconstructed patch.
        hidden: hidden sizes of the MLP.
        patches: number N of patches.
        memory_efficient: mix hidden activations, in chunks, instead of reconstructions.

    Raises:
        ConfigError: A size is below 1 or there is no hidden layer.

    Example:
        >>> output = MLPDecoder(16, 24, [32], patches=9)(torch.randn(2, 5, 16))
        >>> {name: tuple(value.shape) for name, value in output.items()}
        {'reconstruction': (2, 9, 24), 'masks': (2, 5, 9), 'dots': (2, 5, 9)}
    """

    returns_logits: ClassVar[bool] = True  # as `dots`, so that nobody needs to listen to the MLP

    def __init__(
        self, slot_dim: int, output_dim: int, hidden: Sequence[int], patches: int, memory_efficient: bool = True
    ) -> None:
        super().__init__()
        _check_sizes(hidden, patches)
        self.memory_efficient = memory_efficient
        self.mlp = MLP(slot_dim, hidden, output_dim + 1)
        self.pos_emb = nn.Parameter(torch.randn(1, 1, patches, slot_dim) * slot_dim**-0.5)

    def forward(self, slots: Tensor) -> dict[str, Tensor]:
        """Decode the slots of some frames.

        Args:
            slots: `(M, S, D)`.

        Returns:
            `reconstruction` `(M, N, C)`; `dots` `(M, S, N)`, the mask logits in at least float32; `masks`, their
            softmax over slots.
        """
        layers = self._layers()
        if layers is not None:
            mixed, dots = self._mix(slots, layers)
            return {"reconstruction": mixed, "masks": dots.softmax(dim=1), "dots": dots}
        decoded = self.mlp(slots.unsqueeze(2) + self.pos_emb)
        dots = decoded[..., -1].to(compute_dtype(decoded.dtype))
        masks = dots.softmax(dim=1)
        mixed = (decoded[..., :-1] * masks.unsqueeze(-1).to(decoded.dtype)).sum(dim=1)
        return {"reconstruction": mixed, "masks": masks, "dots": dots}

    def _layers(self) -> list[nn.Linear] | None:
        """Linear layers of the MLP if their weights will do, None if the modules have to run."""
        if not self.memory_efficient or type(self.mlp) is not MLP:
            return None
        return linear_layers(self.mlp.layers, within=[self.mlp, self.mlp.layers])

    def _mix(self, slots: Tensor, layers: list[nn.Linear]) -> tuple[Tensor, Tensor]:
        first, last = layers[0], layers[-1]
        with torch.autocast(slots.device.type, enabled=False):
            slots = slots.to(first.weight.dtype)
            share = nn.functional.linear(slots, first.weight, first.bias)
            places = nn.functional.linear(self.pos_emb[0, 0], first.weight)
        mlp = PatchMLP(
            hidden=[(layer.weight, layer.bias) for layer in layers[1:-1]],
            features=(last.weight[:-1], last.bias[:-1]),
            alpha=(last.weight[-1], last.bias[-1]),
        )
        return mix_patches(share, places, mlp)


class SlotMixerDecoder(nn.Module):
    """Mixes the slots at every patch, then decodes the mixture once (VideoSAUR, arXiv 2306.04829, section 3).

    Patches ask by their position which slots they belong to (`allocator`, `to_q`, `to_k`), and an MLP turns the mixed
    slots into features (`renderer`, `output_transform`): the cost hardly grows with the number of slots. The idea is
    that of the slot mixer of OSRT (arXiv 2206.06922). Parameters have the public checkpoints' names and shapes.

    Args:
        slot_dim: size D of a slot.
        output_dim: channels C of a reconstructed patch.
        hidden: sizes of the renderer's layers, each with a ReLU.
        patches: number N of patches.
        blocks: blocks of the allocator.
        heads: attention heads of the allocator.

    Raises:
        ConfigError: A size is out of range.

    Example:
        >>> output = SlotMixerDecoder(16, 24, [32, 32], patches=9, blocks=1, heads=4)(torch.randn(2, 5, 16))
        >>> {name: tuple(value.shape) for name, value in output.items()}
        {'reconstruction': (2, 9, 24), 'masks': (2, 5, 9), 'dots': (2, 5, 9)}
    """

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
        """Decode the slots of some frames.

        Args:
            slots: `(M, S, D)`.

        Returns:
            `reconstruction` `(M, N, C)`; `dots` `(M, S, N)`, the mask logits in at least float32; `masks`, their
            softmax over slots.
        """
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


def _check_sizes(hidden: Sequence[int], patches: int) -> None:
    if patches < 1 or not hidden or min(hidden) < 1:
        raise ConfigError(
            "Expected a decoder with at least 1 patch and 1 hidden layer, all sizes positive, but got "
            f"{patches} patches and hidden sizes {list(hidden)}. Use grid=[14, 14] and "
            "decoder_hidden=[1024, 1024, 1024]."
        )
