"""The base of hosts that reconstruct frozen features: VideoSAUR, SlotContrast, DINOSAUR."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from ssync_pl.errors import ConfigError, ShapeError
from ssync_pl.hosts.evaluation import frame_validity, mean_over_frames
from ssync_pl.hosts.nn.corrector import SlotCorrector
from ssync_pl.hosts.nn.feature_encoder import FeatureEncoder
from ssync_pl.hosts.nn.initializers import GaussianSlots, LearnedSlots
from ssync_pl.hosts.nn.over_time import MapOverTime, ScanOverTime, SlotProcessor
from ssync_pl.hosts.nn.patch_decoders import MLPDecoder, SlotMixerDecoder
from ssync_pl.hosts.nn.soft_kmeans import init_soft_kmeans_
from ssync_pl.hosts.nn.weights import init_fan_in_
from ssync_pl.hosts.schedules import exponential_for
from ssync_pl.hosts.training import SlotHost
from ssync_pl.method.labels import compute_dtype

__all__ = ["DEFAULT_SHARPNESS", "FeatureHost", "FeatureHostOutput", "build_patch_decoder", "build_slots"]

DEFAULT_SHARPNESS = 1.5
"""How decided the first assignments are when slot attention starts as soft k-means."""


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

    Example:
        >>> FeatureHostOutput._fields[:3]
        ('slots', 'attention_logits', 'attention_grid')
    """

    slots: Tensor
    attention_logits: Tensor
    attention_grid: tuple[int, int]
    reconstruction: Tensor
    mask_logits: Tensor
    targets: Tensor
    similarity_features: Tensor


