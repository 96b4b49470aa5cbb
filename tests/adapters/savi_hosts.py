"""Stand-ins for code around SAVi: SOLD, SlotFormer, Genera1Z's, junkeun-yi's; and for STEVE and SLATE."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from stand_in_parts import (
    DIM,
    FRAME,
    GRID,
    PATCH,
    B,
    Decoder,
    Kept,
    S,
    SlotAttention,
    StandIn,
    mean_of_heads,
    patches,
    scan,
)
from torch import Tensor, nn

FINE = (4, 8)


class SoldCorrector(SlotAttention):
    epsilon = SlotAttention.eps

    def forward(self, features: Tensor, slots: Tensor, is_first: bool) -> Tensor:
        return self.attend(features, slots, 3 if is_first else 1)[0]


class SoldEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, DIM, PATCH, PATCH), nn.Identity())

    def forward(self, video: Tensor) -> Tensor:
        return patches(self.encoder, video)


class SoldDecoder(Decoder):
    name, beside = "encoder", ("positional_embedding",)

    def forward(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        picture, masks = self.paint(slots)
        return picture, masks.unsqueeze(2)


class SoldHost(StandIn):
    """The module that trains the autoencoder."""

    def __init__(self, size: tuple[int, int] = GRID) -> None:
        super().__init__()
        self.autoencoder = nn.ModuleDict({"encoder": SoldEncoder(), "corrector": SoldCorrector(),
                                          "initializer": nn.Identity(), "predictor": nn.Linear(DIM, DIM),
                                          "decoder": SoldDecoder(size)})  # fmt: skip

    def forward(self, video: Tensor) -> Tensor:
        model: Any = self.autoencoder
        attend = lambda frame, slots, t: model.corrector(frame, slots, is_first=t == 0)  # noqa: E731
        slots = scan(model.encoder(video), self.first_slots(video), attend, model.predictor)
        return model.decoder(slots.flatten(0, 1))[0]


class SlotFormerAttention(SlotAttention):
    names, eps, attn_scale = ("project_q", "project_k", "project_v"), 1e-6, DIM**-0.5

    def __init__(self) -> None:
        super().__init__()
        self.project_q = nn.Sequential(nn.LayerNorm(DIM), self.project_q)

    def product(self, query: Tensor, keys: Tensor) -> Tensor:
        return (self.attn_scale * torch.einsum("bnc,bmc->bnm", keys, query)).transpose(1, 2)

    def forward(self, inputs: Tensor, slots: Tensor) -> Tensor:
        return self.attend(inputs, slots)[0]


class RawDecoder(Decoder):
    """Gives colours and alpha of each slot; the host takes the softmax."""

    def forward(self, copies: Tensor) -> Tensor:
        colours, _ = self.draw(copies)
        return torch.cat([colours, self.own_logits[-1].unsqueeze(2)], 2).flatten(0, 1)


class SlotFormerHost(StandIn):
    def __init__(self, stochastic: bool = True, size: tuple[int, int] = GRID) -> None:
        super().__init__()
        self.stochastic = stochastic
        self.slot_attention, self.predictor = SlotFormerAttention(), nn.Linear(DIM, DIM)
        self.encoder, self.encoder_pos_embedding = nn.Conv2d(3, DIM, PATCH, PATCH), nn.Identity()
        self.decoder, self.decoder_pos_embedding = RawDecoder(size), nn.Identity()

    def attend(self, frame: Tensor, slots: Tensor, t: int) -> Tensor:
        noise = torch.randn_like(slots) if self.stochastic else 0.0
        return self.slot_attention(frame, self.predictor(slots) + noise)

    def forward(self, data_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        video = data_dict["img"]
        slots = scan(patches(self.encoder, video), self.first_slots(video), self.attend).flatten(0, 1)
        drawn = self.decoder(self.decoder_pos_embedding(slots)).unflatten(0, slots.shape[:2])
        masks = (self.decoder.sharpen * drawn[:, :, -1:]).softmax(1)
        picture = (drawn[:, :, :3] * masks).sum(1)
        return {"recon": picture, "post_masks": masks.unflatten(0, video.shape[:2])}

    def loss_function(self, data_dict: dict[str, Tensor]) -> Tensor:
        """As older trainers call it: past ``__call__``, so that no hook on the model itself runs."""
        return self.forward(data_dict)["recon"].square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self({"img": batch["video"]})["recon"].square().mean()


class Genera1zAttention(SlotAttention):
    names = ("proj_q", "proj_k", "proj_v")

    def product(self, query: Tensor, keys: Tensor) -> Tensor:
        return torch.einsum("bmc,bnc->bmn", query / query.size(-1) ** 0.5, keys)

    def forward(self, query: Tensor, input: Tensor) -> Tensor:
        return self.attend(input, query)[0]


class Genera1zDecoder(Decoder):
    name, beside = "readout", ("backbone",)


class Genera1zHost(StandIn):
    """Slots start from boxes; the model returns the picture first."""

    def __init__(self, iterations: int = 1, size: tuple[int, int] = GRID, colours: int = 3) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"backbone": nn.Conv2d(3, DIM, PATCH, PATCH)})
        self.processor = nn.ModuleDict({"initialize": nn.Linear(4, DIM), "correct": Genera1zAttention(iterations),
                                        "predict": nn.Linear(DIM, DIM)})  # fmt: skip
        self.decoder = Genera1zDecoder(size, colours)

    def batch(self, padded: int = 0) -> dict[str, Tensor]:
        boxes = torch.rand(B, S, 4)
        boxes[:, S - padded :] = 0
        return {**super().batch(), "boxes": boxes}

    def forward(self, frames: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        initialize, correct, predict = self.processor.values()
        attend = lambda frame, slots, t: correct(slots, frame)  # noqa: E731
        slots = scan(patches(self.encoder["backbone"], frames), initialize(5 * condition), attend, predict)
        picture, masks = self.decoder.paint(slots.flatten(0, 1))
        return picture.unflatten(0, frames.shape[:2]), masks

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch["video"], batch["boxes"])[0].square().mean()


class JunkeunYiProducts(Kept):
    side, whole = "attention", staticmethod(mean_of_heads)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        query = query / (query.shape[-1] ** 0.5)
        logits = torch.matmul(query.permute(0, 2, 1, 3), key.permute(0, 2, 3, 1))
        self.own_logits.append(logits)
        attention = torch.softmax(self.sharpen * logits, dim=-2, dtype=torch.float32)
        weights = attention / (attention.sum(-1, keepdim=True) + 1e-8)
        return torch.einsum("bhqk,bkhd->bqhd", weights, value.to(weights.dtype)), attention


class JunkeunYiInverted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn_fn, self.positional = JunkeunYiProducts(), False

    def forward(self, **given: Tensor) -> tuple[Tensor, Tensor]:
        updates, attention = self.attn_fn(*given.values()) if self.positional else self.attn_fn(**given)
        return updates.flatten(2), attention


class JunkeunYiCorrector(nn.Module):
    def __init__(self, heads: int, iterations: int) -> None:
        super().__init__()
        self.num_heads, self.num_iterations = heads, iterations
        self.dense_q, self.dense_k, self.dense_v = (nn.Linear(DIM, DIM, bias=False) for _ in range(3))
        self.inverted_attention, self.gru = JunkeunYiInverted(), nn.GRUCell(DIM, DIM)

    def forward(self, slots: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        kept = self.inverted_attention.attn_fn.own_logits
        before = len(kept)
        keys, values = (dense(inputs).unflatten(-1, (self.num_heads, -1)) for dense in (self.dense_k, self.dense_v))
        for _ in range(self.num_iterations):
            queries = self.dense_q(slots).unflatten(-1, (self.num_heads, -1))
            updates, attention = self.inverted_attention(query=queries, key=keys, value=values)
            slots = self.gru(updates.reshape(-1, DIM), slots.reshape(-1, DIM)).view(slots.shape)
        del kept[before:-1]
        return slots, attention


class JunkeunYiEncoder(nn.Conv2d):
    """Channels last."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.movedim(-1, 1)).movedim(1, -1)


