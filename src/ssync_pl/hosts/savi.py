"""SAVi, a video host that learns objects from reconstructing frames (Kipf et al. 2022)."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ssync_pl.errors import choose, require, require_shape
from ssync_pl.hosts.evaluation import Evaluated, frame_validity, mean_over_frames
from ssync_pl.hosts.nn.initializers import ConditionedSlots, build_initializer, first_frame_hints
from ssync_pl.hosts.nn.pixels import ConvEncoder, DecoderOutput, SpatialBroadcastDecoder
from ssync_pl.hosts.nn.slot_attention import SlotAttention
from ssync_pl.hosts.nn.slot_transformer import SlotTransformer
from ssync_pl.hosts.training import Decay, SlotHost


class SAViOutput(NamedTuple):
    """What `SAVi.forward` returns.

    Args:
        slots: `(B, T, S, D)`, corrected by each frame.
        attention_logits: `(B, T, S, N)`, slot attention before the softmax over slots.
        attention_grid: `(h, w)` with `h * w = N`.
        reconstruction: `(B, T, 3, h', w')`, at the decoder's size.
        mask_logits: `(B, T, S, h', w')`, object masks before the softmax over slots.
    """

    slots: Tensor
    attention_logits: Tensor
    attention_grid: tuple[int, int]
    reconstruction: Tensor
    mask_logits: Tensor


class SAVi(SlotHost):
    """Slot Attention for Video with RGB reconstruction (Kipf et al. 2022), unconditional or conditioned.

    The defaults are SAVi-small for frames of 64x64, with a pre-norm predictor as in later work. Clip gradients in the
    Trainer: `gradient_clip_val=0.05`. Frames are compared, resized by area, at the decoder's size
    `decoder_broadcast * prod(strides)`. An image is a clip of one frame.

    Args:
        num_slots: number S of slots.
        slot_dim: size D of a slot.
        slot_init: first slots of a clip. `"gaussian"`: drawn at random; `"learned"`: one vector per slot; `"features"`:
            means of groups of alike patches in the first frame; `"boxes"`, `"centres"`: from the objects' masks in the
            first frame, which training batches must hold then.
        encoder_channels: output channels of each convolution.
        encoder_strides: stride of each convolution.
        encoder_kernel: size of the encoder's kernels, odd.
        encoder_mlp_hidden: hidden size of the MLP per patch.
        feature_dim: channels of a patch feature.
        position_scale: factor on the encoder's position embedding.
        iterations_first: slot-attention iterations on the first frame.
        iterations_later: iterations on each later frame.
        corrector_mlp_hidden: hidden size of slot attention's residual MLP; 0 for none.
        corrector_eps: added to the attention before it is normalised over patches.
        corrector_sharpness: spread of the initial query and key weights in units of `1 / sqrt(inputs)`; None is
            PyTorch's 0.58. Larger lets slots differ from the start.
        predictor_blocks: transformer blocks between frames; 0 carries slots over unchanged.
        predictor_heads: heads of each block.
        predictor_mlp_hidden: hidden size of each block's MLP.
        decoder_broadcast: `(h, w)` that slots are copied to.
        decoder_channels: output channels of each transposed convolution.
        decoder_strides: stride of each transposed convolution.
        decoder_kernel: size of the decoder's kernels, odd.
        decoder_position_std: with `init: fan_in`, standard deviation of the decoder's initial position weights.
        init: of the convolutions; `"fan_in"` keeps the signal's variance, with which small models learn objects.
        learning_rate: peak rate of Adam.
        warmup_steps: linear warm-up in optimizer steps.
        decay: `"cosine"` to 0, `"exponential"` (`0.5 ** (halvings * progress)`) or `"constant"`.
        halvings: how often `"exponential"` halves the rate over the training.
        has_background: channel 0 of `segmentations` is the background; the data module's own answer comes first.

    Raises:
        ConfigError: a size or option is out of range.

    Examples:
        >>> model = SAVi(num_slots=4, slot_dim=16, encoder_channels=(8,), encoder_strides=(2,), feature_dim=16,
        ...              decoder_broadcast=(4, 4), decoder_channels=(8,), decoder_strides=(2,))
        >>> out = model(torch.rand(2, 3, 3, 16, 16))
        >>> out.attention_logits.shape, out.attention_grid, out.mask_logits.shape
        (torch.Size([2, 3, 4, 64]), (8, 8), torch.Size([2, 3, 4, 8, 8]))
    """

    def __init__(
        self,
        num_slots: int = 11,
        slot_dim: int = 128,
        slot_init: Literal["gaussian", "learned", "features", "boxes", "centres"] = "gaussian",
        encoder_channels: tuple[int, ...] = (32, 32, 32, 32),
        encoder_strides: tuple[int, ...] = (1, 1, 1, 1),
        encoder_kernel: int = 5,
        encoder_mlp_hidden: int = 64,
        feature_dim: int = 32,
        position_scale: float = 1.0,
        iterations_first: int = 2,
        iterations_later: int = 1,
        corrector_mlp_hidden: int = 256,
        corrector_eps: float = 1e-8,
        corrector_sharpness: float | None = None,
        predictor_blocks: int = 1,
        predictor_heads: int = 4,
        predictor_mlp_hidden: int = 256,
        decoder_broadcast: tuple[int, int] = (8, 8),
        decoder_channels: tuple[int, ...] = (64, 64, 64, 64),
        decoder_strides: tuple[int, ...] = (2, 2, 2, 1),
        decoder_kernel: int = 5,
        decoder_position_std: float = 1.0,
        init: Literal["default", "fan_in"] = "default",
        learning_rate: float = 2e-4,
        warmup_steps: int = 2500,
        decay: Decay = "cosine",
        halvings: float = 3.0,
        has_background: bool = True,
    ) -> None:
        super().__init__(has_background)
        choose("slot_init", slot_init, "gaussian", "learned", "features", "boxes", "centres")
        expected = "arguments `num_slots`, `iterations_first` and `iterations_later` to be from 1 to 999,999"
        counts = (num_slots, iterations_first, iterations_later)
        require(1 <= min(counts) <= max(counts) < 1e6, expected, *counts, advice="Use 8, 2 and 1.")
        self.save_hyperparameters()
        self.slot_init = slot_init
        self.num_slots = num_slots
        self.carries_slots = True
        self.iterations_first = iterations_first
        self.iterations_later = iterations_later
        self.initializer = build_initializer(slot_init, num_slots, slot_dim, feature_dim)
        self.encoder = ConvEncoder(
            encoder_channels, encoder_strides, feature_dim, encoder_kernel, encoder_mlp_hidden, position_scale, init
        )
        self.corrector = SlotAttention(
            slot_dim, feature_dim, iterations_first, corrector_mlp_hidden, corrector_eps, corrector_sharpness
        )
        self.predictor = SlotTransformer(slot_dim, predictor_blocks, predictor_heads, predictor_mlp_hidden, False)
        shape = (decoder_channels, decoder_strides, decoder_broadcast, decoder_kernel)
        self.decoder = SpatialBroadcastDecoder(slot_dim, *shape, init, decoder_position_std)

    def forward(self, video: Tensor, conditioning: Tensor | None = None) -> SAViOutput:
        """Decompose a clip into slots."""
        require_shape(video.ndim == 5, "argument `video` to be (B, T, 3, H, W)", video)
        features, grid = self.encoder(video.flatten(0, 1))
        features = features.unflatten(0, video.shape[:2])
        wanted = "a tensor" if isinstance(self.initializer, ConditionedSlots) else "None"
        given = "None" if conditioning is None else "a tensor"
        expected = f"argument `conditioning` to be {wanted} with slot_init {self.slot_init!r}"
        require(wanted == given, expected, given, advice="Only slot_init 'boxes' and 'centres' take it.")
        state = self.initializer(features[:, 0] if conditioning is None else conditioning)
        slots, logits = [], []
        for frame in range(video.shape[1]):
            first = frame == 0
            state = state if first else self.predictor(state)
            bound = self.corrector(state, features[:, frame], self.iterations_first if first else self.iterations_later)
            state = bound.slots
            slots.append(bound.slots)
            logits.append(bound.logits)
        all_slots = torch.stack(slots, dim=1)
        decoded: DecoderOutput = self.decoder(all_slots)
        return SAViOutput(all_slots, torch.stack(logits, dim=1), grid, decoded.reconstruction, decoded.mask_logits)

    def _step(self, batch: Mapping[str, Any]) -> tuple[SAViOutput, Tensor]:
        """Run a batch; returns the output and the mean squared error over the frames that count."""
        video = batch["video"]
        out: SAViOutput = self(video, self._conditioning(batch))
        target = nn.functional.interpolate(video.flatten(0, 1), size=self.decoder.size, mode="area")
        target = target.unflatten(0, video.shape[:2])
        error = (out.reconstruction.float() - target.float()).square().mean(dim=(2, 3, 4))
        return out, mean_over_frames(error, frame_validity(batch))

    def _conditioning(self, batch: Mapping[str, Any]) -> Tensor | None:
        if not isinstance(self.initializer, ConditionedSlots):
            return None
        expected = f"key `segmentations` in the batch for slot_init {self.slot_init!r}"
        advice = "Set `masks_in_training: true` in the data module, or use slot_init 'gaussian'."
        require(batch.get("segmentations") is not None, expected, f"the keys {sorted(batch)}", advice=advice)
        kind: Any = self.slot_init
        background = self.evaluation.has_background
        return first_frame_hints(batch["segmentations"], self.num_slots, kind, has_background=background)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Reconstruct a batch that holds `video`, and `segmentations` too when conditioned; returns the error."""
        _, loss = self._step(batch)
        self.log("train/loss", loss, prog_bar=True, batch_size=batch["video"].shape[0])
        return loss

    def evaluate(self, batch: Mapping[str, Any]) -> Evaluated:
        """Decompose a batch and compare its reconstruction; masks are at the decoder's size."""
        out, loss = self._step(batch)
        return Evaluated(out.mask_logits.softmax(dim=2), loss, out.attention_logits.unflatten(-1, out.attention_grid))
