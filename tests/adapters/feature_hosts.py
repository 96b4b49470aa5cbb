"""Stand-ins for code on features of a frozen backbone: VideoSAUR and its forks, OCLF, AdaSlot, Genera1Z."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from stand_in_parts import DIM, FRAME, GRID, B, Decoder, Kept, N, S, SlotAttention, StandIn, T, eyes, parts
from torch import Tensor, nn
from torch.nn import functional as F


class Corrector(SlotAttention):
    def __init__(self, over_patches: bool = False) -> None:
        super().__init__()
        self.over_patches = over_patches

    def forward(self, features: Tensor, slots: Tensor, smask: Tensor | None = None) -> dict[str, Tensor]:
        slots, masks = self.attend(features, slots)
        output = {"slots": slots, "masks": masks}
        if self.over_patches:
            output["spread"] = self.own_logits[-1].softmax(-1)
        return output


class VideosaurDecoder(Decoder):
    name = "mlp"

    def __init__(self, *size: int) -> None:
        if len(size) == 2:
            self.name, self.beside = "output_transform", ("backbone",)
        super().__init__(size or (N,))

    def forward(self, slots: Tensor) -> dict[str, Tensor]:
        return {"masks": self.paint(slots)[1]}


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
        return {"masks": logits.softmax(-1).transpose(1, 2)}


class VideosaurHost(StandIn):
    """A model of videos, or of images; its ``slots`` may be the first of more to come."""

    def __init__(self, decoder: nn.Module | None = None, slots: int = S, video: bool = True, **corrector: Any) -> None:
        inside = ".module" if video else ""
        decoder = VideosaurDecoder() if decoder is None else decoder
        found = {f"processor{inside}.corrector": Corrector(**corrector), f"decoder{inside}": decoder}
        super().__init__({"encoder": eyes(), **found})
        self.seeds, self.slots, self.video = nn.Parameter(4 * torch.randn(S, DIM)), slots, video

    def draw(self, slots: Tensor) -> Tensor:
        return super().draw(slots) - 0.3

    def forward(self, video: Tensor) -> Tensor:
        video = video if self.video else video[:, :1]
        return self.draw(self.states(video, self.first_slots(video)[:, : self.slots]))


class OclfAttention(SlotAttention):
    def __init__(self, heads: int = 1) -> None:
        super().__init__(heads=heads)
        self.n_heads, self.dims_per_head = heads, DIM // heads

    def split(self, value: Tensor) -> Tensor:
        return value.unflatten(-1, (self.n_heads, self.dims_per_head))

    def product(self, query: Tensor, keys: Tensor) -> Tensor:
        return torch.einsum("bihd,bjhd->bihj", query, keys) * self.scale

    def softmax(self, logits: Tensor) -> Tensor:
        return logits.flatten(1, 2).softmax(1).view_as(logits)

    def mix(self, weights: Tensor, values: Tensor) -> Tensor:
        return torch.einsum("bjhd,bihj->bihd", values, weights)

    def forward(self, inputs: Tensor, slots: Tensor, masked: Tensor | None = None) -> tuple[Tensor, ...]:
        slots, probs = self.attend(inputs, slots, None if masked is None else ~masked)
        return slots, probs.mean(2)

    def whole(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        return (logits.squeeze(3) if self.n_heads == 1 else logits.float().logsumexp(3)), None


class DroppingAttention(OclfAttention):
    """AdaSlot's: keeps the slots that its network chooses, or those that a test says, straight through."""

    def __init__(self, heads: int, kept: Tensor | None) -> None:
        super().__init__(heads)
        self.single_gumbel_score_network, self.kept = nn.Linear(DIM, 2), kept

    def forward(self, inputs: Tensor, slots: Tensor, masked: Tensor | None = None) -> tuple[Tensor, ...]:
        slots, attention = super().forward(inputs, slots, masked)
        scores = self.single_gumbel_score_network(slots)
        soft, decision = scores.softmax(-1)[..., 1], F.gumbel_softmax(scores, hard=True)[..., 1]
        self.decided = (decision if self.kept is None else self.kept).bool()
        return slots, attention, soft, decision if self.kept is None else self.kept - soft.detach() + soft


class OclfDecoder(Decoder):
    def __init__(self, *size: int, colours: int = 3, amodal: bool = False) -> None:
        super().__init__(size or (N,), colours)
        setattr(self, "initial_conv_size" if self.pixels else "num_patches", size)
        self.amodal = amodal

    def forward(self, slots: Tensor) -> Any:
        picture, masks = self.paint(slots)
        seen = {"masks": self.own_logits[-1].sigmoid(), "masks_vis": masks} if self.amodal else {"masks": masks}
        return SimpleNamespace(reconstruction=picture, **seen)


