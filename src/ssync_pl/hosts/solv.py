"""SOLV, a video host that merges slots and looks at a window of frames (Aydemir et al. 2023)."""

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from ssync_pl.errors import ShapeError, choose, require
from ssync_pl.hosts.evaluation import Evaluated, frame_validity, mean_over_frames
from ssync_pl.hosts.linking import Linking, link_slots, relabel_slots
from ssync_pl.hosts.nn.backbones import Weights
from ssync_pl.hosts.nn.binders import RelativeSlotAttention, SlotPose, TemporalBinder, attention_pose, frame_windows
from ssync_pl.hosts.nn.decoders import RelativeMixtureDecoder
from ssync_pl.hosts.nn.feature_encoder import FeatureEncoder
from ssync_pl.hosts.nn.slot_merger import MergedSlots, SlotMerger
from ssync_pl.hosts.training import Decay, SlotHost, inputs_of

# Frames of an evaluation batch that are encoded, or decoded, at a time: videos are long, and decoders are wide.
_FRAMES_AT_A_TIME = 64


class SOLVOutput(NamedTuple):
    """What `SOLV.forward` returns, of P predicted frames: the centre of a training clip, or all frames.

    Args:
        slots: `(B, P, S, D)`, merged.
        members: bool `(B, P, S, S)`; `[..., i, j]` where slot j went into slot i.
        attention_logits: `(B, T, S, N')`, slot attention of all frames before merging and before the softmax.
        token_indices: int64 `(B, T, N')`, places of the tokens that were kept.
        reconstruction: `(B, P, N, C)`.
        mask_logits: `(B, P, S, N)`, before the softmax over slots with members.
        targets: `(B, P, N, C)`, the frozen features.
    """

    slots: Tensor
    members: Tensor
    attention_logits: Tensor
    token_indices: Tensor
    reconstruction: Tensor
    mask_logits: Tensor
    targets: Tensor

    @property
    def slot_valid(self) -> Tensor:
        """Bool `(B, P, S)`: slots with members."""
        return self.members.any(dim=-1)

    @property
    def masks(self) -> Tensor:
        """Object masks `(B, P, S, N)`: probabilities over slots, 0 for slots without members."""
        return self.mask_logits.masked_fill(~self.slot_valid.unsqueeze(-1), float("-inf")).softmax(dim=2)


