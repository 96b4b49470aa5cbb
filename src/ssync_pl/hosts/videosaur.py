"""VideoSAUR, a video host on frozen features that learns objects from what moves together (Zadaianchuk et al. 2023)."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

from ssync_pl.errors import ConfigError
from ssync_pl.hosts.feature_host import (
    DEFAULT_SHARPNESS,
    FeatureHost,
    FeatureHostOutput,
    build_patch_decoder,
    build_slots,
)
from ssync_pl.hosts.nn.backbones import Weights
from ssync_pl.hosts.nn.corrector import SlotCorrector
from ssync_pl.hosts.nn.feature_encoder import build_feature_encoder
from ssync_pl.hosts.nn.slot_transformer import SlotTransformer
from ssync_pl.hosts.slot_contrast import slot_contrast_loss
from ssync_pl.hosts.temporal_similarity import temporal_similarity, temporal_similarity_loss

__all__ = ["VideoSAUR"]


class VideoSAUR(FeatureHost):
    """VideoSAUR (arXiv 2306.04829): slots on frozen features, handed on from frame to frame.

    Three losses, each with a weight: reconstruction of the features (mean squared error), prediction of where in a
    later frame the features of each patch are found again (VideoSAUR's similarity loss), and contrast between slots of
    neighbouring frames (SlotContrast's loss, off here). The defaults are the published sizes on the packaged
    EfficientNet-lite0 at 224 pixels, which needs no network; published models use a ViT, for example
    `backbone: vit_base_patch14_dinov2.lvd142m`, `layer: vit_block12`, `similarity_layer: vit_block_keys12`,
    `grid: [37, 37]` for frames of 518 pixels. Clip gradients in the Trainer: `gradient_clip_val=0.05`, as published.

    With cached features (`features` in the data module) set `backbone: null`, `feature_dim` and `grid`; with a backbone
    as well, batches that hold features are not run through it. Frames may be normalised in any way the data module
    states: they are normalised again for the backbone. State dicts have the public code's keys and load its
    checkpoints; of the backbone only a fingerprint is saved.

    Args:
        num_slots: number S of slots.
        slot_dim: size D of a slot.
        slot_init: first slots of a clip. `"gaussian"`: drawn at random; `"learned"`: one vector a slot.
        slot_init_std: their spread at the start of the training; None for `slot_dim ** -0.5`, as published.
        backbone: `efficientnet_lite0` or a model of timm; None where batches hold `features`.
        layer: layer of the features, as in `load_backbone`; None takes the backbone's default.
        similarity_layer: layer of the features that the similarity loss compares, for example a ViT's keys,
            `vit_block_keys12`; None takes the reconstructed features.
        backbone_weights: `pretrained`, or `none` for random ones.
        backbone_checkpoint: file of weights instead.
        feature_dim: without a backbone, channels of the cached features.
        similarity_dim: without a backbone, further channels behind them, for the similarity loss: a cache made with
            `vit_block12+vit_block_keys12` holds both.
        grid: rows and columns of the patches, each of which has a position embedding in the decoder.
        encoder_hidden: hidden size of the MLP from features to what slots attend to; None for twice the channels of the
            features, as published; 0 for no MLP.
        encoder_position: scale of a learned position embedding inside that MLP; 0 for none, as published. Features of
            convolutional backbones do not say where a patch lies, and slots that do not know it can tell the decoder
            no place: set 0.5 with them. ViTs have positions of their own. The state dict gets one more key.
        iterations_first: slot-attention iterations on the first frame.
        iterations_later: iterations on each later frame.
        corrector_mlp_hidden: hidden size of slot attention's residual MLP; None for `4 * slot_dim`, 0 for none.
        corrector_eps: added to the attention before it is normalised over patches.
        corrector_init: `"default"`, as published, or `"kmeans"`: slot attention starts as soft k-means, so that it
            groups alike patches from the first step. For short trainings; see `init_soft_kmeans_`. The features that
            slots attend to must have `slot_dim` channels, as they do with `encoder_hidden` above 0.
        corrector_sharpness: with `"kmeans"`, how decided the first assignments are: the logits start at its square
            times those of the normalised slots and features.
        predictor_blocks: transformer blocks between frames; 0 carries slots over unchanged.
        predictor_heads: heads of each block.
        predictor_mlp_hidden: hidden size of each block's MLP; None for `4 * slot_dim`.
        decoder: `"mlp"` decodes every slot at every patch; `"mixer"` mixes the slots at each patch first, which costs
            much less with many slots.
        decoder_hidden: sizes of the decoder's hidden layers.
        mixer_blocks: blocks of the mixer's allocator.
        mixer_heads: heads of each.
        init: `"default"`, as published, or `"fan_in"`: the layers of the encoder's MLP and of an MLP decoder start with
            variances that keep the signal's (`init_fan_in_`; a mixer stays as it is). For short trainings of small
            models, whose decoders otherwise see little of the slots at first.
        reconstruction_weight: weight of the reconstruction loss; 0 leaves its channels out of the decoder.
        similarity_weight: weight of the similarity loss; 0 leaves its channels, one a patch, out of the decoder.
        similarity_temperature: divides the similarities before their softmax; published: 0.075 (MOVi), 0.15 and 0.25
            (YT-VIS with DINOv2 and DINO).
        similarity_threshold: smallest similarity that counts; None counts all.
        similarity_shift: frames between the two that are compared.
        contrast_weight: weight of the slot-slot contrastive loss; 0 leaves it out.
        contrast_temperature: divides the cosine similarities of slots.
        contrast_across_batch: contrast with the slots of all clips of the batch, not only of the own clip.
        learning_rate: peak rate of Adam; published: 1e-4 a 32 clips of the batch.
        warmup_steps: linear warm-up in optimizer steps.
        decay_steps: step at which the rate has fallen to `decay_rate` of its peak; None is the end of the training.
        decay_rate: see `decay_steps`; 1 does not decay.
        has_background: channel 0 of `segmentations` is the background; the data module's own answer comes first.
        memory_efficient: an MLP decoder mixes its hidden activations, in chunks, instead of reconstructions: the same
            result and gradients, sooner and in less than half of the memory. False takes the plain layout.
        compile_scan: run the recurrence over frames, many small operations, by `torch.compile`. It takes a minute to
            start, and needs what `torch.compile` needs (a compiler on CPU, Triton on a GPU).

    Raises:
        ConfigError: a size or option is out of range, options contradict each other, or the backbone cannot be built.

    Example:
        >>> import torch
        >>> model = VideoSAUR(4, slot_dim=16, backbone=None, feature_dim=24, grid=(3, 5), decoder_hidden=(32,))
        >>> out = model(torch.randn(2, 3, 15, 24))
        >>> out.attention_logits.shape, out.mask_logits.shape, out.reconstruction.shape
        (torch.Size([2, 3, 4, 15]), torch.Size([2, 3, 4, 3, 5]), torch.Size([2, 3, 15, 39]))
    """

    def __init__(
        self,
        num_slots: int = 11,
        slot_dim: int = 128,
        slot_init: Literal["gaussian", "learned"] = "gaussian",
        slot_init_std: float | None = None,
        backbone: str | None = "efficientnet_lite0",
        layer: str | None = None,
        similarity_layer: str | None = None,
        backbone_weights: Weights = "pretrained",
        backbone_checkpoint: str | None = None,
        feature_dim: int | None = None,
        similarity_dim: int | None = None,
        grid: tuple[int, int] = (14, 14),
        encoder_hidden: int | None = None,
        encoder_position: float = 0.0,
        iterations_first: int = 3,
        iterations_later: int = 2,
        corrector_mlp_hidden: int | None = 0,
        corrector_eps: float = 1e-8,
        corrector_init: Literal["default", "kmeans"] = "default",
        corrector_sharpness: float = DEFAULT_SHARPNESS,
        predictor_blocks: int = 1,
        predictor_heads: int = 4,
        predictor_mlp_hidden: int | None = None,
        decoder: Literal["mlp", "mixer"] = "mixer",
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
        compile_scan: bool = False,
    ) -> None:
        weights = (reconstruction_weight, similarity_weight, contrast_weight)
        if min(weights) < 0 or reconstruction_weight + similarity_weight == 0:
            raise ConfigError(
                "Expected arguments `reconstruction_weight`, `similarity_weight` and `contrast_weight` to be at least "
                f"0 and one of the first two to be above, but got {', '.join(map(str, weights))}."
            )
        if similarity_temperature <= 0 or similarity_shift < 1 or contrast_temperature <= 0 or predictor_blocks < 0:
            raise ConfigError(
                "Expected arguments `similarity_temperature` and `contrast_temperature` to be above 0, "
                "`similarity_shift` to be at least 1 and `predictor_blocks` to be at least 0, but got "
                f"{similarity_temperature}, {contrast_temperature}, {similarity_shift} and {predictor_blocks}."
            )
        encoder = build_feature_encoder(
            backbone=backbone,
            layer=layer,
            similarity_layer=similarity_layer,
            weights=backbone_weights,
            checkpoint=backbone_checkpoint,
            feature_dim=feature_dim,
            similarity_dim=similarity_dim,
            grid=grid,
            slot_dim=slot_dim,
            hidden=encoder_hidden,
            position=encoder_position,
        )
        patches = math.prod(encoder.grid)
        channels = encoder.feature_dim * (reconstruction_weight > 0) + patches * (similarity_weight > 0)
        predictor = None
        if predictor_blocks > 0:
            predictor = SlotTransformer(slot_dim, predictor_blocks, predictor_heads, predictor_mlp_hidden)
        super().__init__(
            initializer=build_slots(slot_init, num_slots, slot_dim, slot_init_std),
            encoder=encoder,
            corrector=SlotCorrector(
                encoder.output_dim, slot_dim, iterations_later, corrector_mlp_hidden, corrector_eps
            ),
            predictor=predictor,
            decoder=build_patch_decoder(
                decoder, slot_dim, channels, decoder_hidden, patches, mixer_blocks, mixer_heads, memory_efficient
            ),
            iterations_first=iterations_first,
            is_video=True,
            learning_rate=learning_rate,
            warmup_steps=warmup_steps,
            decay_steps=decay_steps,
            decay_rate=decay_rate,
            has_background=has_background,
            corrector_init=corrector_init,
            corrector_sharpness=corrector_sharpness,
            init=init,
            compile_scan=compile_scan,
        )
        self.save_hyperparameters()
        self.reconstruction_weight = reconstruction_weight
        self.similarity_weight = similarity_weight
        self.similarity_temperature = similarity_temperature
        self.similarity_threshold = similarity_threshold
        self.similarity_shift = similarity_shift
        self.contrast_weight = contrast_weight
        self.contrast_temperature = contrast_temperature
        self.contrast_across_batch = contrast_across_batch

    def losses(self, output: FeatureHostOutput, valid: Tensor) -> dict[str, tuple[float, Tensor]]:
        """Reconstruction, similarity and contrast, as far as their weights are above 0.

        Args:
            output: of `forward`.
            valid: bool `(B, T)`, frames that count.

        Returns:
            Weight and 0-dim loss by name. Videos too short to compare frames have 0 in evaluation.

        Raises:
            ConfigError: Training clips are too short to compare frames.
        """
        losses: dict[str, tuple[float, Tensor]] = {}
        frames = output.slots.shape[1]
        if self.reconstruction_weight > 0:
            losses["reconstruction"] = (self.reconstruction_weight, self._reconstruction_error(output, valid))
        if self.similarity_weight > 0:
            shift = self.similarity_shift
            comparable = self._comparable(frames, shift, "similarity")
            loss = self._similarity_error(output, valid) if comparable else output.reconstruction.new_zeros(())
            losses["similarity"] = (self.similarity_weight, loss)
        if self.contrast_weight > 0:
            loss = output.slots.new_zeros(())
            if self._comparable(frames, 1, "contrast"):
                loss = slot_contrast_loss(
                    output.slots,
                    temperature=self.contrast_temperature,
                    across_batch=self.contrast_across_batch,
                    valid=valid,
                )
            losses["contrast"] = (self.contrast_weight, loss)
        return losses

    def _similarity_error(self, output: FeatureHostOutput, valid: Tensor) -> Tensor:
        shift = self.similarity_shift
        target = temporal_similarity(
            output.similarity_features,
            shift=shift,
            temperature=self.similarity_temperature,
            threshold=self.similarity_threshold,
        )
        prediction = output.reconstruction[:, :-shift, :, -target.shape[-1] :]
        return temporal_similarity_loss(prediction, target, valid[:, :-shift] & valid[:, shift:])

    def _comparable(self, frames: int, shift: int, loss: str) -> bool:
        if frames > shift:
            return True
        if self.training:
            raise ConfigError(
                f"Expected clips of at least {shift + 1} frames for the {loss} loss, but got {frames}. Raise "
                f"`clip_length` in the data module, or set {loss}_weight=0."
            )
        return False