class FeatureHost(SlotHost):
    """Slots on frozen features, in the public layout of the VideoSAUR family.

    Modules and parameters are named as in the public code, so that its checkpoints load: for videos
    `encoder.module.output_transform`, `processor.module.corrector`, `processor.module.predictor`, `decoder.module`;
    for images the same without `module`. A subclass says in `losses` what is trained for.

    Args:
        initializer: makes the first slots of a number of clips.
        encoder: frames or cached features to what slots attend to.
        corrector: slot attention.
        predictor: slots of a frame to those of the next; None carries them over. Videos only.
        decoder: slots to patches and object masks.
        iterations_first: iterations of the corrector on the first frame; None leaves that to the corrector.
        is_video: hand slots on from frame to frame; else every frame is an image of its own.
        learning_rate: peak rate of Adam.
        warmup_steps: linear warm-up in optimizer steps.
        decay_steps: step at which the rate has fallen to `decay_rate` of its peak; None is the end of the training.
        decay_rate: see `decay_steps`; 1 does not decay.
        has_background: channel 0 of `segmentations` is the background; the data module's own answer comes first.
        corrector_init: `"default"`, or `"kmeans"`: slot attention starts as soft k-means (`init_soft_kmeans_`).
        corrector_sharpness: with `"kmeans"`, how decided the first assignments are.
        init: `"default"`, or `"fan_in"`: the encoder's and the MLP decoder's layers start with `init_fan_in_`.
        compile_scan: run the recurrence by `torch.compile`. Videos only.

    Raises:
        ConfigError: an initial state cannot be had with these parts.

    Example:
        >>> from ssync_pl.hosts import DINOSAUR, SlotContrast, VideoSAUR
        >>> all(issubclass(host, FeatureHost) for host in (VideoSAUR, SlotContrast, DINOSAUR))
        True
    """

    def __init__(
        self,
        *,
        initializer: nn.Module,
        encoder: FeatureEncoder,
        corrector: SlotCorrector,
        predictor: nn.Module | None,
        decoder: nn.Module,
        iterations_first: int | None,
        is_video: bool,
        learning_rate: float,
        warmup_steps: int,
        decay_steps: int | None,
        decay_rate: float,
        has_background: bool,
        corrector_init: Literal["default", "kmeans"] = "default",
        corrector_sharpness: float = DEFAULT_SHARPNESS,
        init: Literal["default", "fan_in"] = "default",
        compile_scan: bool = False,
    ) -> None:
        super().__init__(has_background)
        self.is_video = is_video
        self.carries_slots = is_video
        self.grid = encoder.grid
        self.learning_rate = learning_rate
        self.warmup_steps = warmup_steps
        self.decay_steps = decay_steps
        self.decay_rate = decay_rate
        _init_corrector(corrector, corrector_init, corrector_sharpness)
        _init_layers(encoder, decoder, init)
        processor = SlotProcessor(corrector, predictor, iterations_first)
        self.initializer = initializer
        self.encoder: nn.Module = MapOverTime(encoder) if is_video else encoder
        self.processor: nn.Module = ScanOverTime(processor, compile_scan) if is_video else processor
        self.decoder: nn.Module = MapOverTime(decoder) if is_video else decoder

    def losses(self, output: FeatureHostOutput, valid: Tensor) -> dict[str, tuple[float, Tensor]]:
        """What is trained for; here the reconstruction of the features.

        Args:
            output: of `forward`.
            valid: bool `(B, T)`, frames that count.

        Returns:
            Weight and 0-dim loss by name.
        """
        return {"reconstruction": (1.0, self._reconstruction_error(output, valid))}

    def forward(self, inputs: Tensor) -> FeatureHostOutput:
        """Decompose clips into slots.

        Args:
            inputs: frames `(B, T, 3, H, W)`, normalised for the backbone (or as the data module says, once a Trainer
                knows it); or their cached features `(B, T, N, F)`.

        Returns:
            Slots, attention, reconstruction and object masks.

        Raises:
            ShapeError: `inputs` has other axes, or the patches are not on the grid.
            ConfigError: Frames came and there is no backbone.
        """
        if inputs.ndim not in (4, 5):
            raise ShapeError(
                "Expected argument `inputs` to be frames (B, T, 3, H, W) or cached features (B, T, N, F), but got "
                f"{tuple(inputs.shape)}. Use T = 1 for images."
            )
        clips = inputs.shape[:2]
        items = inputs if self.is_video else inputs.flatten(0, 1)
        encoded = self.encoder(items)
        processed = self.processor(self.initializer(len(items)), encoded["features"])
        decoded = self.decoder(processed["slots"])
        if not self.is_video:
            encoded, processed, decoded = (
                {name: value.unflatten(0, clips) for name, value in part.items()}
                for part in (encoded, processed, decoded)
            )
        return FeatureHostOutput(
            processed["slots"],
            processed["dots"],
            self.grid,
            decoded["reconstruction"],
            decoded["dots"].unflatten(-1, self.grid),
            encoded["backbone_features"],
            encoded["similarity_features"],
        )

    def setup(self, stage: str) -> None:
        """Take over from the data module how frames are normalised and what its masks are.

        Args:
            stage: `"fit"`, `"validate"`, `"test"` or `"predict"`.
        """
        super().setup(stage)
        data = getattr(self.trainer, "datamodule", None)
        mean, std = getattr(data, "mean", None), getattr(data, "std", None)
        for encoder in self.encoder.modules():  # it may be wrapped, over time or by torch.compile
            if isinstance(encoder, FeatureEncoder):
                known = mean is not None and std is not None
                encoder.frame_mean, encoder.frame_std = (mean, std) if known else (None, None)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Train on a batch.

        Args:
            batch: holds `features` or `video`; with both, the backbone is not run.
            batch_idx: number of the batch in the epoch.

        Returns:
            Weighted sum of the losses, 0-dim.
        """
        _, parts, loss = self._step(batch)
        size = len(self._inputs(batch))
        if len(parts) > 1:
            self.log_dict({f"train/{name}": part for name, part in parts.items()}, batch_size=size)
        self.log("train/loss", loss, prog_bar=True, batch_size=size)
        return loss

    def segment(self, batch: Mapping[str, Any]) -> Tensor:
        """Decompose a batch.

        Args:
            batch: holds `features` or `video`.

        Returns:
            Object-mask probabilities `(B, T, S, h, w)` on the grid of patches.
        """
        output: FeatureHostOutput = self(self._inputs(batch))
        return output.mask_logits.softmax(dim=2)

    def evaluate(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Decompose a batch and say how well it is explained.

        Args:
            batch: holds `features` or `video`.

        Returns:
            Object-mask probabilities `(B, T, S, h, w)` on the grid of patches, and the loss.
        """
        output, _, loss = self._step(batch)
        return output.mask_logits.softmax(dim=2), loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam with linear warm-up and exponential decay.

        Returns:
            Lightning's optimizer dictionary.

        Raises:
            ConfigError: the training has no end and the decay needs one, or a setting is out of range.
        """
        steps = self.trainer.estimated_stepping_batches
        factor = exponential_for(steps, self.warmup_steps, self.decay_steps, self.decay_rate)
        return self.adam(self.learning_rate, factor)

    def _inputs(self, batch: Mapping[str, Any]) -> Tensor:
        for name in ("features", "video"):
            if isinstance(batch.get(name), Tensor):
                return batch[name]
        raise ConfigError(
            f"Expected key `features` or `video` in the batch, but got the keys {sorted(batch)}. Use "
            "ShardDataModule or a data module that gives one of them."
        )

    def _step(self, batch: Mapping[str, Any]) -> tuple[FeatureHostOutput, dict[str, Tensor], Tensor]:
        output: FeatureHostOutput = self(self._inputs(batch))
        weighted = self.losses(output, frame_validity(batch))
        total = torch.stack([weight * loss for weight, loss in weighted.values()]).sum()
        return output, {name: loss for name, (_, loss) in weighted.items()}, total

    def _reconstruction_error(self, output: FeatureHostOutput, valid: Tensor) -> Tensor:
        channels = output.targets.shape[-1]
        rebuilt = output.reconstruction[..., :channels]
        error = rebuilt.to(compute_dtype(rebuilt.dtype)) - output.targets
        return mean_over_frames(error.square().mean(dim=(2, 3)), valid)


def build_slots(kind: str, num_slots: int, slot_dim: int, initial_std: float | None) -> nn.Module:
    """Build the module that makes the first slots of a clip.

    Args:
        kind: `"gaussian"` or `"learned"`.
        num_slots: number S of slots.
        slot_dim: size D of a slot.
        initial_std: spread of the slots at the start of the training; None for `slot_dim ** -0.5`, as published.

    Returns:
        `GaussianSlots` or `LearnedSlots`.

    Raises:
        ConfigError: `kind` is unknown or a number is out of range.

    Example:
        >>> build_slots("learned", 4, 16, None)(2).shape
        torch.Size([2, 4, 16])
    """
    if num_slots < 1 or slot_dim < 1:
        raise ConfigError(
            f"Expected arguments `num_slots` and `slot_dim` to be at least 1, but got {num_slots} and {slot_dim}. "
            "Use 8 and 64."
        )
    kinds = {"gaussian": GaussianSlots, "learned": LearnedSlots}
    if kind not in kinds:
        raise ConfigError(f"Expected argument `slot_init` to be 'gaussian' or 'learned', but got {kind!r}. Choose one.")
    return kinds[kind](num_slots, slot_dim, slot_dim**-0.5 if initial_std is None else initial_std)


def build_patch_decoder(
    kind: str,
    slot_dim: int,
    output_dim: int,
    hidden: Sequence[int],
    patches: int,
    mixer_blocks: int,
    mixer_heads: int,
    memory_efficient: bool = True,
) -> nn.Module:
    """Build a decoder from a host's options.

    Args:
        kind: `"mlp"` or `"mixer"`.
        slot_dim: size D of a slot.
        output_dim: channels of a reconstructed patch.
        hidden: sizes of the hidden layers.
        patches: number N of patches.
        mixer_blocks: blocks of the mixer's allocator.
        mixer_heads: heads of the mixer's allocator.
        memory_efficient: of `MLPDecoder`; a mixer makes nothing for each pair of slot and patch but masks.

    Returns:
        `MLPDecoder` or `SlotMixerDecoder`.

    Raises:
        ConfigError: `kind` is unknown or a size is out of range.

    Example:
        >>> build_patch_decoder("mlp", 16, 8, [32], 9, 2, 4)(torch.zeros(1, 3, 16))["masks"].shape
        torch.Size([1, 3, 9])
    """
    if kind == "mlp":
        return MLPDecoder(slot_dim, output_dim, hidden, patches, memory_efficient)
    if kind == "mixer":
        return SlotMixerDecoder(slot_dim, output_dim, hidden, patches, mixer_blocks, mixer_heads)
    raise ConfigError(f"Expected argument `decoder` to be 'mlp' or 'mixer', but got {kind!r}. Choose one.")


def _init_corrector(corrector: SlotCorrector, kind: str, sharpness: float) -> None:
    if kind not in ("default", "kmeans"):
        raise ConfigError(
            f"Expected argument `corrector_init` to be 'default' or 'kmeans', but got {kind!r}. Choose one."
        )
    if kind == "kmeans":
        init_soft_kmeans_(corrector, sharpness)
    elif sharpness != DEFAULT_SHARPNESS:
        raise ConfigError(
            "Expected argument `corrector_sharpness` only with corrector_init='kmeans', but got "
            f"{sharpness} with {kind!r}. Leave it out, or set corrector_init='kmeans'."
        )


def _init_layers(encoder: FeatureEncoder, decoder: nn.Module, kind: str) -> None:
    if kind not in ("default", "fan_in"):
        raise ConfigError(f"Expected argument `init` to be 'default' or 'fan_in', but got {kind!r}. Choose one.")
    if kind == "default":
        return
    candidates = (encoder.output_transform, decoder.mlp if isinstance(decoder, MLPDecoder) else None)
    stacks = [stack for stack in candidates if stack is not None]
    if not stacks:
        raise ConfigError(
            "Expected init='fan_in' with an encoder MLP (`encoder_hidden` above 0) or with decoder='mlp', but there is "
            "neither. Leave `init` out."
        )
    for stack in stacks:
        init_fan_in_(stack)
