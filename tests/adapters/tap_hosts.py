"""Hosts that no adapter knows: their modules return only slots and pictures, the maps exist inside of them alone."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as L
import torch
from stand_in_parts import DIM, FRAME, GRID, B, Decoder, N, S, SlotAttention, StandIn, eyes
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# How hosts call the softmax over the slots of logits (B, S, N), also with other layouts; it comes back in their shape
SOFTMAXES: dict[str, Callable[[Tensor], Tensor]] = {
    "method": lambda x: x.softmax(1),
    "method_keyword": lambda x: x.softmax(dim=1),
    "torch": lambda x: torch.softmax(x, 1),
    "negative": lambda x: torch.softmax(x, dim=-2),
    "functional": lambda x: F.softmax(x, dim=1),
    "keywords": lambda x: F.softmax(input=x, dim=1),
    "module": nn.Softmax(dim=1),
    "special": lambda x: torch.special.softmax(x, 1),
    "log": lambda x: F.log_softmax(x, 1).exp(),
    "float": lambda x: x.softmax(1, dtype=torch.float32),
    "patches_first": lambda x: x.mT.softmax(2).mT,
}
# How decoders lay out alpha (B, T, S, N) for the softmax, which comes back in its shape
MASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "btsn": lambda x: x.softmax(2),
    "btns": lambda x: x.mT.softmax(3).mT,
    "bsn": lambda x: x.flatten(0, 1).softmax(1).view_as(x),
    "bns": lambda x: x.flatten(0, 1).mT.softmax(-1).mT.reshape(x.shape),
    "bs1hw": lambda x: x.flatten(0, 1).unflatten(2, (1, *GRID)).softmax(1).view_as(x),
    "bshw1": lambda x: x.flatten(0, 1).unflatten(2, (*GRID, 1)).softmax(1).view_as(x),
    "btshw": lambda x: x.unflatten(3, GRID).softmax(2).view_as(x),
}


class SlotsOnly(SlotAttention):
    gone: Tensor | None = None

    def __init__(self, how: str = "method", iterations: int = 2) -> None:
        super().__init__(iterations)
        self.inner, self.bias = SOFTMAXES[how], torch.zeros(())

    def product(self, query: Tensor, keys: Tensor) -> Tensor:
        logits = super().product(query, keys) + self.bias
        return logits if self.gone is None else logits.masked_fill(self.gone, float("-inf"))

    def softmax(self, logits: Tensor) -> Tensor:
        return self.inner(logits)

    def forward(self, features: Tensor, slots: Tensor) -> Tensor:
        slots, _ = self.attend(features, slots)
        # A second softmax over other axes, as of a predictor, must not be taken for the map.
        return slots + 0.1 * (slots @ slots.mT).softmax(2) @ slots


class PicturesOnly(Decoder):
    def __init__(self, layout: str = "bsn") -> None:
        super().__init__()
        self.layout = layout

    def softmax(self, alpha: Tensor, axis: int) -> Tensor:
        return MASKS[self.layout](alpha)

    def forward(self, slots: Tensor) -> Any:
        return self.paint(slots)[0]


class Unknown(StandIn):
    eyes = "eyelid"

    def __init__(self, attention: SlotsOnly | None = None, decoder: PicturesOnly | None = None) -> None:
        found = {"binder": SlotsOnly() if attention is None else attention}
        super().__init__({"eyelid": eyes(), **found, "painter": PicturesOnly() if decoder is None else decoder})
        self.checkpointing = ""

    def attend(self, frame: Tensor, slots: Tensor, t: int) -> Tensor:
        if self.checkpointing:
            return checkpoint(self.binder, frame, slots, use_reentrant=self.checkpointing == "reentrant")
        return self.binder(frame, slots)

    def draw(self, slots: Tensor) -> Tensor:
        return self.painter(slots)

    def own(self) -> tuple[Tensor, Tensor]:
        return torch.stack(self.binder.own_logits, 1), self.painter.own_logits[-1]


class UnknownHost(L.LightningModule):
    """An image model whose softmaxes are in methods of its own, outside of any forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.seeds, self.eyelid = nn.Parameter(torch.randn(S, DIM)), eyes()
        self.position = nn.Parameter(2 * torch.randn(N, DIM))

    def bind(self, images: Tensor) -> Tensor:
        features = self.eyelid(images).flatten(2).mT
        self.attention = (features + self.position) @ self.seeds.T  # (B, N, S)
        weights = self.attention.softmax(-1)
        return self.seeds + torch.einsum("bns,bnd->bsd", weights / weights.sum(1, keepdim=True), features)

    def paint(self, slots: Tensor) -> Tensor:
        self.alpha = (slots @ self.position.T).unflatten(2, (1, *GRID))
        return torch.einsum("bsxhw,bsd->bxhw", self.alpha.softmax(1), slots)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.paint(self.bind(batch["image"])).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def make_unknown(attention: SlotsOnly | None = None, decoder: PicturesOnly | None = None) -> Unknown:
    torch.manual_seed(0)
    return Unknown(attention, decoder)


def clip(frames: int = 2, seed: int = 0) -> Tensor:
    return torch.rand((B, frames, 3, *FRAME), generator=torch.Generator().manual_seed(seed))
