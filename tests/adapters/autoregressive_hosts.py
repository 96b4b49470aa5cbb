"""Small models with the layout of STEVE and SLATE: a transformer predicts tokens, and nothing draws object masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from slotformer_hosts import DIM, SIZE, SLOTS, SlotFormerAttention
from torch import Tensor, nn


class TokenCrossAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj_q, self.proj_k, self.proj_v = (nn.Linear(DIM, DIM, bias=False) for _ in range(3))

    def forward(self, tokens: Tensor, slots: Tensor) -> Tensor:
        self.own_logits = self.proj_q(tokens) @ self.proj_k(slots).transpose(1, 2)
        return torch.softmax(self.own_logits, dim=-1) @ self.proj_v(slots)


class TokenBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.Linear(DIM, DIM)
        self.encoder_decoder_attn = TokenCrossAttention()

    def forward(self, tokens: Tensor, slots: Tensor) -> Tensor:
        tokens = tokens + self.self_attn(tokens)
        return tokens + self.encoder_decoder_attn(tokens, slots)


class TokenDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(TokenBlock() for _ in range(2))

    def forward(self, tokens: Tensor, slots: Tensor) -> Tensor:
        for block in self.blocks:
            tokens = block(tokens, slots)
        return tokens


class TokenHost(nn.Module):
    """``attention`` and ``decoder`` are the paths of both, as the two code bases have them."""

    def __init__(self, attention: str, decoder: str) -> None:
        super().__init__()
        self.dvae = nn.Conv2d(3, DIM, 1)
        self.places = (attention, decoder)
        for path, module in ((attention, SlotFormerAttention()), (decoder, TokenDecoder())):
            self.put(path, module)
        self.slots = nn.Parameter(torch.randn(1, SLOTS, DIM))

    def put(self, path: str, module: nn.Module) -> None:
        *outer, last = path.split(".")
        parent: nn.Module = self
        for name in outer:
            if not hasattr(parent, name):
                parent.add_module(name, nn.Module())
            parent = getattr(parent, name)
        parent.add_module(last, module)

    def forward(self, video: Tensor) -> Tensor:
        attention, decoder = (self.get_submodule(path) for path in self.places)
        tokens = self.dvae(video.flatten(0, 1)).flatten(2).transpose(1, 2)
        frames, slots, states = tokens.unflatten(0, video.shape[:2]), self.slots.expand(len(video), -1, -1), []
        for t in range(video.shape[1]):
            slots = attention(frames[:, t], slots)
            states.append(slots)
        return (decoder(tokens, torch.stack(states, 1).flatten(0, 1)) - tokens.detach()).square().mean()


HOSTS: dict[str, Callable[[], nn.Module]] = {
    "slotformer_steve": lambda: TokenHost("slot_attention", "trans_decoder.tf_dec"),
    "steve": lambda: TokenHost("steve_encoder.savi", "steve_decoder.tf"),
    "slate": lambda: TokenHost("slot_attn", "tf_dec"),
}
"""Recognised by `AutoregressiveAdapter`, whose `attach` refuses them."""


def training_loss(host: Any) -> Tensor:
    return host(torch.rand(2, 3, 3, SIZE, SIZE))
