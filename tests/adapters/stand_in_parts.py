"""Parts of which stand-ins are built: each keeps the logits that it used, and a family says what is its own."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

B, T, S, DIM, PATCH = 2, 3, 4, 8, 4
FRAME, FINE, GRID = (8, 16), (4, 8), (2, 4)
N = GRID[0] * GRID[1]


class Kept(nn.Module):
    """Keeps the logits of each call; ``side`` says which map it draws, ``probs`` that it keeps probabilities."""

    side, probs = "", False

    def __init__(self) -> None:
        super().__init__()
        self.own_logits: list[Tensor] = []


class SlotAttention(Kept):
    """Slot attention over ``(B, N, D)``; families differ in names, in the order of the operations and in the call."""

    side, slots_only, eps = "attention", False, 1e-8
    names: tuple[str, ...] = ("to_q", "to_k", "to_v")

    def __init__(self, iterations: int = 2, heads: int = 1) -> None:
        super().__init__()
        for name in self.names:
            setattr(self, name, nn.Linear(DIM, DIM, bias=False))
        self.gru, self.iterations, self.heads = nn.GRUCell(DIM, DIM), iterations, heads
        self.scale = (DIM // heads) ** -0.5

    def split(self, value: Tensor) -> Tensor:
        return value

    def product(self, query: Tensor, keys: Tensor) -> Tensor:
        return torch.einsum("bsd,bnd->bsn", query, keys) * self.scale

    def softmax(self, logits: Tensor) -> Tensor:
        return logits.softmax(1)

    def mix(self, weights: Tensor, values: Tensor) -> Tensor:
        return weights @ values

    def step(self, query, keys, values, present):
        logits = self.product(query, keys)
        if present is not None:
            logits = logits.masked_fill(~present.view(*present.shape, *[1] * (logits.ndim - 2)), float("-inf"))
        probs = self.softmax(logits)
        weights = (probs + self.eps) / (probs + self.eps).sum(-1, keepdim=True)
        return logits, probs, self.mix(weights, values)

    def attend(self, features: Tensor, slots: Tensor, present: Tensor | None = None) -> tuple[Tensor, Tensor]:
        to_q, to_k, to_v = (getattr(self, name) for name in self.names)
        keys, values = self.split(to_k(features)), self.split(to_v(features))
        for _ in range(self.iterations):
            logits, probs, update = self.step(self.split(to_q(slots)), keys, values, present)
            slots = self.gru(update.reshape(-1, DIM), slots.reshape(-1, DIM)).view(slots.shape)
        self.own_logits.append(logits)
        return slots, probs

    def forward(self, features: Tensor, slots: Tensor, smask: Tensor | None = None) -> Any:
        slots, probs = self.attend(features, slots, smask)
        return slots if self.slots_only else (slots, probs)

    def whole(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits of all frames, ``(B, T, ...)``, as one map, and its probabilities where no logits give them."""
        return logits, None


def mean_of_heads(logits: Tensor) -> tuple[Tensor, Tensor | None]:
    if logits.shape[2] == 1:
        return logits.squeeze(2), None
    return logits.float().mean(2), logits.float().softmax(3).mean(2)


