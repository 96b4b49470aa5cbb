"""Stand-ins for code around SAVi, for STEVE and SLATE, and for models around the `slot-attention` package."""

from collections.abc import Callable
from typing import Any

import torch
from feature_hosts import MixerDecoder
from stand_in_parts import DIM, FRAME, GRID, Decoder, Kept, RawDecoder, S, SlotAttention, StandIn, eyes, mean_of_heads
from torch import Tensor, nn


class SoldCorrector(SlotAttention):
    epsilon, slots_only = SlotAttention.eps, True


class SoldDecoder(Decoder):
    name, beside = "encoder", ("positional_embedding",)

    def forward(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        picture, masks = self.paint(slots)
        return picture, masks.unsqueeze(2)


class SoldHost(StandIn):
    eyes, predictor = "autoencoder.encoder.encoder", "autoencoder.predictor"

    def __init__(self, size: tuple[int, int] = GRID) -> None:
        found = {"corrector": SoldCorrector(), "initializer": nn.Identity(), "decoder": SoldDecoder(size)}
        found |= {"encoder.encoder": eyes(), "predictor": nn.Linear(DIM, DIM)}
        super().__init__({f"autoencoder.{name}": part for name, part in found.items()})


class SlotFormerAttention(SlotAttention):
    names, slots_only = ("project_q", "project_k", "project_v"), True
    eps, attn_scale = 1e-6, DIM**-0.5

    def __init__(self) -> None:
        super().__init__()
        self.project_q = nn.Sequential(nn.LayerNorm(DIM), self.project_q)

    def product(self, query: Tensor, keys: Tensor) -> Tensor:
        return (self.attn_scale * torch.einsum("bnc,bmc->bnm", keys, query)).transpose(1, 2)

    def softmax(self, logits: Tensor) -> Tensor:
        return logits.transpose(1, 2).softmax(-1).transpose(1, 2)


class SlotFormerHost(StandIn):
    def __init__(self, stochastic: bool = True, size: tuple[int, int] = GRID) -> None:
        found = {"encoder": eyes(), "slot_attention": SlotFormerAttention(), "decoder": RawDecoder(size)}
        marks = {"encoder_pos_embedding": nn.Identity(), "decoder_pos_embedding": nn.Identity()}
        super().__init__({**found, **marks, "kernel": nn.Linear(DIM, DIM)})
        self.stochastic = stochastic

    def attend(self, frame: Tensor, slots: Tensor, t: int) -> Tensor:
        noise = torch.randn_like(slots) if self.stochastic else 0.0
        return self.slot_attention(frame, self.kernel(slots) + noise)

    def forward(self, data_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        slots = self.states(data_dict["img"])
        drawn = self.decoder(slots.flatten(0, 1)).unflatten(0, (-1, S))
        masks = (self.decoder.sharpen * drawn[:, :, -1:]).softmax(1)
        return {"recon": (drawn[:, :, :3] * masks).sum(1), "post_masks": masks.unflatten(0, slots.shape[:2])}

    def loss_function(self, data_dict: dict[str, Tensor]) -> Tensor:
        """As older trainers call it: past ``__call__``, so that no hook on the model itself runs."""
        return self.forward(data_dict)["recon"].square().mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self({"img": batch["video"]})["recon"].square().mean()


class Genera1zAttention(SlotAttention):
    names, slots_only = ("proj_q", "proj_k", "proj_v"), True

    def product(self, query: Tensor, keys: Tensor) -> Tensor:
        return torch.einsum("bmc,bnc->bmn", query / query.size(-1) ** 0.5, keys)


class Genera1zDecoder(Decoder):
    name, beside = "readout", ("backbone",)


class Genera1zHost(StandIn):
    eyes, predictor = "encoder.backbone", "processor.predict"

    def __init__(self, iterations: int = 1, size: tuple[int, int] = GRID, colours: int = 3) -> None:
        found = {"correct": Genera1zAttention(iterations), "predict": nn.Linear(DIM, DIM), "init": nn.Linear(4, DIM)}
        processor = {f"processor.{name}": part for name, part in found.items()}
        super().__init__({self.eyes: eyes(), **processor, "decoder": Genera1zDecoder(size, colours)})

    def batch(self, padded: int = 0) -> dict[str, Tensor]:
        batch = super().batch()
        boxes = torch.rand(len(batch["video"]), S, 4)
        boxes[:, S - padded :] = 0
        return {**batch, "boxes": boxes}

    def forward(self, frames: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        slots = self.states(frames, self.processor.init(5 * condition))
        picture, masks = self.decoder(slots.flatten(0, 1))
        return picture.unflatten(0, frames.shape[:2]), masks

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch["video"], batch["boxes"])[0].square().mean()


class JunkeunYiProducts(Kept):
    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        query = query / (query.shape[-1] ** 0.5)
        logits = torch.matmul(query.permute(0, 2, 1, 3), key.permute(0, 2, 3, 1))
        self.own_logits.append(logits)
        attention = torch.softmax(logits, dim=-2, dtype=torch.float32)
        weights = attention / (attention.sum(-1, keepdim=True) + 1e-8)
        return torch.einsum("bhqk,bkhd->bqhd", weights, value.to(weights.dtype)), attention


class JunkeunYiCorrector(SlotAttention):
    """A module inside of it takes the softmax, over slots for each head."""

    names, whole = ("dense_q", "dense_k", "dense_v"), staticmethod(mean_of_heads)

    def __init__(self, heads: int, iterations: int) -> None:
        super().__init__(iterations, heads)
        self.inverted_attention = nn.ModuleDict({"attn_fn": JunkeunYiProducts()})

    def split(self, value: Tensor) -> Tensor:
        return value.unflatten(-1, (self.heads, -1))

    def step(self, query, keys, values, present):
        inner: Any = self.inverted_attention["attn_fn"]
        update, probs = inner(query=query, key=keys, value=values)
        return inner.own_logits.pop(), probs, update


class JunkeunYiEncoder(nn.Conv2d):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.movedim(-1, 1)).movedim(1, -1)


class JunkeunYiDecoder(Decoder):
    name, channels_last = "mask_pred", True

    def forward(self, slots: Tensor) -> dict[str, Tensor]:
        return {"alpha_mask": self.draw(slots)[1].softmax(1).unsqueeze(-1)}


class JunkeunYiHost(StandIn):
    predictor = "processor.predictor"

    def __init__(self, heads=1, iterations=1, size=GRID, predicted=False):
        corrector = JunkeunYiCorrector(heads, iterations)
        found = {"corrector": corrector, "processor.corrector": corrector, self.predictor: nn.Linear(DIM, DIM)}
        super().__init__({"encoder": eyes(JunkeunYiEncoder), **found,
                          "decoder": JunkeunYiDecoder(size, colours=0)})  # fmt: skip
        self.decode_corrected, self.decode_predicted = True, predicted

    def features(self, video: Tensor) -> Tensor:
        return self.encoder(video.movedim(2, -1).flatten(0, 1)).flatten(1, 2).unflatten(0, video.shape[:2])

    def draw(self, slots: Tensor) -> Tensor:
        picture = super().draw(slots)
        if self.decode_predicted:
            self.decoder(self.processor.predictor(slots).flatten(0, 1))
        return picture


class TokenHost(StandIn):
    """STEVE or SLATE: a transformer predicts tokens. ``attention`` and ``masks`` are the paths of its parts."""

    eyes = "dvae"

    def __init__(self, attention: str, masks: str) -> None:
        super().__init__({"dvae": eyes(), attention: SlotFormerAttention(), masks: MixerDecoder()})
        self.places = (attention, masks)


class SplitHeads(nn.Module):
    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, value: Tensor) -> Tensor:
        return value.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class PackageAttention(SlotAttention):
    def __init__(self, heads: int | None = None) -> None:
        super().__init__(heads=heads or 1)
        self.slots_mu, self.slots_logsigma = (nn.Parameter(torch.ones(1, 1, DIM)) for _ in range(2))
        self.norm_input, self.norm_slots, self.several = nn.LayerNorm(DIM), nn.LayerNorm(DIM), heads is not None
        if heads is not None:
            self.split_heads, self.combine_heads = SplitHeads(heads), nn.Linear(DIM, DIM)

    def split(self, value: Tensor) -> Tensor:
        return self.split_heads(value) if self.several else value

    def product(self, query: Tensor, keys: Tensor) -> Tensor:
        return torch.einsum("...sd,...nd->...sn", query, keys) * self.scale

    def softmax(self, logits: Tensor) -> Tensor:
        return logits.softmax(-2)

    def mix(self, weights: Tensor, values: Tensor) -> Tensor:
        updates = weights @ values
        return self.combine_heads(updates.transpose(1, 2).flatten(2)) if self.several else updates

    def forward(self, inputs: Tensor, num_slots: int = S) -> Tensor:
        slots = self.slots_mu + self.slots_logsigma.exp() * torch.randn(len(inputs), num_slots, DIM)
        return self.attend(self.norm_input(inputs), self.norm_slots(slots))[0]

    def whole(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        return mean_of_heads(logits) if self.several else (logits, None)


class PackageWrapper(nn.Module):
    def __init__(self, kept: Any, heads: int | None = None) -> None:
        super().__init__()
        self.slot_attn, self.kept = PackageAttention(heads=heads), torch.tensor(kept)
        self.pred_keep_slot = nn.Linear(DIM, 2)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        slots = self.slot_attn(inputs)
        soft = self.pred_keep_slot(slots).softmax(-1)[..., -1]
        return slots, self.kept + soft - soft.detach()


class Pictures(RawDecoder):
    def __init__(self, last: bool) -> None:
        super().__init__(FRAME)
        self.last = last

    def forward(self, slots: Tensor) -> Tensor:
        return super().forward(slots).movedim(1, -1) if self.last else super().forward(slots)


class PackageHost(StandIn):
    """An autoencoder for images, for frames folded into the batch, or for frames one after another (``"loop"``).

    With ``unfold``, masks get their frames back before the softmax over slots.
    """

    def __init__(self, attention=None, frames="image", last=False, unfold=False):
        attention = PackageAttention() if attention is None else attention
        super().__init__({"encoder": eyes(), "decoder": Pictures(last), "slot_attn": attention})
        self.frames, self.unfold, self.clips = frames, unfold, frames == "loop"
        self.existing = attention.kept.bool() if isinstance(attention, PackageWrapper) else None

    def reconstruct(self, video: Tensor) -> Tensor:
        slots = self.slot_attn(self.features(video).flatten(0, 1))
        slots, kept = slots if isinstance(slots, tuple) else (slots, None)
        output = self.decoder(slots)
        output = (output.movedim(-1, 1) if self.decoder.last else output).unflatten(0, slots.shape[:2])
        lead = (-1, video.shape[1]) if self.unfold else (-1,)
        masks = output[:, :, 3:].unflatten(0, lead).softmax(len(lead)).flatten(0, len(lead) - 1)
        masks = masks if kept is None else masks * kept[:, :, None, None, None]
        return (output[:, :, :3] * masks).sum(1)

    def forward(self, video: Tensor) -> Tensor:
        if self.frames == "folded":
            return self.reconstruct(video)
        return torch.stack([self.reconstruct(one) for one in video.split(1, 1)[: None if self.clips else 1]])


TOKENS: dict[str, Callable[[], TokenHost]] = {  # recognised and refused
    "slotformer_steve": lambda: TokenHost("slot_attention", "trans_decoder.blocks.1.encoder_decoder_attn"),
    "steve": lambda: TokenHost("steve_encoder.savi", "steve_decoder.tf.blocks.1.encoder_decoder_attn"),
    "slate": lambda: TokenHost("slot_attn", "tf_dec.blocks.1.encoder_decoder_attn"),
}
HOSTS: dict[str, dict[str, Callable[[], nn.Module]]] = {
    "sold": {"sold": SoldHost, "sold_fine": lambda: SoldHost((4, 8))},
    "slotformer": {
        "slotformer": SlotFormerHost,
        "slotformer_fixed": lambda: SlotFormerHost(stochastic=False),
        "slotformer_fine": lambda: SlotFormerHost(size=FRAME),
    },
    "genera1z-savi": {
        "genera1z": Genera1zHost,
        "genera1z_fine": lambda: Genera1zHost(size=(4, 8)),
    },
    "junkeun-yi-savi": {
        "junkeun_yi": JunkeunYiHost,
        "junkeun_yi_fine": lambda: JunkeunYiHost(size=(4, 8)),
        "junkeun_yi_predicted": lambda: JunkeunYiHost(predicted=True),
        "junkeun_yi_heads": lambda: JunkeunYiHost(heads=2, iterations=2),
        "junkeun_yi_heads_coarse": lambda: JunkeunYiHost(heads=2, size=(1, 2)),
    },
    "slot-attention": {
        "package_images": PackageHost,
        "package_folded": lambda: PackageHost(frames="folded"),
        "package_unfolded": lambda: PackageHost(frames="folded", unfold=True),
        "package_heads": lambda: PackageHost(PackageAttention(heads=2)),
        "package_adaptive": lambda: PackageHost(PackageWrapper([[1.0, 0, 1, 1], [1.0, 1, 0, 1]])),
        "package_adaptive_heads": lambda: PackageHost(PackageWrapper([[1.0, 0, 1, 1], [1.0, 1, 0, 1]], heads=2)),
        "package_none_left": lambda: PackageHost(PackageWrapper([[1.0, 0, 1, 1], [0.0, 0, 0, 0]])),
    },
}