class DroppingDecoder(Decoder):
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


class OclfHost(StandIn):
    eyes = "models.feature_extractor"

    def __init__(self, decoder=None, attention=None, video=False, at="object_decoder", existing=None):
        grouping = f"models.perceptual_grouping{'.module' * video}.slot_attention"
        attention, decoder = OclfAttention() if attention is None else attention, decoder or OclfDecoder()
        super().__init__({self.eyes: eyes(), grouping: attention, f"models.{at}": decoder})
        self.video, self.once_per_frame, self.existing = video, at.endswith(".module"), existing

    def batch(self) -> dict[str, Tensor]:
        return {"image": torch.rand(B, T, 3, *FRAME) if self.video else torch.rand(B, 3, *FRAME)}

    def attend(self, frame: Tensor, slots: Tensor, t: int) -> Tensor:
        return parts(self)[0](frame, slots, None if self.existing is None else ~self.existing)[0]

    def draw(self, slots: Tensor) -> Tensor:
        return torch.cat([super(OclfHost, self).draw(one) for one in slots.split(1 if self.once_per_frame else T, 1)])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch["image"] if self.video else batch["image"][:, None]).square().mean()


class AdaSlotHost(OclfHost):
    """An image model that hands the decision to its decoder; ``masked`` are slots that it is told to leave out."""

    def __init__(self, mask_type="mask_normalized", heads=1, kept=None, size=(N,)):
        kept, self.masked = None if kept is None else torch.tensor(kept), None
        super().__init__(DroppingDecoder(mask_type, size), DroppingAttention(heads, kept))

    def forward(self, video: Tensor) -> Tensor:
        attention, decoder = parts(self)
        slots, _, _, decision = attention(self.features(video)[:, 0], self.first_slots(video), self.masked)
        self.existing = None if decoder.mask_type == "none" else attention.decided
        return decoder(slots, decision).reconstruction + 0.1 * decision.mean()


class Aggregat(SlotAttention):
    names = ("proj_q", "proj_k", "proj_v")

    def product(self, query: Tensor, keys: Tensor) -> Tensor:
        return torch.einsum("bsd,bnd->bsn", query * DIM**-0.5, keys)


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
    """Attention over slots with several heads, whose mean is the masks.

    Its ``backbone`` serves a random order; or, with a part more, predicts patches one after the other, or noise.
    """

    side, probs = "masks", True

    def __init__(self, backbone: bool = False, beside: str = "") -> None:
        super().__init__()
        self.posit_embed, self.attent = nn.Identity(), nn.MultiheadAttention(DIM, 2, batch_first=True)
        self.places = nn.Parameter(3 * torch.randn(N, DIM))
        if backbone or beside:
            self.backbone = nn.TransformerDecoder(nn.TransformerDecoderLayer(DIM, 2, 8, batch_first=True), 1)
        if beside:
            self.add_module(beside, nn.Identity())

    def forward(self, clue: Any, slots: Tensor) -> tuple[Tensor, Tensor]:
        mixed, masks = self.attent(self.places.expand(len(slots), -1, -1), slots, slots)
        self.own_logits.append(masks.transpose(1, 2))
        return mixed, self.own_logits[-1]