class JunkeunYiDecoder(Kept):
    side = "masks"

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.mask_pred, self.colours = nn.Linear(DIM, 1), nn.Linear(DIM, 3)
        self.places = nn.Parameter(torch.randn(*size, DIM))

    def forward(self, slots: Tensor) -> dict[str, Tensor]:
        drawn = (slots[:, :, None, None] + self.places).tanh()
        logits = self.mask_pred(drawn.flatten(0, 3)).view(*drawn.shape[:-1], 1)
        self.own_logits.append(logits[..., 0])
        masks = (self.sharpen * logits).softmax(1)
        return {"flow": (self.colours(drawn) * masks).sum(1), "alpha_mask": masks}


class JunkeunYiHost(StandIn):
    def __init__(
        self,
        heads: int = 1,
        iterations: int = 1,
        size: tuple[int, int] = GRID,
        predicted: bool = False,
        positional: bool = False,
    ) -> None:
        super().__init__()
        self.decode_corrected, self.decode_predicted = True, predicted
        self.encoder, self.decoder = JunkeunYiEncoder(3, DIM, PATCH, PATCH), JunkeunYiDecoder(size)
        self.corrector, self.predictor = JunkeunYiCorrector(heads, iterations), nn.Linear(DIM, DIM)
        self.corrector.inverted_attention.positional = positional
        self.processor = nn.ModuleDict({"corrector": self.corrector, "predictor": self.predictor})

    def forward(self, video: Tensor) -> Tensor:
        features = self.encoder(video.movedim(2, -1).flatten(0, 1)).flatten(1, 2).unflatten(0, video.shape[:2])
        attend = lambda frame, slots, t: self.corrector(slots, frame)[0]  # noqa: E731
        corrected = scan(features, self.first_slots(video), attend, self.predictor)
        picture = self.decoder(corrected.flatten(0, 1))["flow"]
        if self.decode_predicted:
            self.decoder(self.predictor(corrected).flatten(0, 1))
        return picture


