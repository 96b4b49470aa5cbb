"""Parts of which stand-ins are built: slot attention and decoders that keep the logits which they used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

B, T, S, DIM, PATCH = 2, 3, 4, 8, 4
FRAME, GRID = (8, 16), (2, 4)
N = GRID[0] * GRID[1]


class Kept(nn.Module):
    """Keeps the logits of each call; with a ``sharpen`` other than 1, its softmax gets others than it shows.

    ``side`` says which map it draws, ``probs`` that it keeps probabilities, ``checked`` that the adapter can compare.
    """

    side, probs, checked = "", False, True

    def __init__(self) -> None:
        super().__init__()
        self.sharpen = 1.0
        self.own_logits: list[Tensor] = []


class SlotAttention(Kept):
    """Slot attention over ``(B, N, D)``; families differ in names, in the order of the operations and in the call."""

    side = "attention"
    names: tuple[str, ...] = ("to_q", "to_k", "to_v")
    eps = 1e-8

    def __init__(self, iterations: int = 2) -> None:
        super().__init__()
        for name in self.names:
            setattr(self, name, nn.Linear(DIM, DIM, bias=False))
        self.gru, self.iterations, self.scale = nn.GRUCell(DIM, DIM), iterations, DIM**-0.5

    def product(self, query: Tensor, keys: Tensor) -> Tensor:
        return torch.einsum("bsd,bnd->bsn", query, keys) * self.scale

    def softmax(self, logits: Tensor) -> Tensor:
        return logits.softmax(1)

    def attend(
        self, features: Tensor, slots: Tensor, iterations: int | None = None, present: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        to_q, to_k, to_v = (getattr(self, name) for name in self.names)
        keys, values = to_k(features), to_v(features)
        for _ in range(iterations or self.iterations):
            logits = self.product(to_q(slots), keys)
            if present is not None:
                logits = logits.masked_fill(~present[:, :, None], float("-inf"))
            probs = self.softmax(self.sharpen * logits)
            weights = (probs + self.eps) / (probs + self.eps).sum(-1, keepdim=True)
            update = weights @ values
            slots = self.gru(update.flatten(0, 1), slots.flatten(0, 1)).view(slots.shape)
        self.own_logits.append(logits)
        return slots, probs

    def whole(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits of all frames, ``(B, T, ...)``, as one map, and its probabilities where no logits give them."""
        return logits, None


def scan(
    features: Tensor, slots: Tensor, attend: Callable[..., Tensor], predict: Callable[[Tensor], Tensor] = lambda x: x
) -> Tensor:
    """Slots ``(B, T, S, D)`` of all frames: ``attend(frame, slots, t)`` sees those predicted from the frame before."""
    states = []
    for t, frame in enumerate(features.unbind(1)):
        states.append(attend(frame, slots, t))
        slots = predict(states[-1])
    return torch.stack(states, 1)


def patches(encoder: nn.Module, video: Tensor) -> Tensor:
    """Features ``(B, T, N, D)`` of a convolution."""
    return encoder(video.flatten(0, 1)).flatten(2).mT.unflatten(0, video.shape[:2])


def mean_of_heads(logits: Tensor) -> tuple[Tensor, Tensor | None]:
    """The map of heads with a softmax over slots each, ``(B, T, heads, S, N)``."""
    if logits.shape[2] == 1:
        return logits.squeeze(2), None
    return logits.float().mean(2), logits.float().softmax(3).mean(2)


class Decoder(Kept):
    """Slots at places through the network ``name``, whose last channel is alpha; channels come first for pixels.

    ``beside`` names further parts by which its family is recognised.
    """

    side, name = "masks", "decoder"
    beside: tuple[str, ...] = ()

    def __init__(self, size: tuple[int, ...] = (N,), colours: int = 3) -> None:
        super().__init__()
        self.places = nn.Parameter(3 * torch.randn(DIM, *size))
        self.pixels = len(size) == 2
        setattr(self, self.name, nn.Conv2d(DIM, colours + 1, 1) if self.pixels else nn.Linear(DIM, colours + 1))
        for part in self.beside:
            self.add_module(part, nn.Identity())

    def draw(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Gives colours ``(..., S, C, *size)`` and alpha ``(..., S, *size)`` of slots ``(..., S, D)``."""
        network, axis = getattr(self, self.name), slots.ndim - 1
        copies = slots.flatten(0, -2).view(-1, DIM, *[1] * (self.places.ndim - 1)) + self.places
        output = (network(copies) if self.pixels else network(copies.mT).mT).unflatten(0, slots.shape[:-1])
        self.own_logits.append(output.select(axis, -1))
        return output.narrow(axis, 0, output.shape[axis] - 1), self.sharpen * self.own_logits[-1]

    def softmax(self, alpha: Tensor, axis: int) -> Tensor:
        return alpha.softmax(axis)

    def paint(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Gives the picture and the masks."""
        colours, alpha = self.draw(slots)
        masks = self.softmax(alpha, slots.ndim - 2)
        return (colours * masks.unsqueeze(slots.ndim - 1)).sum(slots.ndim - 2), masks


class StandIn(nn.Module):
    """A host with slots of its own, a batch to train on, and a step; its slots are far apart, so that labels differ."""

    def __init__(self) -> None:
        super().__init__()
        self.seeds = nn.Parameter(3 * torch.randn(S, DIM))

    def first_slots(self, videos: Tensor) -> Tensor:
        return self.seeds.expand(len(videos), -1, -1)

    def batch(self) -> Any:
        return {"video": torch.rand(B, T, 3, *FRAME)}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch["video"]).square().mean()


def parts(host: nn.Module) -> tuple[Any, Any]:
    """The slot attention and the decoder of a stand-in."""
    one, two = (next(m for m in host.modules() if getattr(m, "side", "") == side) for side in ("attention", "masks"))
    return one, two


def forget(host: nn.Module) -> None:
    """Lets go of what a stand-in kept for itself: tensors of a graph can be neither copied nor compared twice."""
    for module in host.modules():
        if isinstance(module, Kept):
            module.own_logits.clear()