class Decoder(Kept):
    """Slots at places through the network ``name``, whose last channel is alpha; channels come first for pixels.

    ``beside`` names further parts by which its family is recognised. With a ``sharpen`` other than 1, its softmax gets
    other logits than it shows.
    """

    side, name, channels_last = "masks", "decoder", False
    beside: tuple[str, ...] = ()
    sharpen = 1.0

    def __init__(self, size: tuple[int, ...] = (N,), colours: int = 3) -> None:
        super().__init__()
        self.places = nn.Parameter(3 * torch.randn(DIM, *size))
        self.pixels = len(size) == 2 and not self.channels_last
        setattr(self, self.name, nn.Conv2d(DIM, colours + 1, 1) if self.pixels else nn.Linear(DIM, colours + 1))
        for part in self.beside:
            self.add_module(part, nn.Identity())

    def draw(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Gives colours ``(..., S, C, *size)`` and alpha ``(..., S, *size)`` of slots ``(..., S, D)``."""
        network, axis = getattr(self, self.name), slots.ndim - 1
        copies = slots.flatten(0, -2).view(-1, DIM, *[1] * (self.places.ndim - 1)) + self.places
        output = network(copies) if self.pixels else network(copies.movedim(1, -1)).movedim(-1, 1)
        output = output.unflatten(0, slots.shape[:-1])
        self.own_logits.append(output.select(axis, -1))
        return output.narrow(axis, 0, output.shape[axis] - 1), self.sharpen * self.own_logits[-1]

    def softmax(self, alpha: Tensor, axis: int) -> Tensor:
        return alpha.softmax(axis)

    def paint(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        colours, alpha = self.draw(slots)
        masks = self.softmax(alpha, slots.ndim - 2)
        return (colours * masks.unsqueeze(slots.ndim - 1)).sum(slots.ndim - 2), masks

    def forward(self, slots: Tensor) -> Any:
        return self.paint(slots)


class RawDecoder(Decoder):
    """Gives colours and alpha of each slot, slots folded into the batch; the host takes the softmax."""

    def forward(self, slots: Tensor) -> Tensor:
        colours, _ = self.draw(slots)
        return torch.cat([colours, self.own_logits[-1].unsqueeze(2)], 2).flatten(0, 1)


def eyes(kind: type[nn.Conv2d] = nn.Conv2d) -> nn.Conv2d:
    return kind(3, DIM, PATCH, PATCH)


class StandIn(nn.Module):
    """A host of parts at dotted paths, with a batch to train on and a step.

    A frame's features come from its ``eyes``, the next frame's slots from its ``predictor``. The first slots are far
    apart, so that labels differ. ``existing`` are the slots ``(B, S)`` that exist, where some do not; ``clips`` is
    whether frames are clips of their own; ``shown`` are the frames ``(B, T)`` of its masks, where not their own.
    """

    eyes, predictor, clips = "encoder", "", False
    existing: Tensor | None = None
    shown: Tensor | None = None

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.seeds = nn.Parameter(3 * torch.randn(S, DIM))
        for path, part in parts.items():
            *outer, last = path.split(".")
            parent: nn.Module = self
            for name in outer:
                parent.add_module(name, getattr(parent, name, nn.Module()))
                parent = getattr(parent, name)
            parent.add_module(last, part)

    def first_slots(self, videos: Tensor) -> Tensor:
        return self.seeds.expand(len(videos), -1, -1)

    def features(self, video: Tensor) -> Tensor:
        seen = self.get_submodule(self.eyes)(3 * video.flatten(0, 1))
        return seen.flatten(2).mT.unflatten(0, video.shape[:2])

    def attend(self, frame: Tensor, slots: Tensor, t: int) -> Tensor:
        return first_of(parts(self)[0](frame, slots))

    def draw(self, slots: Tensor) -> Any:
        return first_of(parts(self)[1](slots.flatten(0, 1)))

    def states(self, video: Tensor, first: Tensor | None = None) -> Tensor:
        """Slots ``(B, T, S, D)`` of all frames: `attend` sees those predicted from the frame before."""
        predict = self.get_submodule(self.predictor) if self.predictor else nn.Identity()
        slots, states = self.first_slots(video) if first is None else first, []
        for t, frame in enumerate(self.features(video).unbind(1)):
            states.append(self.attend(frame, slots, t))
            slots = predict(states[-1])
        return torch.stack(states, 1)

    def forward(self, video: Tensor) -> Any:
        return self.draw(self.states(video))

    def batch(self) -> Any:
        return {"video": torch.rand(B, T, 3, *FRAME)}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch["video"]).square().mean()


def first_of(output: Any) -> Tensor:
    if isinstance(output, (dict, tuple)):
        return next(iter(output.values() if isinstance(output, dict) else output))
    return getattr(output, "reconstruction", output)


def parts(host: nn.Module) -> tuple[Any, Any]:
    one, two = (next(m for m in host.modules() if getattr(m, "side", "") == side) for side in ("attention", "masks"))
    return one, two


def forget(host: nn.Module) -> None:
    """Lets go of what a stand-in kept for itself: tensors of a graph can be neither copied nor compared twice."""
    for module in host.modules():
        if isinstance(module, Kept):
            module.own_logits.clear()