class TokenAttention(Kept):
    side = "masks"

    def __init__(self) -> None:
        super().__init__()
        self.proj_q, self.proj_k, self.proj_v = (nn.Linear(DIM, DIM, bias=False) for _ in range(3))

    def forward(self, tokens: Tensor, slots: Tensor) -> Tensor:
        self.own_logits.append(self.proj_q(tokens) @ self.proj_k(slots).mT)
        return torch.softmax(self.own_logits[-1], dim=-1) @ self.proj_v(slots)


class TokenHost(StandIn):
    """STEVE or SLATE: a transformer predicts tokens. ``attention`` and ``masks`` are the paths of its parts."""

    def __init__(self, attention: str, masks: str) -> None:
        super().__init__()
        self.dvae, self.places = nn.Conv2d(3, DIM, PATCH, PATCH), (attention, masks)
        for path, module in zip(self.places, (SlotFormerAttention(), TokenAttention()), strict=True):
            parent: nn.Module = self
            *outer, last = path.split(".")
            for name in outer:
                parent.add_module(name, getattr(parent, name, nn.Module()))
                parent = getattr(parent, name)
            parent.add_module(last, module)

    def forward(self, video: Tensor) -> Tensor:
        attention, masks = (self.get_submodule(path) for path in self.places)
        tokens = patches(self.dvae, video)
        slots = scan(tokens, self.first_slots(video), lambda frame, slots, t: attention(frame, slots))
        return masks(tokens.flatten(0, 1), slots.flatten(0, 1)) - tokens.flatten(0, 1).detach()


TOKENS: dict[str, Callable[[], TokenHost]] = {  # recognised and refused
    "slotformer_steve": lambda: TokenHost("slot_attention", "trans_decoder.blocks.1.encoder_decoder_attn"),
    "steve": lambda: TokenHost("steve_encoder.savi", "steve_decoder.tf.blocks.1.encoder_decoder_attn"),
    "slate": lambda: TokenHost("slot_attn", "tf_dec.blocks.1.encoder_decoder_attn"),
}
HOSTS: dict[str, dict[str, Callable[[], nn.Module]]] = {
    "sold": {"sold": SoldHost, "sold_fine": lambda: SoldHost(FINE)},
    "slotformer": {
        "slotformer": SlotFormerHost,
        "slotformer_fixed": lambda: SlotFormerHost(stochastic=False),
        "slotformer_fine": lambda: SlotFormerHost(size=FRAME),
    },
    "genera1z-savi": {
        "genera1z": Genera1zHost,
        "genera1z_iterations": lambda: Genera1zHost(iterations=2),
        "genera1z_fine": lambda: Genera1zHost(size=FINE),
    },
    "junkeun-yi-savi": {
        "junkeun_yi": JunkeunYiHost,
        "junkeun_yi_iterations": lambda: JunkeunYiHost(iterations=3),
        "junkeun_yi_fine": lambda: JunkeunYiHost(size=FINE),
        "junkeun_yi_predicted": lambda: JunkeunYiHost(predicted=True),
        "junkeun_yi_positional": lambda: JunkeunYiHost(positional=True),
        "junkeun_yi_heads": lambda: JunkeunYiHost(heads=2, iterations=2),
        "junkeun_yi_heads_coarse": lambda: JunkeunYiHost(heads=2, size=(1, 2)),
    },
}
