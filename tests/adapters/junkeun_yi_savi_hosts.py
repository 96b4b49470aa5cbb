"""A small plain model with the layout of junkeun-yi's SAVi."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

DIM, SIZE, SLOTS = 8, 8, 3


class JunkeunYiProducts(nn.Module):
    sharpen = 1.0

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        query = query / (query.shape[-1] ** 0.5)
        logits = torch.matmul(query.permute(0, 2, 1, 3), key.permute(0, 2, 3, 1))
        self.own = logits
        attention = torch.softmax(self.sharpen * logits, dim=-2, dtype=torch.float32)
        weights = attention / (attention.sum(-1, keepdim=True) + 1e-8)
        return torch.einsum("bhqk,bkhd->bqhd", weights, value.to(weights.dtype)), attention


class JunkeunYiInverted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn_fn = JunkeunYiProducts()

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        updates, attention = self.attn_fn(query=query, key=key, value=value)
        return updates.flatten(2), attention


class JunkeunYiCorrector(nn.Module):
    def __init__(self, heads: int, iterations: int) -> None:
        super().__init__()
        self.num_heads, self.num_iterations = heads, iterations
        self.dense_q, self.dense_k, self.dense_v = (nn.Linear(DIM, DIM, bias=False) for _ in range(3))
        self.inverted_attention = JunkeunYiInverted()
        self.gru = nn.GRUCell(DIM, DIM)
        self.own_logits: list[Tensor] = []

    def forward(self, slots: Tensor, inputs: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        keys, values = (dense(inputs).unflatten(-1, (self.num_heads, -1)) for dense in (self.dense_k, self.dense_v))
        for _ in range(self.num_iterations):
            queries = self.dense_q(slots).unflatten(-1, (self.num_heads, -1))
            updates, attention = self.inverted_attention(query=queries, key=keys, value=values)
            slots = self.gru(updates.reshape(-1, DIM), slots.reshape(-1, DIM)).view(slots.shape)
        self.own_logits.append(self.inverted_attention.attn_fn.own)
        return slots, attention


class JunkeunYiProcessor(nn.Module):
    def __init__(self, corrector: nn.Module, predictor: nn.Module) -> None:
        super().__init__()
        self.corrector, self.predictor = corrector, predictor

    def forward(self, slots: Tensor, inputs: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        corrected, attention = self.corrector(slots, inputs.flatten(1, 2), padding_mask)
        return corrected, self.predictor(corrected), attention


class JunkeunYiEncoder(nn.Module):
    def __init__(self, stride: int) -> None:
        super().__init__()
        self.backbone = nn.Conv2d(3, DIM, 3, stride, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone(images.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class JunkeunYiDecoder(nn.Module):
    sharpen = 1.0

    def __init__(self, size: int) -> None:
        super().__init__()
        self.mask_pred, self.colours = nn.Linear(DIM, 1), nn.Linear(DIM, 3)
        self.place = nn.Parameter(torch.randn(size, size, DIM))

    def forward(self, slots: Tensor) -> dict[str, Tensor]:
        drawn = (slots.flatten(0, 1)[:, None, None] + self.place).tanh()
        logits = self.mask_pred(drawn.flatten(0, 2)).reshape(*slots.shape[:2], *drawn.shape[1:3], 1)
        self.own_alpha = logits[..., 0]
        masks = (self.sharpen * logits).softmax(1)
        colours = self.colours(drawn.flatten(0, 2)).reshape(*logits.shape[:-1], 3)
        return {"flow": (colours * masks).sum(1), "alpha_mask": masks}


class JunkeunYiHost(nn.Module):
    def __init__(
        self, heads: int = 1, iterations: int = 1, stride: int = 1, decoder_size: int = SIZE, predicted: bool = False
    ) -> None:
        super().__init__()
        self.decode_corrected, self.decode_predicted = True, predicted
        self.initializer = nn.Linear(4, DIM)
        self.encoder, self.decoder = JunkeunYiEncoder(stride), JunkeunYiDecoder(decoder_size)
        self.corrector, self.predictor = JunkeunYiCorrector(heads, iterations), nn.Linear(DIM, DIM)
        self.processor = JunkeunYiProcessor(self.corrector, self.predictor)

    def forward(self, video: Tensor, conditioning: Tensor, padding_mask: Tensor | None = None) -> dict[str, Any]:
        self.corrector.own_logits.clear()
        features = self.encoder(video.flatten(0, 1)).unflatten(0, video.shape[:2])
        slots, corrected, predicted, attention = self.initializer(conditioning[:, 0]), [], [], []
        for t in range(video.shape[1]):
            state, slots, weights = self.processor(slots, features[:, t], padding_mask)
            corrected.append(state)
            predicted.append(slots)
            attention.append(weights)
        outputs = self.decoder(torch.stack(corrected, 1).flatten(0, 1))
        self.decoder.first_alpha = self.decoder.own_alpha
        if self.decode_predicted:
            self.decoder(torch.stack(predicted, 1).flatten(0, 1))
        outputs = {key: value.unflatten(0, video.shape[:2]) for key, value in outputs.items()}
        return {"outputs": outputs, "attention": torch.stack(attention, 1)}


HOSTS: dict[str, Callable[[], nn.Module]] = {
    "junkeun_yi": JunkeunYiHost,
    "junkeun_yi_iterations": lambda: JunkeunYiHost(iterations=3),
    "junkeun_yi_strided": lambda: JunkeunYiHost(stride=2),
    "junkeun_yi_predicted": lambda: JunkeunYiHost(predicted=True),
    "junkeun_yi_heads": lambda: JunkeunYiHost(heads=2, iterations=2),
}


def training_loss(host: Any) -> Tensor:
    video, boxes = torch.rand(2, 3, SIZE, SIZE, 3), torch.rand(2, 3, SLOTS, 4)
    flow = host(video=video, conditioning=boxes)["outputs"]["flow"]
    factor = SIZE // flow.shape[2]
    target = video[:, :, ::factor, ::factor]
    return (flow - target).square().flatten(1).sum(1).mean()


def parts(host: Any) -> tuple[Any, Any]:
    """Slot attention and decoder, each with a ``sharpen`` to tamper with."""
    return host.corrector.inverted_attention.attn_fn, host.decoder


def own_maps(host: Any) -> tuple[Tensor, Tensor]:
    """What the host computed itself: ``(B, T, S, N)`` (mean over heads) and ``(B, T, S, h, w)`` logits."""
    logits = torch.stack(host.corrector.own_logits, 1)
    merged = logits.squeeze(2) if logits.shape[2] == 1 else logits.float().mean(2)
    return merged, host.decoder.first_alpha.unflatten(0, logits.shape[:2])
