"""LightningModules with the layout of the VideoSAUR family and of its forks. `HOSTS` names factories."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from videosaur_hosts import (
    DIM,
    BroadcastDecoder,
    Corrector,
    Encoder,
    MixerDecoder,
    MLPDecoder,
    OverTime,
    Processor,
    Scan,
)

GRID, FRAME, T = (2, 4), (8, 16), 3
N = GRID[0] * GRID[1]


class VideosaurHost(L.LightningModule):
    """A video model; its slots may grow with the step, and its validation may scan forth and back.

    Args:
        decoder: Of one frame.
        slots: Number of slots, at each of the steps of ``growth``, then for good.
        growth: Optimizer steps at which the next number holds.
        and_back: Validation scans forth and back.
        lr: Learning rate.
        **corrector: Of the corrector.
    """

    def __init__(
        self,
        decoder: nn.Module | None = None,
        slots: tuple[int, ...] = (4,),
        growth: tuple[int, ...] = (),
        and_back: bool = False,
        lr: float = 1e-2,
        **corrector: Any,
    ) -> None:
        super().__init__()
        self.counts, self.growth, self.and_back, self.lr = slots, growth, and_back, lr
        # Far apart, so that tiny untrained maps have more than one label.
        self.slots = nn.Parameter(4 * torch.randn(slots[-1], DIM))
        self.encoder = OverTime(Encoder())
        self.processor = Scan(Processor(Corrector(**corrector)))
        self.decoder = OverTime(MLPDecoder(N) if decoder is None else decoder)
        self.host_losses: list[Tensor] = []
        self.corrector_calls: list[int] = []

    @property
    def num_slots(self) -> int:
        step = 0 if self._trainer is None else self.trainer.global_step
        return self.counts[sum(step >= at for at in self.growth)]

    def forward(self, video: Tensor) -> dict[str, Tensor]:
        grown = self.num_slots if self.training else self.counts[-1]
        initial = self.slots[:grown].expand(len(video), -1, -1)
        before = len(self.processor.module.corrector.own_logits)
        states = self.processor(initial, self.encoder(video), and_back=self.and_back and not self.training)
        self.corrector_calls.append(len(self.processor.module.corrector.own_logits) - before)
        return self.decoder(states)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = (self(batch["video"])["masks"] - 0.3).square().mean()
        self.host_losses.append(loss.detach())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch["video"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class FrameDecoder(nn.Module):
    """Where a fork's decoder folds the frames itself: its wrapper only unfolds them again."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, slots: Tensor) -> dict[str, Tensor]:
        return {key: value.unflatten(0, slots.shape[:2]) for key, value in self.module(slots).items()}


class FoldingDecoder(MLPDecoder):
    def forward(self, slots: Tensor) -> dict[str, Tensor]:
        return super().forward(slots.flatten(0, 1))


class RegularisedHost(VideosaurHost):
    """Has a second softmax, over patches, in its corrector."""

    def __init__(self) -> None:
        super().__init__(over_patches=True)
        self.decoder = FrameDecoder(FoldingDecoder(N))  # type: ignore[assignment]


class VideosaurImages(VideosaurHost):
    """An image model has no wrappers over time."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.processor, self.decoder = Encoder(), Processor(Corrector()), MLPDecoder(N)  # type: ignore[assignment]

    def forward(self, video: Tensor) -> dict[str, Tensor]:
        slots = self.slots.expand(len(video), -1, -1)
        return self.decoder(self.processor.corrector(slots, self.encoder(video[:, 0]))["slots"])


HOSTS: dict[str, Callable[[], nn.Module]] = {
    "videosaur_mlp": VideosaurHost,
    "videosaur_mixer": lambda: VideosaurHost(MixerDecoder(N)),
    "videosaur_broadcast": lambda: VideosaurHost(BroadcastDecoder(GRID)),
    "videosaur_pixels": lambda: VideosaurHost(BroadcastDecoder(FRAME)),
    "videosaur_images": VideosaurImages,
    "videosaur_dots": lambda: VideosaurHost(give_dots=True),
    "videosaur_two_softmaxes": RegularisedHost,
    "videosaur_growing": lambda: VideosaurHost(slots=(2, 3, 4), growth=(1, 2), and_back=True),
}


def videosaur_batch(videos: int = 2, seed: int = 0) -> dict[str, Tensor]:
    return {"video": 3 * torch.randn(videos, T, 3, *FRAME, generator=torch.Generator().manual_seed(seed))}


def training_loss(host: Any) -> Tensor:
    return (host(videosaur_batch()["video"])["masks"] - 0.3).square().mean()


def videosaur_loader(batches: int = 3, videos: int = 2) -> Any:
    clips = [{"video": videosaur_batch(1, seed)["video"][0]} for seed in range(batches * videos)]
    return torch.utils.data.DataLoader(clips, batch_size=videos, generator=torch.Generator())  # type: ignore[arg-type]
