"""Stand-ins for code on features of a frozen backbone: VideoSAUR and its forks, OCLF, AdaSlot, RandSF.Q."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as L
import torch
from stand_in_parts import (
    DIM,
    FRAME,
    GRID,
    PATCH,
    B,
    Decoder,
    Kept,
    N,
    S,
    SlotAttention,
    StandIn,
    T,
    parts,
    patches,
    scan,
)
from torch import Tensor, nn
from torch.nn import functional as F


class Corrector(SlotAttention):
    """Of the VideoSAUR family; forks return their logits, or have a second softmax over patches."""

    def __init__(self, dots: bool = False, over_patches: bool = False) -> None:
        super().__init__()
        self.dots, self.over_patches = dots, over_patches

    def forward(self, slots: Tensor, features: Tensor, n_iters: int | None = None) -> dict[str, Tensor]:
        slots, masks = self.attend(features, slots, n_iters)
        output = {"slots": slots, "masks": masks}
        if self.over_patches:
            output["spread"] = self.own_logits[-1].softmax(-1)
        return {**output, "dots": self.own_logits[-1]} if self.dots else output


class Images(nn.Module):
    """Patches ``(..., N, D)`` of images or videos."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, DIM, PATCH, PATCH)

    def forward(self, images: Tensor) -> Tensor:
        return self.patch_embed(images.flatten(0, -4)).flatten(2).mT.unflatten(0, images.shape[:-3])


class VideosaurDecoder(Decoder):
    """An MLP at places, or a spatial broadcast; ``folds`` the frames itself, where others are wrapped."""

    name = "mlp"

    def __init__(self, *size: int, folds: bool = False) -> None:
        if len(size) == 2:
            self.name, self.beside = "output_transform", ("backbone",)
        super().__init__(size or (N,))
        self.folds = folds

    def forward(self, slots: Tensor) -> dict[str, Tensor]:
        return {"masks": self.paint(slots.flatten(0, 1) if self.folds else slots)[1]}


class MixerDecoder(Kept):
    side = "masks"

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k = nn.Linear(DIM, DIM, bias=False), nn.Linear(DIM, DIM, bias=False)
        self.scale, self.places = 0.7, nn.Parameter(3 * torch.randn(1, N, DIM))

    def forward(self, slots: Tensor) -> dict[str, Tensor]:
        query = self.to_q(self.places.expand(len(slots), -1, -1))
        logits = torch.einsum("bnd,bsd->bns", query, self.to_k(slots)) * self.scale
        self.own_logits.append(logits.transpose(1, 2))
        return {"masks": (self.sharpen * logits).softmax(-1).transpose(1, 2)}