class OtherFramesDecode(MixerDecode):
    """Draws other frames in the place of some, and says which; a token of time shares the attention with the slots."""

    def __init__(self) -> None:
        super().__init__(backbone=True)
        self.te = nn.Embedding(2, DIM)

    def forward(self, clue: Any, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        time = self.te(torch.arange(T) - FRAMES).flatten(0, 1)[:, None]
        memory = torch.cat([time, slots.gather(1, FRAMES[..., None, None].expand_as(slots)).flatten(0, 1)], 1)
        mixed, masks = self.attent(self.places.expand(len(memory), -1, -1), memory, memory)
        masks = masks[..., 1:].mT.unflatten(0, (B, T))
        self.own_logits.append(masks / masks.sum(2, keepdim=True))
        return mixed, masks, FRAMES


class RandSFQHost(StandIn):
    eyes = "encode_backbone"

    def __init__(self, decode: nn.Module | None = None, video: bool = True, existing: Tensor | None = None) -> None:
        decode, self.predictor = BroadcastDecode() if decode is None else decode, "transit" * video
        transit = {self.predictor: nn.Linear(DIM, DIM)} if video else {}
        super().__init__({self.eyes: eyes(), "aggregat": Aggregat(), "decode": decode, **transit})
        self.existing = existing

    def attend(self, frame: Tensor, slots: Tensor, t: int) -> Tensor:
        return self.aggregat(frame, slots, **({} if self.existing is None else {"smask": self.existing}))[0]

    def draw(self, slots: Tensor) -> Tensor:
        smask = {} if self.existing is None else {"smask": self.existing.repeat_interleave(slots.shape[1], 0)}
        return self.decode(None, slots.flatten(0, 1), **smask)[0]

    def forward(self, video: Tensor) -> Tensor:
        return super().forward(video if self.predictor else video[:, :1])


class OtherFramesHost(RandSFQHost):
    def __init__(self) -> None:
        super().__init__(OtherFramesDecode())
        self.shown = FRAMES

    def draw(self, slots: Tensor) -> Tensor:
        return self.decode(None, slots)[0]


class ReversedHost(RandSFQHost):
    """Goes back through the clip from its last slots and draws these, too; keeps the logits of the way forward."""

    def __init__(self, decode: nn.Module) -> None:
        super().__init__(decode)
        self.transit_inv = nn.Linear(DIM, DIM)

    def forward(self, video: Tensor) -> Tensor:
        slots = self.states(video)
        back = [slots[:, -1].detach()]
        for frame in self.features(video)[:, :-1].flip(1).unbind(1):
            back.append(self.attend(frame, self.transit_inv(back[-1]), 0))
        drawn = torch.cat([self.draw(slots), self.draw(torch.stack(back[:0:-1], 1))])
        del self.aggregat.own_logits[T:], self.decode.own_logits[1:]
        return drawn


def first(*counts: int) -> Tensor:
    return torch.arange(S) < torch.tensor(counts)[:, None]


KEPT, NONE_LEFT = [[1.0, 0, 1, 1], [0, 1, 1, 0]], [[1.0, 0, 1, 1], [0.0, 0, 0, 0]]
FRAMES = torch.tensor([[0, 0, 2], [0, 1, 1]])
VALID = torch.tensor([[True, True, False, True], [True, False, True, True]])
HOSTS: dict[str, dict[str, Callable[[], nn.Module]]] = {
    "videosaur": {
        "videosaur_mlp": VideosaurHost,
        "videosaur_mixer": lambda: VideosaurHost(MixerDecoder()),
        "videosaur_broadcast": lambda: VideosaurHost(VideosaurDecoder(*GRID)),
        "videosaur_pixels": lambda: VideosaurHost(VideosaurDecoder(*FRAME)),
        "videosaur_images": lambda: VideosaurHost(video=False),
        "videosaur_two_softmaxes": lambda: VideosaurHost(over_patches=True),
        "videosaur_growing": lambda: VideosaurHost(slots=2),
    },
    "oclf": {
        "oclf_dinosaur": OclfHost,
        "oclf_heads": lambda: OclfHost(attention=OclfAttention(heads=4)),
        "oclf_slot_attention": lambda: OclfHost(OclfDecoder(*GRID)),
        "oclf_flow": lambda: OclfHost(OclfDecoder(*GRID, colours=2)),
        "oclf_amodal": lambda: OclfHost(OclfDecoder(*FRAME, amodal=True)),
        "oclf_more_patches": lambda: OclfHost(OclfDecoder(4 * N)),
        "oclf_savi": lambda: OclfHost(OclfDecoder(*GRID), video=True),
        "oclf_savi_code": lambda: OclfHost(OclfDecoder(*GRID), video=True, at="decoder.module"),
        "oclf_masked": lambda: OclfHost(existing=first(2, 3)),
        "oclf_masked_heads": lambda: OclfHost(OclfDecoder(*FRAME), OclfAttention(2), existing=first(2, S)),
        "oclf_masked_video": lambda: OclfHost(OclfDecoder(*FRAME), video=True, existing=first(3, 2)),
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
        "smoothsa": lambda: RandSFQHost(MixerDecode(backbone=True)),
        "dias": lambda: RandSFQHost(MixerDecode(backbone=True), video=False),
        "icc": lambda: ReversedHost(MixerDecode(backbone=True)),
        "icc_broadcast": lambda: ReversedHost(BroadcastDecode()),
        "xssc": OtherFramesHost,
        "randsfq_masked": lambda: RandSFQHost(existing=VALID),
    },
}
