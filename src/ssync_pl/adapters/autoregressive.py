"""STEVE, SLATE and their kin: hosts that are recognised in order to say why they cannot be used as they are."""

from typing import Any, ClassVar

from torch import nn

from ssync_pl.adapters.base import HostAdapter, register_adapter
from ssync_pl.adapters.capture import Capture, has_modules
from ssync_pl.errors import HostError
from ssync_pl.method.maps import SSyncMaps

_ALL_FRAMES = "steve_encoder.savi"


@register_adapter
class AutoregressiveAdapter(HostAdapter):
    """Recognises STEVE and SLATE, and refuses them with the way out.

    Their decoder predicts the tokens of a discrete autoencoder one after another: it draws no object masks.

    Source: SLATE (arXiv 2110.11405), STEVE (arXiv 2205.14065).
    """

    name: ClassVar[str] = "autoregressive"

    def match(self, host: nn.Module) -> bool:
        return has_modules(host, "dvae") and _slot_attention(host) is not None and bool(_cross_attention(host))

    def attach(self, host: nn.Module) -> Capture:
        attention = _slot_attention(host) or "path.of.slot_attention"
        masks = f"masks='softmax:{(_cross_attention(host) or ['path.of.cross_attention'])[-1]}'"
        where = f"Name both maps: SSyncCallback(attention='softmax:{attention}', {masks})"
        if attention == _ALL_FRAMES:
            where = (
                f"As '{attention}' runs once for all frames, call an nn.Identity with the logits (B, S, N) of each "
                "frame's last iteration: SSyncCallback(attention='path.of.your_identity', "
                f"attention_kind='logits', {masks})"
            )
        raise HostError(
            f"Expected a host whose decoder draws object masks, but {type(host).__name__} predicts tokens with a "
            f"transformer; its cross-attention can take their place. {where}, or the same with attach(model, ...)."
        )

    def collect(self, capture: Capture, batch: Any = None) -> SSyncMaps:
        raise HostError("Expected a host whose decoder draws object masks, but this one predicts tokens.")


def _slot_attention(host: nn.Module) -> str | None:
    return next((path for path in ("slot_attention", "slot_attn", _ALL_FRAMES) if has_modules(host, path)), None)


def _cross_attention(host: nn.Module) -> list[str]:
    return [name for name, _ in host.named_modules() if name.rsplit(".", 1)[-1] == "encoder_decoder_attn"]
