"""STEVE, SLATE and their kin: hosts that are recognised in order to say why they cannot be used as they are."""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn

from torch import nn

from ssync_pl.adapters.base import HostAdapter, register_adapter
from ssync_pl.adapters.capture import Capture
from ssync_pl.adapters.slots_only import has_modules
from ssync_pl.errors import HostError
from ssync_pl.method.maps import SSyncMaps

__all__ = ["AutoregressiveAdapter", "refuse_autoregressive"]

_CROSS_ATTENTION = "encoder_decoder_attn"
_ONCE_A_FRAME = ("slot_attention", "slot_attn")
_ALL_FRAMES = ("steve_encoder.savi",)


@register_adapter
class AutoregressiveAdapter(HostAdapter):
    """Recognises STEVE and SLATE, and refuses them with the way out.

    Their decoder is a transformer that predicts the tokens of a discrete autoencoder one after another: it draws no
    object masks, so there is no second map for the slot attention to be compared with.

    Example:
        >>> AutoregressiveAdapter().match(nn.Identity())
        False

    Source: SLATE (arXiv 2110.11405), STEVE (arXiv 2205.14065).
    """

    name: ClassVar[str] = "autoregressive"

    def match(self, host: nn.Module) -> bool:
        """Whether the host has a discrete autoencoder, slot attention, and a transformer that attends to slots.

        Args:
            host: The model that is trained.

        Returns:
            True by structure; names of classes do not matter.

        Example:
            >>> AutoregressiveAdapter().match(nn.Linear(1, 1))
            False
        """
        return has_modules(host, "dvae") and _slot_attention(host) is not None and bool(_cross_attention(host))

    def attach(self, host: nn.Module) -> Capture:
        """Refuse the host.

        Args:
            host: The model that is trained.

        Returns:
            Never.

        Raises:
            HostError: Always; the message says what would be needed.

        Example:
            >>> AutoregressiveAdapter().attach(nn.Identity())  # doctest: +ELLIPSIS
            Traceback (most recent call last):
                ...
            ssync_pl.errors.HostError: Expected a host whose decoder draws object masks, but Identity predicts ...
        """
        layers = _cross_attention(host)
        refuse_autoregressive(host, _slot_attention(host), layers[-1] if layers else None)

    def collect(self, capture: Capture, batch: Any = None) -> SSyncMaps:
        """Refuse the host; `attach` does so before.

        Args:
            capture: Not needed.
            batch: Not needed.

        Returns:
            Never.

        Raises:
            HostError: Always.

        Example:
            >>> AutoregressiveAdapter().collect(Capture())  # doctest: +ELLIPSIS
            Traceback (most recent call last):
                ...
            ssync_pl.errors.HostError: Expected a host whose decoder draws object masks, but the host predicts ...
        """
        refuse_autoregressive(None)


def refuse_autoregressive(
    host: nn.Module | None, attention: str | None = None, cross_attention: str | None = None
) -> NoReturn:
    """Say why a host with an autoregressive decoder cannot be used, and how its cross-attention can.

    Args:
        host: The model that is trained.
        attention: Path of its slot attention, where it is known.
        cross_attention: Path of a layer in which tokens attend to slots, where it is known.

    Raises:
        HostError: Always.

    Example:
        >>> refuse_autoregressive(nn.Identity())  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ssync_pl.errors.HostError: Expected a host whose decoder draws object masks, but Identity predicts tokens ...
    """
    name = "the host" if host is None else type(host).__name__
    masks = f"masks='softmax:{cross_attention or 'path.of.cross_attention'}'"
    if attention in _ALL_FRAMES:
        where = (
            f"Its slot attention '{attention}' runs once for all frames: call an nn.Identity of your own with the "
            "attention logits (B, S, N) of each frame's last iteration, and name it: SSyncCallback("
            f"attention='path.of.your_identity', attention_kind='logits', {masks})"
        )
    else:
        where = f"Name both maps: SSyncCallback(attention='softmax:{attention or 'path.of.slot_attention'}', {masks})"
    raise HostError(
        f"Expected a host whose decoder draws object masks, but {name} predicts tokens with a transformer, as STEVE "
        "and SLATE do, and has none. Its cross-attention, a softmax over slots for each token, can take their place. "
        f"{where}, or the same with attach(model, ...). 'softmax:' reads what a module feeds to its last softmax over "
        "slots in each call."
    )


def _slot_attention(host: nn.Module) -> str | None:
    return next((path for path in (*_ONCE_A_FRAME, *_ALL_FRAMES) if has_modules(host, path)), None)


def _cross_attention(host: nn.Module) -> list[str]:
    return [name for name, _ in host.named_modules() if name.rsplit(".", 1)[-1] == _CROSS_ATTENTION]
