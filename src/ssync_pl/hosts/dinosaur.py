"""DINOSAUR, the image host on frozen features (Seitzer et al. 2023)."""

from __future__ import annotations

import math
from typing import Literal

from ssync_pl.hosts.feature_host import DEFAULT_SHARPNESS, FeatureHost, build_patch_decoder, build_slots
from ssync_pl.hosts.nn.backbones import Weights
from ssync_pl.hosts.nn.corrector import SlotCorrector
from ssync_pl.hosts.nn.feature_encoder import build_feature_encoder

__all__ = ["DINOSAUR"]


class DINOSAUR(FeatureHost):
    """DINOSAUR (arXiv 2209.14860): slots of single images that reconstruct frozen features.

    Every frame of a clip is an image of its own: train with `clip_length: 1`; slots keep no identity over time, which
    the video metrics show. State dicts have the keys of the public image models of the VideoSAUR code (no `module`).
    The defaults are the published sizes on the packaged EfficientNet-lite0 at 224 pixels; published models use a ViT,
    for example `backbone: vit_base_patch14_dinov2.lvd142m`, `layer: vit_block12`, `grid: [16, 16]`. Clip gradients in
    the Trainer: `gradient_clip_val=1.0`, as published.

    Args:
        num_slots: number S of slots.
        slot_dim: size D of a slot.
        slot_init: first slots of an image. `"gaussian"`: drawn at random; `"learned"`: one vector a slot.
        slot_init_std: their spread at the start of the training; None for `slot_dim ** -0.5`, as published.
        backbone: `efficientnet_lite0` or a model of timm; None where batches hold `features`.
        layer: layer of the features, as in `load_backbone`; None takes the backbone's default.
        backbone_weights: `pretrained`, or `none` for random ones.
        backbone_checkpoint: file of weights instead.
        feature_dim: without a backbone, channels of the cached features.
        grid: rows and columns of the patches, each of which has a position embedding in the decoder.
        encoder_hidden: hidden size of the MLP from features to what slots attend to; None for twice the channels of the
            features, as published; 0 for no MLP.
        encoder_position: scale of a learned position embedding inside that MLP; 0 for none, as published. Features of
            convolutional backbones do not say where a patch lies, and slots that do not know it can tell the decoder
            no place: set 0.5 with them. ViTs have positions of their own. The state dict gets one more key.
        iterations: slot-attention iterations.
        corrector_mlp_hidden: hidden size of slot attention's residual MLP; None for `4 * slot_dim`, 0 for none.
        corrector_eps: added to the attention before it is normalised over patches.
        corrector_init: `"default"`, as published, or `"kmeans"`: slot attention starts as soft k-means, so that it
            groups alike patches from the first step. For short trainings; see `init_soft_kmeans_`. The features that
            slots attend to must have `slot_dim` channels, as they do with `encoder_hidden` above 0.
        corrector_sharpness: with `"kmeans"`, how decided the first assignments are: the logits start at its square
            times those of the normalised slots and features.
        decoder: `"mlp"` decodes every slot at every patch; `"mixer"` mixes the slots at each patch first.
        decoder_hidden: sizes of the decoder's hidden layers.
        mixer_blocks: blocks of the mixer's allocator.
        mixer_heads: heads of each.
        init: `"default"`, as published, or `"fan_in"`: the layers of the encoder's MLP and of an MLP decoder start with
            variances that keep the signal's (`init_fan_in_`; a mixer stays as it is). For short trainings of small
            models, whose decoders otherwise see little of the slots at first.
        learning_rate: peak rate of Adam.
        warmup_steps: linear warm-up in optimizer steps.
        decay_steps: step at which the rate has fallen to `decay_rate` of its peak, and falls on; None is the end of
            the training.
        decay_rate: see `decay_steps`; 1 does not decay.
        has_background: channel 0 of `segmentations` is the background; the data module's own answer comes first.
        memory_efficient: an MLP decoder mixes its hidden activations, in chunks, instead of reconstructions: the same
            result and gradients, sooner and in less than half of the memory. False takes the plain layout.

    Raises:
        ConfigError: a size or option is out of range, options contradict each other, or the backbone cannot be built.

    Example:
        >>> import torch
        >>> model = DINOSAUR(4, slot_dim=16, backbone=None, feature_dim=24, grid=(3, 5), decoder_hidden=(32,))
        >>> out = model(torch.randn(2, 1, 15, 24))
        >>> out.slots.shape, out.mask_logits.shape
        (torch.Size([2, 1, 4, 16]), torch.Size([2, 1, 4, 3, 5]))
    """

    def __init__(
        self,
        num_slots: int = 7,
        slot_dim: int = 256,
        slot_init: Literal["gaussian", "learned"] = "gaussian",
        slot_init_std: float | None = None,
        backbone: str | None = "efficientnet_lite0",
        layer: str | None = None,
        backbone_weights: Weights = "pretrained",
        backbone_checkpoint: str | None = None,
        feature_dim: int | None = None,
        grid: tuple[int, int] = (14, 14),
        encoder_hidden: int | None = None,
        encoder_position: float = 0.0,
        iterations: int = 3,
        corrector_mlp_hidden: int | None = None,
        corrector_eps: float = 1e-8,
        corrector_init: Literal["default", "kmeans"] = "default",
        corrector_sharpness: float = DEFAULT_SHARPNESS,
        decoder: Literal["mlp", "mixer"] = "mlp",
        decoder_hidden: tuple[int, ...] = (2048, 2048, 2048),
        mixer_blocks: int = 2,
        mixer_heads: int = 4,
        init: Literal["default", "fan_in"] = "default",
        learning_rate: float = 4e-4,
        warmup_steps: int = 10_000,
        decay_steps: int | None = 100_000,
        decay_rate: float = 0.5,
        has_background: bool = True,
        memory_efficient: bool = True,
    ) -> None:
        encoder = build_feature_encoder(
            backbone=backbone,
            layer=layer,
            similarity_layer=None,
            weights=backbone_weights,
            checkpoint=backbone_checkpoint,
            feature_dim=feature_dim,
            similarity_dim=None,
            grid=grid,
            slot_dim=slot_dim,
            hidden=encoder_hidden,
            position=encoder_position,
        )
        patches = math.prod(encoder.grid)
        super().__init__(
            initializer=build_slots(slot_init, num_slots, slot_dim, slot_init_std),
            encoder=encoder,
            corrector=SlotCorrector(encoder.output_dim, slot_dim, iterations, corrector_mlp_hidden, corrector_eps),
            predictor=None,
            decoder=build_patch_decoder(
                decoder,
                slot_dim,
                encoder.feature_dim,
                decoder_hidden,
                patches,
                mixer_blocks,
                mixer_heads,
                memory_efficient,
            ),
            iterations_first=None,
            is_video=False,
            learning_rate=learning_rate,
            warmup_steps=warmup_steps,
            decay_steps=decay_steps,
            decay_rate=decay_rate,
            has_background=has_background,
            corrector_init=corrector_init,
            corrector_sharpness=corrector_sharpness,
            init=init,
        )
        self.save_hyperparameters()
