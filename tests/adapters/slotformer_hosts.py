"""A small plain model with the layout of SlotFormer's StoSAVi."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

DIM, SLOTS, SIZE = 6, 3, 8


class SlotFormerAttention(nn.Module):
    sharpen = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.num_iterations, self.eps, self.attn_scale = 2, 1e-6, DIM**-0.5
        self.project_q = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, DIM, bias=False))
        self.project_k, self.project_v = nn.Linear(DIM, DIM, bias=False), nn.Linear(DIM, DIM, bias=False)
        self.gru = nn.GRUCell(DIM, DIM)
        self.own_logits: list[Tensor] = []

    def forward(self, inputs: Tensor, slots: Tensor) -> Tensor:
        k, v = self.project_k(inputs), self.project_v(inputs)
        for _ in range(self.num_iterations):
            logits = self.attn_scale * torch.einsum("bnc,bmc->bnm", k, self.project_q(slots))
            weights = (self.sharpen * logits).softmax(-1) + self.eps
            update = torch.einsum("bnm,bnc->bmc", weights / weights.sum(1, keepdim=True), v)
            slots = self.gru(update.view(-1, DIM), slots.reshape(-1, DIM)).view(slots.shape)
        self.own_logits.append(logits.transpose(1, 2))
        return slots


class SlotFormerHost(nn.Module):
    """``resolution`` of twice the encoder's map gives masks finer than the attention."""

    sharpen = 1.0

    def __init__(self, stochastic: bool = True, resolution: int = SIZE) -> None:
        super().__init__()
        self.stochastic = stochastic
        self.resolution = (resolution, resolution)
        self.init_latents = nn.Parameter(torch.randn(1, SLOTS, DIM))
        self.kernel_dist_layer = nn.Linear(DIM, 2 * DIM)
        self.slot_attention = SlotFormerAttention()
        self.encoder = nn.Sequential(nn.Conv2d(3, DIM, 3, resolution // SIZE, 1))
        self.encoder_pos_embedding = nn.Identity()
        self.encoder_out_layer = nn.Linear(DIM, DIM)
        self.decoder = nn.Sequential(nn.ConvTranspose2d(DIM, DIM, 2, 2), nn.ReLU(), nn.Conv2d(DIM, 4, 1))
        self.decoder_pos_embedding = nn.Conv2d(DIM, DIM, 1)
        self.place = nn.Parameter(torch.randn(DIM, resolution // 2, resolution // 2))
        self.predictor = nn.Linear(DIM, DIM)

    def forward(self, data_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        img = data_dict["img"]
        self.slot_attention.own_logits.clear()
        features = self.encoder_pos_embedding(self.encoder(img.flatten(0, 1)))
        features = self.encoder_out_layer(features.flatten(2).transpose(1, 2)).unflatten(0, img.shape[:2])
        slots, states = self.init_latents.repeat(len(img), 1, 1), []
        for t in range(img.shape[1]):
            mean, log_variance = self.kernel_dist_layer(self.predictor(slots) if t else slots).chunk(2, -1)
            kernels = mean + torch.randn_like(mean) * (log_variance / 2).exp() if self.stochastic else mean
            slots = self.slot_attention(features[:, t], kernels)
            states.append(slots)
        combined, masks = self.decode(torch.stack(states, 1).flatten(0, 1))
        return {
            "post_recon_combined": combined.unflatten(0, img.shape[:2]),
            "post_masks": masks.unflatten(0, img.shape[:2]),
        }

    def decode(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        drawn = self.decoder(self.decoder_pos_embedding(slots.flatten(0, 1)[:, :, None, None] + self.place))
        drawn = drawn.unflatten(0, slots.shape[:2])
        self.own_alpha = drawn[:, :, -1]
        masks = (self.sharpen * drawn[:, :, -1:]).softmax(1)
        return (drawn[:, :, :3] * masks).sum(1), masks

    def loss_function(self, data_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """As older trainers call it: past ``__call__``, so that no hook on the model itself runs."""
        return self.calc_train_loss(data_dict, self.forward(data_dict))

    def calc_train_loss(self, data_dict: dict[str, Tensor], out_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"post_recon_loss": nn.functional.mse_loss(out_dict["post_recon_combined"], data_dict["img"])}


HOSTS: dict[str, Callable[[], nn.Module]] = {
    "slotformer": SlotFormerHost,
    "slotformer_fixed": lambda: SlotFormerHost(stochastic=False),
    "slotformer_fine": lambda: SlotFormerHost(resolution=2 * SIZE),
}


def slotformer_batch(host: Any, videos: int = 2, frames: int = 3) -> dict[str, Tensor]:
    return {"img": torch.rand(videos, frames, 3, *host.resolution)}


def training_loss(host: Any) -> Tensor:
    batch = slotformer_batch(host)
    return host.calc_train_loss(batch, host(batch))["post_recon_loss"]


def parts(host: Any) -> tuple[Any, Any]:
    """Slot attention and decoder, each with a ``sharpen`` to tamper with."""
    return host.slot_attention, host


def own_maps(host: Any) -> tuple[Tensor, Tensor]:
    """What the host computed itself: ``(B, T, S, N)`` and ``(B, T, S, h, w)`` logits."""
    logits = torch.stack(host.slot_attention.own_logits, 1)
    return logits, host.own_alpha.unflatten(0, logits.shape[:2])