class SOLV(SlotHost):
    """Self-supervised Object-centric Learning for Videos (Aydemir et al. 2023) on frozen features.

    Slots bind to a random part of each frame's patches, in coordinates of their own; slots of the same index inform
    each other over the frames of a clip; those of the centre frame that are alike are merged, and predict that frame's
    features. Evaluation takes every frame of a video as the centre once, and links the slots over time. Set
    `clip_length` of the data module to the same number.

    The defaults are the published configuration but for the backbone: `vit_base_patch14_dinov2.lvd142m` with
    `grid: [24, 36]` on frames of 336x504. Give the Trainer `gradient_clip_val: 1.0`. With cached features (`features`
    in the data module) set `backbone: null`, `feature_dim` and `grid`. Unlike in the public code, tokens are dropped
    behind the backbone, so that features can be cached.

    Args:
        num_slots: number S of slots before merging.
        slot_dim: size D of a slot.
        backbone: `efficientnet_lite0`, `dinov2_small` or a model of timm; None where batches hold `features`.
        layer: layer of the features, as in `load_backbone`; None takes the backbone's default.
        backbone_weights: `pretrained`, or `none` for random ones.
        backbone_checkpoint: file of weights instead.
        feature_dim: without a backbone, channels of the cached features.
        grid: rows and columns of the patches.
        clip_length: frames of a window, odd.
        iterations: slot-attention updates.
        corrector_init: `"kmeans"` starts as soft k-means, from which small models learn objects sooner.
        corrector_sharpness: spread of the initial query and key weights in units of `1 / sqrt(inputs)`; None is
            PyTorch's 0.58, or 1.5 with `"kmeans"`. Larger lets slots differ from the start.
        token_drop: share of the patches that slots do not see in training, in [0, 1).
        edge_probability: share of training clips whose neighbours on one side are hidden, as at the ends of videos.
        temporal_blocks: transformer blocks over the frames of a window.
        temporal_heads: heads of each block.
        merge_threshold: cosine distance below which slots are merged; None never merges.
        merge_min_slots: a frame that would keep fewer slots than this keeps them all.
        merge_rise: the share of clips that are merged rises to 1 as `log(1 + (rise - 1) * progress) / log(rise)`; 1
            merges from the start. Published: the number of passes, 180.
        linking: how evaluation links slots over time, see `link_slots`. Published: `"previous"` when slots are merged,
            else `"index"`.
        link_by: what is compared: `"slots"` (published), or the mean of the frozen `"features"` under each mask.
        decoder_hidden: output channels of the decoder's hidden layers.
        init: of the decoder; `"fan_in"` keeps the signal's variance, with which small models learn objects sooner.
        dropout: in slot attention's MLP and the temporal transformer.
        learning_rate: peak rate of Adam.
        warmup_steps: linear warm-up in optimizer steps.
        decay: `"cosine"` to 0, `"exponential"` (`0.5 ** (halvings * progress)`) or `"constant"`.
        halvings: how often `"exponential"` halves the rate over the training.
        has_background: channel 0 of `segmentations` is the background; the data module's own answer comes first.
        memory_efficient: the decoder computes activations again in the backward pass: same result, less memory.
        slot_init: first slots. `"learned"`: one vector and place per slot; `"features"`: groups of alike patches in the
            clip's first frame, in evaluation the video's.

    Raises:
        ConfigError: a size or option is out of range, options contradict each other, or the backbone cannot be built.

    Examples:
        >>> model = SOLV(4, slot_dim=16, backbone=None, feature_dim=24, grid=(3, 5), clip_length=3, temporal_heads=2,
        ...              decoder_hidden=(32,))
        >>> model(torch.randn(2, 3, 15, 24)).mask_logits.shape
        torch.Size([2, 1, 4, 15])
        >>> model.eval()(torch.randn(2, 7, 15, 24)).mask_logits.shape
        torch.Size([2, 7, 4, 15])

    Source: arXiv 2310.06907.
    """

    def __init__(
        self,
        num_slots: int = 8,
        slot_dim: int = 128,
        backbone: str | None = "efficientnet_lite0",
        layer: str | None = None,
        backbone_weights: Weights = "pretrained",
        backbone_checkpoint: str | None = None,
        feature_dim: int | None = None,
        grid: tuple[int, int] = (14, 14),
        clip_length: int = 5,
        iterations: int = 3,
        corrector_init: Literal["default", "kmeans"] = "default",
        corrector_sharpness: float | None = None,
        token_drop: float = 0.5,
        edge_probability: float = 0.1,
        temporal_blocks: int = 3,
        temporal_heads: int = 8,
        merge_threshold: float | None = 0.12,
        merge_min_slots: int = 3,
        merge_rise: float = 180.0,
        linking: Linking = "memory",
        link_by: Literal["slots", "features"] = "slots",
        decoder_hidden: tuple[int, ...] = (1024, 1024, 1024, 1024),
        init: Literal["default", "fan_in"] = "default",
        dropout: float = 0.1,
        learning_rate: float = 4e-4,
        warmup_steps: int = 2500,
        decay: Decay = "exponential",
        halvings: float = 3.0,
        has_background: bool = True,
        memory_efficient: bool = True,
        slot_init: Literal["learned", "features"] = "learned",
    ) -> None:
        super().__init__(has_background)
        require(0.0 <= edge_probability <= 1.0, "argument `edge_probability` to be in [0, 1]", edge_probability)
        require(merge_rise >= 1.0, "argument `merge_rise` to be at least 1", merge_rise)
        require(0.0 <= token_drop < 1.0, "argument `token_drop` to be in [0, 1)", token_drop)
        choose("linking", linking, "memory", "previous", "index")
        choose("link_by", link_by, "slots", "features")
        self.save_hyperparameters()
        self.grid = (int(grid[0]), int(grid[1]))
        self.clip_length = clip_length
        self.token_drop = token_drop
        self.edge_probability = edge_probability
        self.merge_rise = merge_rise
        self.linking: Linking = linking
        self.link_by = link_by
        self.encoder = FeatureEncoder(
            backbone=backbone,
            layer=layer,
            weights=backbone_weights,
            checkpoint=backbone_checkpoint,
            feature_dim=feature_dim,
            grid=grid,
            slot_dim=slot_dim,
            hidden=0,
        )
        channels = self.encoder.output_dim
        self.spatial_binder = RelativeSlotAttention(
            grid, num_slots, slot_dim, channels, iterations, dropout, corrector_init, corrector_sharpness, slot_init
        )
        self.temporal_binder = TemporalBinder(slot_dim, clip_length, temporal_blocks, temporal_heads, dropout)
        self.merger = SlotMerger(merge_threshold, merge_min_slots)
        self.decoder = RelativeMixtureDecoder(
            math.prod(self.grid), slot_dim, channels, decoder_hidden, init, memory_efficient
        )
        self._total_steps = math.inf

    def forward(self, inputs: Tensor, valid: Tensor | None = None, merge: Tensor | None = None) -> SOLVOutput:
        """Decompose clips into slots: the centre frame in training mode, every frame in evaluation mode."""
        if inputs.ndim not in (4, 5) or (self.training and inputs.shape[1] != self.clip_length):
            raise ShapeError(
                "Expected argument `inputs` to be frames (B, T, 3, H, W) or cached features (B, T, N, C), in training "
                f"with T = `clip_length` = {self.clip_length}, but got {tuple(inputs.shape)}."
            )
        if valid is None:
            valid = torch.ones(inputs.shape[:2], dtype=torch.bool, device=inputs.device)
        features, slots, logits, attention, indices = self._bind(inputs)
        radius = self.clip_length // 2
        if self.training:
            windows, present = slots.unsqueeze(1), valid.unsqueeze(1)
            attention, places, targets = (x[:, radius : radius + 1] for x in (attention, indices, features))
        else:
            windows, present = frame_windows(slots, radius), frame_windows(valid, radius)
            places, targets = indices, features
        merged: MergedSlots = self.merger(self.temporal_binder(windows, present), merge)
        reconstruction, mask_logits = self._decode(merged, attention, places)
        return SOLVOutput(merged.slots, merged.members, logits, indices, reconstruction, mask_logits, targets)

    def _bind(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """Features, and slots, logits, attention and places of each frame by itself."""
        parts: list[tuple[Tensor, ...]] = []
        for piece in inputs.split(self._frames_at_a_time(inputs), dim=1):
            features = self.encoder(piece.flatten(0, 1))["backbone_features"].unflatten(0, piece.shape[:2])
            tokens, indices = self._drop_tokens(features)
            first = parts[0][0] if parts else features
            parts.append((features, *self.spatial_binder(tokens, indices, first[:, 0]), indices))
        return parts[0] if len(parts) == 1 else tuple(torch.cat(part, dim=1) for part in zip(*parts, strict=True))

    def _drop_tokens(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """In training, a random part of each frame's tokens `(B, T, N', C)` and their places, ascending."""
        videos, frames, patches, channels = features.shape
        if not self.training or self.token_drop == 0.0:
            return features, torch.arange(patches, device=features.device).expand(videos, frames, patches)
        keep = max(1, int(patches * (1.0 - self.token_drop)))
        order = torch.rand(videos, frames, patches, device=features.device)
        indices = order.topk(keep, dim=-1).indices.sort(dim=-1).values
        return features.gather(2, indices.unsqueeze(-1).expand(-1, -1, -1, channels)), indices

    def _decode(self, merged: MergedSlots, attention: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Features and mask logits of the predicted frames."""
        points = self.spatial_binder.points
        pose = attention_pose(merged.merge_attention(attention), torch.nn.functional.embedding(places, points))
        size = self._frames_at_a_time(merged.slots)
        pieces = (x.split(size, dim=1) for x in (merged.slots, merged.members.any(dim=-1), *pose))
        parts = [
            self.decoder(slots, SlotPose(*pose_of).relative(points), valid)
            for slots, valid, *pose_of in zip(*pieces, strict=True)
        ]
        reconstruction, mask_logits = zip(*parts, strict=True)
        return torch.cat(reconstruction, dim=1), torch.cat(mask_logits, dim=1)

    def _frames_at_a_time(self, clips: Tensor) -> int:
        return clips.shape[1] if self.training else max(1, _FRAMES_AT_A_TIME // clips.shape[0])

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Mean squared error of the features of each clip's centre frame; clips have `clip_length` frames."""
        inputs, valid = inputs_of(batch), frame_validity(batch)
        shown = valid & ~self._hidden_neighbours(valid)
        merge = torch.rand(len(valid), 1, device=valid.device) < self._merge_probability()
        out: SOLVOutput = self(inputs, shown, merge)
        loss = _error(out, valid[:, self.clip_length // 2].unsqueeze(1))
        self.log("train/loss", loss, prog_bar=True, batch_size=len(valid))
        self.log("train/slots", out.slot_valid.sum(-1).float().mean(), batch_size=len(valid))
        return loss

    def evaluate(self, batch: Mapping[str, Any]) -> Evaluated:
        """Decompose every frame of a batch that holds `features` or `video`, with slots linked over time."""
        valid = frame_validity(batch)
        out: SOLVOutput = self(inputs_of(batch), valid)
        looks = out.slots
        if self.link_by == "features":
            apart = out.targets.float() - out.targets.float().mean(dim=(1, 2), keepdim=True)
            looks = out.masks @ apart  # the cosine needs no division by the area
        linked = relabel_slots(out.masks, link_slots(looks, out.slot_valid, self.linking))
        return Evaluated(linked.unflatten(-1, self.grid), _error(out, valid))  # not the slots of slot attention

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build Adam with warm-up and decay over the Trainer's steps."""
        steps = self.trainer.estimated_stepping_batches
        self._total_steps = steps if steps > 0 else math.inf  # Lightning gives -1 for a length that nobody knows
        return super().configure_optimizers()

    def _merge_probability(self) -> float:
        if self.merge_rise == 1.0 or math.isinf(self._total_steps):
            return 1.0
        progress = min(1.0, self.global_step / self._total_steps)
        return math.log(1.0 + (self.merge_rise - 1.0) * progress) / math.log(self.merge_rise)

    def _hidden_neighbours(self, valid: Tensor) -> Tensor:
        """Bool `(B, T)`: in some clips, the frames before or after the centre from a random place on."""
        radius = self.clip_length // 2
        draws = torch.rand(len(valid), 3, device=valid.device)
        chosen, backwards = draws[:, :1] < self.edge_probability, draws[:, 1:2] < 0.5
        shown = (draws[:, 2:] * radius).floor()  # 0 … radius - 1 neighbours are left
        offset = torch.arange(valid.shape[1], device=valid.device) - radius
        return chosen & (torch.where(backwards, -offset, offset) > shown)


def _error(out: SOLVOutput, valid: Tensor) -> Tensor:
    error = (out.reconstruction.float() - out.targets.float()).square().mean(dim=(2, 3))
    return mean_over_frames(error, valid)
