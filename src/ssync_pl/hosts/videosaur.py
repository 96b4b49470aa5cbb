"""Hosts that reconstruct frozen features, in the public layout: VideoSAUR, SlotContrast, and DINOSAUR for images."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from ssync_pl.errors import choose, require, require_shape
from ssync_pl.hosts.evaluation import Evaluated, frame_validity, mean_over_frames
from ssync_pl.hosts.losses import slot_contrast_loss, temporal_similarity, temporal_similarity_loss
from ssync_pl.hosts.nn.backbones import Weights
from ssync_pl.hosts.nn.decoders import FourierDecoder, MLPDecoder, SlotMixerDecoder
from ssync_pl.hosts.nn.feature_encoder import FeatureEncoder
from ssync_pl.hosts.nn.initializers import build_initializer
from ssync_pl.hosts.nn.layers import PatchPosition, fourier_code, init_fan_in_, random_windows
from ssync_pl.hosts.nn.over_time import MapOverTime, ScanOverTime, SlotProcessor
from ssync_pl.hosts.nn.slot_attention import SlotCorrector, init_soft_kmeans_
from ssync_pl.hosts.nn.slot_transformer import SlotTransformer
from ssync_pl.hosts.training import SlotHost, exponential_for, inputs_of
from ssync_pl.method.labels import compute_dtype

_SHARPNESS = 1.5


class FeatureHostOutput(NamedTuple):
    """What the hosts of this family return.

    Args:
        slots: `(B, T, S, D)`, corrected by each frame.
        attention_logits: `(B, T, S, N)`, slot attention before the softmax over slots.
        attention_grid: `(h, w)` with `h * w = N`.
        reconstruction: `(B, T, N, C)`, everything the decoder gives a patch: features, then similarity logits.
        mask_logits: `(B, T, S, h, w)`, object masks before the softmax over slots.
        targets: `(B, T, N, F)`, the frozen features.
        similarity_features: `(B, T, N, K)`, frozen features for the similarity loss.
    """

    slots: Tensor
    attention_logits: Tensor
    attention_grid: tuple[int, int]
    reconstruction: Tensor
    mask_logits: Tensor
    targets: Tensor
    similarity_features: Tensor


class FeatureHost(SlotHost):
    """Slots on frozen features, handed on from frame to frame.

    Three losses, each with a weight: reconstruction of the features (mean squared error), prediction of where in a
    later frame the features of each patch are found again (VideoSAUR), and contrast between slots of neighbouring
    frames (SlotContrast). The defaults are VideoSAUR's published sizes on the packaged EfficientNet-lite0 at 224
    pixels; published models use a ViT, for example `backbone: vit_base_patch14_dinov2.lvd142m`, `layer: vit_block12`,
    `similarity_layer: vit_block_keys12`, `grid: [37, 37]` for frames of 518 pixels. With cached features (`features` in
    the data module) set `backbone: null`, `feature_dim` and `grid`. Parameters are named as in the public checkpoints.

    Args:
        num_slots: number S of slots.
        slot_dim: size D of a slot.
        slot_init: first slots of a clip. `"gaussian"`: drawn at random; `"learned"`: one vector per slot; `"features"`:
            means of groups of alike patches in the first frame (farthest points, then k-means), without randomness.
        slot_init_std: their spread at the start of the training; None for `slot_dim ** -0.5`, as published.
        backbone: `efficientnet_lite0`, `dinov2_small` or a model of timm; None where batches hold `features`.
        layer: layer of the features, as in `load_backbone`; None takes the backbone's default.
        similarity_layer: layer that the similarity loss compares, as `vit_block_keys12`; None takes `layer`.
        backbone_weights: `pretrained`, or `none` for random ones.
        backbone_checkpoint: file of weights instead.
        backbone_renormalize: normalise frames again as the backbone was trained; the public code does not.
        feature_dim: without a backbone, channels of the cached features.
        similarity_dim: without a backbone, further cached channels behind them, for the similarity loss.
        grid: rows and columns of the patches, each of which has a position embedding in the decoder.
        feature_windows: in training, clips of cached features are seen through random windows of this share or more of
            the grid's sides, half of them mirrored, which keeps few videos from being learned by heart; 1 for whole.
        encoder_hidden: hidden size of the MLP in front of slot attention; None for twice the channels, 0 for no MLP.
        encoder_position: scale of a learned position embedding inside that MLP; 0 for none, as published. Set 0.5 with
            convolutional backbones, whose features do not say where a patch lies.
        fourier_bands: 0: that embedding is linear in row and column, as published; above: of waves with up to this many
            half periods along the longer side. `decoder: fourier` needs some; 6 fits 16 x 28 patches.
        fourier_decay: each wave weighs 1 over its frequency to this power; with 1 whole regions come before ripples.
        iterations_first: slot-attention iterations on the first frame.
        iterations_later: iterations on each later frame.
        corrector_mlp_hidden: hidden size of slot attention's residual MLP; None for `4 * slot_dim`, 0 for none.
        corrector_eps: added to the attention before it is normalised over patches.
        corrector_init: `"default"`, as published, or `"kmeans"`: slot attention starts as soft k-means, so that it
            groups alike patches from the first step.
        corrector_sharpness: with `"kmeans"`, how decided the first assignments are.
        predictor_blocks: transformer blocks between frames; 0 carries slots over unchanged.
        predictor_heads: heads of each block.
        predictor_mlp_hidden: hidden size of each block's MLP; None for `4 * slot_dim`.
        decoder: `"mlp"` decodes every slot at every patch; `"mixer"` mixes the slots at each patch first, for less;
            `"fourier"` draws masks from waves and gives a slot one feature: masks follow slot attention within minutes;
            `"fourier_mixer"` gives each patch one, from its slots and place: for objects with texture, more steps.
        decoder_hidden: sizes of the decoder's hidden layers.
        mixer_blocks: blocks of the mixer's allocator.
        mixer_heads: heads of each.
        init: `"default"`, as published, or `"fan_in"`: MLPs of encoder and decoder start with variances that keep the
            signal's, for short trainings of small models.
        reconstruction_weight: weight of the reconstruction loss; 0 leaves its channels out of the decoder.
        similarity_weight: weight of the similarity loss; 0 leaves its channels, one per patch, out of the decoder.
        similarity_temperature: divides the similarities; published: 0.075 (MOVi), 0.15 (YT-VIS, DINOv2), 0.25 (DINO).
        similarity_threshold: smallest similarity that counts; None counts all.
        similarity_shift: frames between the two that are compared.
        contrast_weight: weight of the slot-slot contrastive loss; 0 leaves it out.
        contrast_temperature: divides the cosine similarities of slots.
        contrast_across_batch: contrast with the slots of all clips of the batch, not only of the own clip.
        learning_rate: peak rate of Adam; published: 1e-4 per 32 clips of the batch.
        warmup_steps: linear warm-up in optimizer steps.
        decay_steps: step at which the rate has fallen to `decay_rate`, and falls on; None is the end of the training.
        decay_rate: see `decay_steps`; 1 does not decay.
        has_background: channel 0 of `segmentations` is the background; the data module's own answer comes first.
        memory_efficient: an MLP decoder computes activations again in the backward pass: same result, half the memory.

    Raises:
        ConfigError: a size or option is out of range, options contradict each other, or the backbone cannot be built.
    """

    is_video: ClassVar[bool] = True
    """Slots are handed on from frame to frame; else every frame is an image of its own."""
    fixed: ClassVar[tuple[str, ...]] = ()
    """Options that a subclass sets and does not offer."""

    def __init__(
        self,
        num_slots: int = 11,
        slot_dim: int = 128,
        slot_init: Literal["gaussian", "learned", "features"] = "gaussian",
        slot_init_std: float | None = None,
        backbone: str | None = "efficientnet_lite0",
        layer: str | None = None,
        similarity_layer: str | None = None,
        backbone_weights: Weights = "pretrained",
        backbone_checkpoint: str | None = None,
        backbone_renormalize: bool = True,
        feature_dim: int | None = None,
        similarity_dim: int | None = None,
        grid: tuple[int, int] = (14, 14),
        feature_windows: float = 1.0,
        encoder_hidden: int | None = None,
        encoder_position: float = 0.0,
        fourier_bands: int = 0,
        fourier_decay: float = 0.0,
        iterations_first: int = 3,
        iterations_later: int = 2,
        corrector_mlp_hidden: int | None = 0,
        corrector_eps: float = 1e-8,
        corrector_init: Literal["default", "kmeans"] = "default",
        corrector_sharpness: float = _SHARPNESS,
        predictor_blocks: int = 1,
        predictor_heads: int = 4,
        predictor_mlp_hidden: int | None = None,
        decoder: Literal["mlp", "mixer", "fourier", "fourier_mixer"] = "mixer",
        decoder_hidden: tuple[int, ...] = (1024, 1024, 1024),
        mixer_blocks: int = 2,
        mixer_heads: int = 4,
        init: Literal["default", "fan_in"] = "default",
        reconstruction_weight: float = 1.0,
        similarity_weight: float = 0.1,
        similarity_temperature: float = 0.075,
        similarity_threshold: float | None = 0.0,
        similarity_shift: int = 1,
        contrast_weight: float = 0.0,
        contrast_temperature: float = 0.1,
        contrast_across_batch: bool = True,
        learning_rate: float = 4e-4,
        warmup_steps: int = 2500,
        decay_steps: int | None = None,
        decay_rate: float = 0.5,
        has_background: bool = True,
        memory_efficient: bool = True,
    ) -> None:
        super().__init__(has_background)
        self.save_hyperparameters(ignore=list(self.fixed))
        weights = (reconstruction_weight, similarity_weight, contrast_weight)
        expected = "weights of losses from 0, and `reconstruction_weight` or `similarity_weight` above"
        require(min(weights) >= 0 < reconstruction_weight + similarity_weight, expected, *weights)
        temperatures = (similarity_temperature, contrast_temperature)
        require(min(temperatures) > 0, "`similarity_temperature` and `contrast_temperature` above 0", *temperatures)
        require(similarity_shift >= 1, "argument `similarity_shift` to be at least 1", similarity_shift)
        fits = 1 <= min(num_slots, slot_dim) <= max(num_slots, slot_dim) < 1e6
        require(fits, "`num_slots` and `slot_dim` to be from 1 to 999,999", num_slots, slot_dim)
        windows = 0 < feature_windows <= 1 and (backbone is None or feature_windows == 1)
        require(windows, "`feature_windows` to be 1, or in (0, 1) with cached features", feature_windows)
        fits = fourier_decay == 0 or (fourier_bands > 0 and 0 < fourier_decay <= 4)
        require(fits, "argument `fourier_decay` to be in [0, 4], and 0 without `fourier_bands`", fourier_decay)
        choose("slot_init", slot_init, "gaussian", "learned", "features")
        choose("decoder", decoder, "mlp", "mixer", "fourier", "fourier_mixer")
        choose("corrector_init", corrector_init, "default", "kmeans")
        choose("init", init, "default", "fan_in")
        self.loss_weights = dict(zip(("reconstruction", "similarity", "contrast"), weights, strict=True))
        self.similarity_shift = similarity_shift
        self._similarity: Any = {"temperature": similarity_temperature, "threshold": similarity_threshold}
        self._contrast: Any = {"temperature": contrast_temperature, "across_batch": contrast_across_batch}
        self.carries_slots = self.is_video
        encoder = FeatureEncoder(
            backbone=backbone,
            layer=layer,
            similarity_layer=similarity_layer,
            weights=backbone_weights,
            checkpoint=backbone_checkpoint,
            renormalize=backbone_renormalize,
            feature_dim=feature_dim,
            similarity_dim=similarity_dim,
            grid=grid,
            slot_dim=slot_dim,
            hidden=encoder_hidden,
            position=encoder_position,
            bands=fourier_bands,
            decay=fourier_decay,
        )
        self.grid = encoder.grid
        patches = math.prod(encoder.grid)
        channels = encoder.feature_dim * (reconstruction_weight > 0) + patches * (similarity_weight > 0)
        predictor = None
        if predictor_blocks > 0:
            predictor = SlotTransformer(slot_dim, predictor_blocks, predictor_heads, predictor_mlp_hidden)
        spread = slot_dim**-0.5 if slot_init_std is None else slot_init_std
        require(spread > 0, "argument `slot_init_std` to be above 0", spread, advice="Leave it out.")
        self.initializer = build_initializer(slot_init, num_slots, slot_dim, encoder.output_dim, spread)
        corrector = SlotCorrector(encoder.output_dim, slot_dim, iterations_later, corrector_mlp_hidden, corrector_eps)
        processor = SlotProcessor(corrector, predictor, iterations_first)
        patch_decoder: nn.Module
        if decoder == "mlp":
            patch_decoder = MLPDecoder(slot_dim, channels, decoder_hidden, patches, memory_efficient)
        elif decoder in ("fourier", "fourier_mixer"):
            waves = fourier_code(encoder.grid, fourier_bands, fourier_decay)
            place = PatchPosition(waves, slot_dim) if decoder == "fourier_mixer" else None
            patch_decoder = FourierDecoder(slot_dim, channels, decoder_hidden, waves, place)
        else:
            patch_decoder = SlotMixerDecoder(slot_dim, channels, decoder_hidden, patches, mixer_blocks, mixer_heads)
        if corrector_init == "kmeans":
            init_soft_kmeans_(corrector, corrector_sharpness)
        else:
            expected = "argument `corrector_sharpness` only with corrector_init='kmeans'"
            require(corrector_sharpness == _SHARPNESS, expected, corrector_sharpness, advice="Leave it out.")
        if init == "fan_in":
            found = (encoder.output_transform, getattr(patch_decoder, "mlp", None))
            stacks = [stack for stack in found if stack is not None]
            require(bool(stacks), "init='fan_in' only with `encoder_hidden` above 0 or decoder='mlp'", "neither")
            for stack in stacks:
                init_fan_in_(stack)
        self.encoder: nn.Module = MapOverTime(encoder) if self.is_video else encoder
        self.processor: nn.Module = ScanOverTime(processor) if self.is_video else processor
        self.decoder: nn.Module = MapOverTime(patch_decoder) if self.is_video else patch_decoder

    def forward(self, inputs: Tensor) -> FeatureHostOutput:
        """Decompose clips into slots."""
        expected = "argument `inputs` to be frames (B, T, 3, H, W) or cached features (B, T, N, C)"
        require_shape(inputs.ndim in (4, 5), expected, inputs, advice="Use T = 1 for images.")
        if self.training and inputs.ndim == 4 and self.hparams["feature_windows"] < 1:
            inputs = random_windows(inputs, self.grid, self.hparams["feature_windows"])
        clips = inputs.shape[:2]
        items = inputs if self.is_video else inputs.flatten(0, 1)
        encoded = self.encoder(items)
        seen = (encoded["features"], encoded["backbone_features"])
        first = self.initializer(*(frames[:, 0] if self.is_video else frames for frames in seen))
        processed = self.processor(first, encoded["features"])
        decoded = self.decoder(processed["slots"])
        if not self.is_video:
            encoded, processed, decoded = (
                {name: value.unflatten(0, clips) for name, value in part.items()}
                for part in (encoded, processed, decoded)
            )
        features, similarity = encoded["backbone_features"], encoded["similarity_features"]
        masks = decoded["dots"].unflatten(-1, self.grid)
        slots, logits, reconstruction = processed["slots"], processed["dots"], decoded["reconstruction"]
        return FeatureHostOutput(slots, logits, self.grid, reconstruction, masks, features, similarity)

    def losses(self, output: FeatureHostOutput, valid: Tensor) -> dict[str, tuple[float, Tensor]]:
        """Reconstruction, similarity and contrast, as far as their weights are above 0."""
        return {name: (w, self._loss(name, output, valid)) for name, w in self.loss_weights.items() if w > 0}

    def _loss(self, name: str, output: FeatureHostOutput, valid: Tensor) -> Tensor:
        if name == "reconstruction":
            rebuilt = output.reconstruction[..., : output.targets.shape[-1]]
            error = rebuilt.to(compute_dtype(rebuilt.dtype)) - output.targets
            return mean_over_frames(error.square().mean(dim=(2, 3)), valid)
        shift = self.similarity_shift if name == "similarity" else 1
        if valid.shape[1] <= shift and not self.training:
            return output.slots.new_zeros(())
        advice = f"Raise `clip_length`, or set {name}_weight=0."
        require(valid.shape[1] > shift, f"at least {shift + 1} frames for {name}", valid.shape[1], advice=advice)
        if name == "contrast":
            return slot_contrast_loss(output.slots, valid, **self._contrast)
        target = temporal_similarity(output.similarity_features, shift=shift, **self._similarity)
        prediction = output.reconstruction[:, :-shift, :, -target.shape[-1] :]
        return temporal_similarity_loss(prediction, target, valid[:, :-shift] & valid[:, shift:])

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Weighted sum of the losses on a batch that holds `features` or `video`; with both, no backbone runs."""
        output, parts, loss = self._step(batch)
        if len(parts) > 1:
            self.log_dict({f"train/{name}": part for name, part in parts.items()}, batch_size=len(output.slots))
        self.log("train/loss", loss, prog_bar=True, batch_size=len(output.slots))
        return loss

    def evaluate(self, batch: Mapping[str, Any]) -> Evaluated:
        """Decompose a batch that holds `features` or `video`; masks are on the grid of patches."""
        output, _, loss = self._step(batch)
        attention = output.attention_logits.unflatten(-1, self.grid)
        return Evaluated(output.mask_logits.softmax(dim=2), loss, attention, images=not self.is_video)

    def segment(self, batch: Mapping[str, Any]) -> Tensor:
        """Object masks of a batch, without losses, of which the similarity of all pairs of patches takes memory."""
        masks: Tensor = self(inputs_of(batch)).mask_logits.softmax(dim=2)
        return masks

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build Adam with linear warm-up and exponential decay."""
        given, steps = self.hparams, self.trainer.estimated_stepping_batches
        factor = exponential_for(steps, given["warmup_steps"], given["decay_steps"], given["decay_rate"])
        return self.adam(given["learning_rate"], factor)

    def _step(self, batch: Mapping[str, Any]) -> tuple[FeatureHostOutput, dict[str, Tensor], Tensor]:
        output: FeatureHostOutput = self(inputs_of(batch))
        weighted = self.losses(output, frame_validity(batch))
        total = torch.stack([weight * loss for weight, loss in weighted.values()]).sum()
        return output, {name: loss for name, (_, loss) in weighted.items()}, total


class VideoSAUR(FeatureHost):
    """VideoSAUR (arXiv 2306.04829): feature reconstruction and temporal similarity, with a slot mixer.

    Options are those of `FeatureHost`. Clip gradients in the Trainer: `gradient_clip_val=0.05`, as published.

    Examples:
        >>> import torch
        >>> model = VideoSAUR(4, slot_dim=16, backbone=None, feature_dim=24, grid=(3, 5), decoder_hidden=(32,))
        >>> out = model(torch.randn(2, 3, 15, 24))
        >>> out.attention_logits.shape, out.mask_logits.shape, out.reconstruction.shape
        (torch.Size([2, 3, 4, 15]), torch.Size([2, 3, 4, 3, 5]), torch.Size([2, 3, 15, 39]))
    """


class SlotContrast(FeatureHost):
    """SlotContrast (arXiv 2412.14295): feature reconstruction and slot-slot contrast.

    VideoSAUR with the defaults published for SlotContrast. SSync was published on this host. Clip gradients in the
    Trainer: `gradient_clip_val=0.05`.

    Args:
        slot_dim: size D of a slot.
        slot_init: first slots of a clip: `"learned"`, `"gaussian"` or `"features"`.
        corrector_mlp_hidden: hidden size of slot attention's residual MLP; None for `4 * slot_dim`, 0 for none.
        decoder: `"mlp"`, `"mixer"`, `"fourier"` or `"fourier_mixer"`.
        similarity_weight: weight of VideoSAUR's similarity loss.
        contrast_weight: weight of the slot-slot contrastive loss.
        **options: all other options of `FeatureHost`.
    """

    def __init__(
        self,
        slot_dim: int = 64,
        slot_init: Literal["gaussian", "learned", "features"] = "learned",
        corrector_mlp_hidden: int | None = None,
        decoder: Literal["mlp", "mixer", "fourier", "fourier_mixer"] = "mlp",
        similarity_weight: float = 0.0,
        contrast_weight: float = 0.5,
        **options: Any,
    ) -> None:
        super().__init__(
            slot_dim=slot_dim,
            slot_init=slot_init,
            corrector_mlp_hidden=corrector_mlp_hidden,
            decoder=decoder,
            similarity_weight=similarity_weight,
            contrast_weight=contrast_weight,
            **options,
        )


class DINOSAUR(FeatureHost):
    """DINOSAUR (arXiv 2209.14860): slots of single images that reconstruct frozen features.

    Every frame of a clip is an image of its own, and slots keep no identity over time: train with `clip_length: 1`. The
    defaults are the published sizes on the packaged EfficientNet-lite0. Clip gradients in the Trainer:
    `gradient_clip_val=1.0`, as published.

    Args:
        num_slots: number S of slots.
        slot_dim: size D of a slot.
        iterations: slot-attention iterations.
        corrector_mlp_hidden: hidden size of slot attention's residual MLP; None for `4 * slot_dim`, 0 for none.
        decoder: `"mlp"` decodes every slot at every patch; `"mixer"` mixes the slots at each patch first.
        decoder_hidden: sizes of the decoder's hidden layers.
        warmup_steps: linear warm-up in optimizer steps.
        decay_steps: step at which the rate has fallen to `decay_rate`, and falls on; None is the end of the training.
        **options: all other options of `FeatureHost`; those of the predictor and of its other losses change nothing.
    """

    is_video = False
    fixed = ("iterations_first", "iterations_later", "predictor_blocks", "similarity_weight", "contrast_weight")

    def __init__(
        self,
        num_slots: int = 7,
        slot_dim: int = 256,
        iterations: int = 3,
        corrector_mlp_hidden: int | None = None,
        decoder: Literal["mlp", "mixer", "fourier", "fourier_mixer"] = "mlp",
        decoder_hidden: tuple[int, ...] = (2048, 2048, 2048),
        warmup_steps: int = 10_000,
        decay_steps: int | None = 100_000,
        **options: Any,
    ) -> None:
        super().__init__(
            num_slots=num_slots,
            slot_dim=slot_dim,
            iterations_first=iterations,
            iterations_later=iterations,
            corrector_mlp_hidden=corrector_mlp_hidden,
            predictor_blocks=0,
            decoder=decoder,
            decoder_hidden=decoder_hidden,
            similarity_weight=0.0,
            contrast_weight=0.0,
            warmup_steps=warmup_steps,
            decay_steps=decay_steps,
            **options,
        )