class OverTime(nn.Module):
    """Runs a module on frames folded into the batch, unless the module folds them."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, slots: Tensor) -> dict[str, Tensor]:
        output = self.module(slots if getattr(self.module, "folds", False) else slots.flatten(0, 1))
        return {key: value.unflatten(0, slots.shape[:2]) for key, value in output.items()}


class Scan(nn.Module):
    def __init__(self, corrector: nn.Module) -> None:
        super().__init__()
        self.module = nn.ModuleDict({"corrector": corrector})

    def forward(self, slots: Tensor, features: Tensor, and_back: bool = False) -> Tensor:
        states = []
        for t, frame in enumerate(features.unbind(1)):
            states.append(self.module.corrector(slots, frame, **({"n_iters": 3} if t == 0 else {}))["slots"])
            slots = states[-1]
        for t in reversed(range(features.shape[1] - 1)) if and_back else ():
            states[t] = slots = self.module.corrector(slots, features[:, t])["slots"]
        return torch.stack(states, 1)


class VideosaurHost(StandIn, L.LightningModule):
    """A video model; its slots may grow at optimizer steps, and its validation then scans forth and back."""

    def __init__(
        self,
        decoder: nn.Module | None = None,
        slots: tuple[int, ...] = (S,),
        growth: tuple[int, ...] = (),
        **corrector: Any,
    ) -> None:
        super().__init__()
        self.counts, self.growth = slots, growth
        self.seeds = nn.Parameter(4 * torch.randn(slots[-1], DIM))
        self.encoder, self.processor = Images(), Scan(Corrector(**corrector))
        self.decoder = OverTime(VideosaurDecoder() if decoder is None else decoder)
        self.corrector_calls: list[int] = []

    @property
    def num_slots(self) -> int:
        step = 0 if self._trainer is None else self.trainer.global_step
        return self.counts[sum(step >= at for at in self.growth)] if self.training else self.counts[-1]

    def forward(self, video: Tensor) -> dict[str, Tensor]:
        kept = self.processor.module.corrector.own_logits
        before, slots = len(kept), self.seeds[: self.num_slots].expand(len(video), -1, -1)
        states = self.processor(slots, self.encoder(3 * video), and_back=bool(self.growth) and not self.training)
        self.corrector_calls.append(len(kept) - before)
        return self.decoder(states)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self(batch["video"])["masks"] - 0.3).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch["video"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class VideosaurImages(VideosaurHost):
    """An image model has no wrappers over time."""

    def __init__(self) -> None:
        super().__init__()
        self.processor, self.decoder = nn.ModuleDict({"corrector": Corrector()}), VideosaurDecoder()

    def forward(self, video: Tensor) -> dict[str, Tensor]:
        return self.decoder(self.processor.corrector(self.first_slots(video), self.encoder(video[:, 0]))["slots"])


class OclfAttention(SlotAttention):
    """One softmax over slots and heads."""

    def __init__(self, heads: int = 1, iterations: int = 2) -> None:
        super().__init__(iterations)
        self.n_heads, self.dims_per_head = heads, DIM // heads
        self.scale = self.dims_per_head**-0.5

    def attend(self, inputs: Tensor, slots: Tensor, masked: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        heads = (self.n_heads, self.dims_per_head)
        keys, values = (one(inputs).view(*inputs.shape[:2], *heads) for one in (self.to_k, self.to_v))
        for _ in range(self.iterations):
            query = self.to_q(slots).view(*slots.shape[:2], *heads)
            logits = torch.einsum("bihd,bjhd->bihj", query, keys) * self.scale
            if masked is not None:
                logits = logits.masked_fill(masked[:, :, None, None], float("-inf"))
            weights = (self.sharpen * logits).flatten(1, 2).softmax(1).view_as(logits)
            shares = (weights + 1e-8) / (weights + 1e-8).sum(-1, keepdim=True)
            slots = slots + torch.einsum("bjhd,bihj->bihd", values, shares).flatten(2)
        self.own_logits.append(logits)
        return slots, weights.mean(2)

    def forward(self, inputs: Tensor, slots: Tensor, masked: Tensor | None = None) -> tuple[Tensor, ...]:
        return self.attend(inputs, slots, masked)

    def whole(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        return (logits.squeeze(3) if self.n_heads == 1 else logits.float().logsumexp(3)), None


class DroppingAttention(OclfAttention):
    """AdaSlot's: keeps the slots that its network chooses, or those that a test says, straight through."""

    def __init__(self, heads: int, kept: Tensor | None) -> None:
        super().__init__(heads)
        self.single_gumbel_score_network, self.kept = nn.Linear(DIM, 2), kept

    def forward(self, inputs: Tensor, slots: Tensor, masked: Tensor | None = None) -> tuple[Tensor, ...]:
        slots, attention = self.attend(inputs, slots, masked)
        scores = self.single_gumbel_score_network(slots)
        soft, decision = scores.softmax(-1)[..., 1], F.gumbel_softmax(scores, hard=True)[..., 1]
        self.decided = (decision if self.kept is None else self.kept).bool()
        return slots, attention, soft, decision if self.kept is None else self.kept - soft.detach() + soft


class OclfDecoder(Decoder):
    """On patches, or with two sizes on pixels."""

    def __init__(self, *size: int, colours: int = 3, amodal: bool = False) -> None:
        super().__init__(size or (N,), colours)
        setattr(self, "initial_conv_size" if self.pixels else "num_patches", size)
        self.amodal = amodal

    def forward(self, slots: Tensor) -> Any:
        picture, masks = self.paint(slots)
        seen = {"masks": self.own_logits[-1].sigmoid(), "masks_vis": masks} if self.amodal else {"masks": masks}
        return SimpleNamespace(reconstruction=picture, **seen)


class DroppingDecoder(Decoder):
    """Multiplies the softmax of all slots with the decision, in the ways of AdaSlot."""

    def __init__(self, mask_type: str, size: tuple[int, ...] = (N,)) -> None:
        super().__init__(size)
        self.mask_type, self.num_patches = mask_type, N

    def forward(self, slots: Tensor, decision: Tensor) -> Any:
        colours, alpha = self.draw(slots)
        decision = decision.view(*decision.shape, *[1] * (alpha.ndim - 2))
        if self.mask_type == "logit":
            masks = (alpha - 1e5 * (1 - decision)).softmax(1)
        else:
            masks = alpha.softmax(1) * (1 if self.mask_type == "none" else decision)
            masks = masks / (masks.sum(1, keepdim=True) + 1e-5) if self.mask_type == "mask_normalized" else masks
        return SimpleNamespace(reconstruction=(colours * masks.unsqueeze(2)).sum(1), masks=masks)


