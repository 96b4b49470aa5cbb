"""SlotContrast, VideoSAUR's architecture with slots that are told apart over time (Manasyan et al. 2025)."""

from __future__ import annotations

from typing import Any, Literal

from ssync_pl.hosts.videosaur import VideoSAUR

__all__ = ["SlotContrast"]


class SlotContrast(VideoSAUR):
    """SlotContrast (arXiv 2412.14295): feature reconstruction and slot-slot contrast.

    The architecture and all options are those of `VideoSAUR`, with the defaults that were published for SlotContrast:
    learned first slots, a residual MLP in slot attention, an MLP decoder, the contrastive loss instead of the
    similarity loss. SSync was published on this host. Clip gradients in the Trainer: `gradient_clip_val=0.05`.

    Args:
        slot_dim: size D of a slot.
        slot_init: first slots of a clip: `"learned"` or `"gaussian"`.
        corrector_mlp_hidden: hidden size of slot attention's residual MLP; None for `4 * slot_dim`, 0 for none.
        decoder: `"mlp"` or `"mixer"`.
        similarity_weight: weight of VideoSAUR's similarity loss.
        contrast_weight: weight of the slot-slot contrastive loss.
        **options: All other options of `VideoSAUR`.

    Raises:
        ConfigError: a size or option is out of range, options contradict each other, or the backbone cannot be built.

    Example:
        >>> import torch
        >>> options = {"backbone": None, "feature_dim": 24, "grid": (3, 5), "decoder_hidden": (32,)}
        >>> model = SlotContrast(num_slots=4, slot_dim=16, **options)
        >>> out = model(torch.randn(2, 3, 15, 24))
        >>> out.slots.shape, out.mask_logits.shape, out.reconstruction.shape
        (torch.Size([2, 3, 4, 16]), torch.Size([2, 3, 4, 3, 5]), torch.Size([2, 3, 15, 24]))
    """

    def __init__(
        self,
        slot_dim: int = 64,
        slot_init: Literal["gaussian", "learned"] = "learned",
        corrector_mlp_hidden: int | None = None,
        decoder: Literal["mlp", "mixer"] = "mlp",
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