class Grouping(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.slot_attention, self.positional_embedding = attention, nn.Linear(DIM, DIM)

    def forward(self, features: Tensor, slots: Tensor, masked: Tensor | None = None) -> tuple[Tensor, ...]:
        return self.slot_attention(self.positional_embedding(features), slots, masked)


class Carried(nn.Module):
    """Carries the slots from frame to frame."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, features: Tensor, slots: Tensor, masked: Tensor | None = None) -> tuple[Tensor, ...]:
        return (scan(features, slots, lambda frame, slots, t: self.module(frame, slots, masked)[0]),)


class OncePerFrame(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, slots: Tensor) -> Any:
        frames = [self.module(frame).reconstruction for frame in slots.unbind(1)]
        return SimpleNamespace(reconstruction=torch.stack(frames, 1))


class OclfHost(StandIn):
    """An image or video model; ``n_slots`` slots of each video exist, where that is given."""

    def __init__(
        self,
        decoder: nn.Module | None = None,
        attention: nn.Module | None = None,
        video: bool = False,
        name: str = "object_decoder",
        n_slots: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        grouping = Grouping(OclfAttention() if attention is None else attention)
        models = {"feature_extractor": Images(), "perceptual_grouping": Carried(grouping) if video else grouping}
        self.models = nn.ModuleDict({**models, name: OclfDecoder() if decoder is None else decoder})
        self.video, self.name, self.n_slots = video, name, n_slots

    def batch(self) -> dict[str, Tensor]:
        return {"image": torch.rand(B, T, 3, *FRAME) if self.video else torch.rand(B, 3, *FRAME)}

    @property
    def valid(self) -> Tensor | None:
        return torch.arange(S) < torch.tensor(self.n_slots)[:, None] if self.n_slots else None

    def decode(self, grouped: tuple[Tensor, ...]) -> Tensor:
        return self.models[self.name](grouped[0]).reconstruction

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        features, valid = self.models["feature_extractor"](batch["image"]), self.valid
        masked = None if valid is None else ~valid
        return self.decode(self.models["perceptual_grouping"](features, self.first_slots(features), masked))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch).square().mean()


class AdaSlotHost(OclfHost):
    """An image model that hands the decision to its decoder."""

    def __init__(
        self, mask_type: str = "mask_normalized", heads: int = 1, kept: Any = None, size: tuple[int, ...] = (N,)
    ) -> None:
        kept = None if kept is None else torch.tensor(kept)
        super().__init__(DroppingDecoder(mask_type, size), DroppingAttention(heads, kept))

    @property
    def kept(self) -> Tensor | None:
        attention, decoder = parts(self)
        return None if decoder.mask_type == "none" else attention.decided

    def decode(self, grouped: tuple[Tensor, ...]) -> Tensor:
        picture = self.models[self.name](grouped[0], grouped[3]).reconstruction
        return picture + 0.1 * grouped[3].mean()


class Aggregat(SlotAttention):
    """RandSF.Q's slot attention returns its attention; logits of absent slots are minus infinity."""

    names = ("proj_q", "proj_k", "proj_v")

    def product(self, query: Tensor, keys: Tensor) -> Tensor:
        return torch.einsum("bsd,bnd->bsn", query * DIM**-0.5, keys)

    def forward(
        self, features: Tensor, query: Tensor, smask: Tensor | None = None, num_iter: int | None = None
    ) -> tuple[Tensor, Tensor]:
        return self.attend(features, query, num_iter, smask)


class BroadcastDecode(Decoder):
    name = "backbone"

    def __init__(self) -> None:
        super().__init__(colours=DIM)
        self.posit_embed = nn.Linear(DIM, DIM)

    def draw(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        colours, alpha = super().draw(slots)
        if self.smask is not None:
            alpha = self.own_logits[-1] = alpha.where(self.smask[:, :, None], -torch.inf)
        return colours, alpha

    def forward(self, clue: Any, slots: Tensor, smask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.smask = smask
        return self.paint(self.posit_embed(slots))


class MixerDecode(Kept):
    """Attention over slots with several heads, whose mean is the masks; in a random order, it has a ``backbone``."""

    side, probs, checked = "masks", True, False

    def __init__(self, random_order: bool = False) -> None:
        super().__init__()
        self.posit_embed, self.attent = nn.Identity(), nn.MultiheadAttention(DIM, 2, batch_first=True)
        self.places = nn.Parameter(3 * torch.randn(N, DIM))
        if random_order:
            self.backbone = nn.TransformerDecoder(nn.TransformerDecoderLayer(DIM, 2, 8, batch_first=True), 1)

    def forward(self, clue: Any, slots: Tensor) -> tuple[Tensor, Tensor]:
        mixed, masks = self.attent(self.places.expand(len(slots), -1, -1), slots, slots)
        self.own_logits.append(masks.transpose(1, 2))
        return mixed, self.own_logits[-1]


class RefusedDecode(nn.Module):
    """Without masks: predicts patches one after the other, or noise."""

    def __init__(self, diffusion: bool) -> None:
        super().__init__()
        self.backbone = nn.TransformerDecoder(nn.TransformerDecoderLayer(DIM, 2, 8, batch_first=True), 1)
        if diffusion:
            self.noise_sched = nn.Identity()
        else:
            self.bos = nn.Parameter(torch.zeros(1))


class RandSFQHost(StandIn):
    """A video model, or an image model without ``transit``; ``valid`` are the slots that exist."""

    def __init__(self, decode: nn.Module | None = None, video: bool = True, valid: Tensor | None = None) -> None:
        super().__init__()
        self.encode_backbone, self.aggregat = nn.Conv2d(3, DIM, PATCH, PATCH), Aggregat()
        self.decode, self.valid = BroadcastDecode() if decode is None else decode, valid
        if video:
            self.transit = nn.Linear(DIM, DIM)

    def attend(self, frame: Tensor, query: Tensor, t: int) -> Tensor:
        smask = {} if self.valid is None else {"smask": self.valid}
        return self.aggregat(frame, query, **smask, num_iter=None if t == 0 else 1)[0]

    def forward(self, video: Tensor) -> Tensor:
        frames, transit = (T, self.transit) if hasattr(self, "transit") else (1, nn.Identity())
        features = patches(self.encode_backbone, 3 * video[:, :frames])
        states = scan(features, self.first_slots(video), self.attend, transit)
        smask = {} if self.valid is None else {"smask": self.valid.repeat_interleave(frames, 0)}
        return self.decode(features, states.flatten(0, 1), **smask)[0]


KEPT, NONE_LEFT = [[1.0, 0, 1, 1], [0, 1, 1, 0]], [[1.0, 0, 1, 1], [0.0, 0, 0, 0]]
VALID = torch.tensor([[True, True, False, True], [True, False, True, True]])
HOSTS: dict[str, dict[str, Callable[[], nn.Module]]] = {
    "videosaur": {
        "videosaur_mlp": VideosaurHost,
        "videosaur_mixer": lambda: VideosaurHost(MixerDecoder()),
        "videosaur_broadcast": lambda: VideosaurHost(VideosaurDecoder(*GRID)),
        "videosaur_pixels": lambda: VideosaurHost(VideosaurDecoder(*FRAME)),
        "videosaur_images": VideosaurImages,
        "videosaur_dots": lambda: VideosaurHost(dots=True),
        "videosaur_two_softmaxes": lambda: VideosaurHost(VideosaurDecoder(folds=True), over_patches=True),
        "videosaur_growing": lambda: VideosaurHost(slots=(2, 3, 4), growth=(1, 2)),
    },
    "oclf": {
        "oclf_dinosaur": OclfHost,
        "oclf_heads": lambda: OclfHost(attention=OclfAttention(heads=4)),
        "oclf_slot_attention": lambda: OclfHost(OclfDecoder(*GRID)),
        "oclf_flow": lambda: OclfHost(OclfDecoder(*GRID, colours=2)),
        "oclf_amodal": lambda: OclfHost(OclfDecoder(*FRAME, amodal=True)),
        "oclf_more_patches": lambda: OclfHost(OclfDecoder(4 * N)),
        "oclf_savi": lambda: OclfHost(OclfDecoder(*GRID), video=True),
        "oclf_savi_code": lambda: OclfHost(OncePerFrame(OclfDecoder(*GRID)), video=True, name="decoder"),
        "oclf_masked": lambda: OclfHost(n_slots=(2, 3)),
        "oclf_masked_heads": lambda: OclfHost(OclfDecoder(*FRAME), OclfAttention(2), n_slots=(2, S)),
        "oclf_masked_video": lambda: OclfHost(OclfDecoder(*FRAME), video=True, n_slots=(3, 2)),
    },
    "adaslot": {
        "adaslot": AdaSlotHost,
        "adaslot_heads": lambda: AdaSlotHost(heads=2, kept=KEPT),
        "adaslot_pixels": lambda: AdaSlotHost(kept=KEPT, size=GRID),
        "adaslot_fine": lambda: AdaSlotHost(kept=NONE_LEFT, size=FRAME, heads=2),
        "adaslot_unnormalised": lambda: AdaSlotHost("mask", kept=KEPT),
        "adaslot_logits": lambda: AdaSlotHost("logit", kept=KEPT),
        "adaslot_none_left": lambda: AdaSlotHost(kept=NONE_LEFT, heads=2),
        "adaslot_ignored": lambda: AdaSlotHost("none", kept=KEPT),
    },
    "randsfq": {
        "randsfq": RandSFQHost,
        "randsfq_images": lambda: RandSFQHost(video=False),
        "randsfq_mixer": lambda: RandSFQHost(MixerDecode()),
        "randsfq_random_order": lambda: RandSFQHost(MixerDecode(random_order=True)),
        "randsfq_masked": lambda: RandSFQHost(valid=VALID),
    },
}
