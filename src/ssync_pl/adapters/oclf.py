"""Specs of the object-centric learning framework (OCLF), with which DINOSAUR and others are built, and of AdaSlot."""

from typing import Any, ClassVar

from torch import Tensor, nn

from ssync_pl.adapters.base import register_adapter
from ssync_pl.adapters.calls import MapCall, entry, watch_softmax
from ssync_pl.adapters.capture import NAME_THEM, Capture
from ssync_pl.adapters.grids import joint_heads, patch_stride
from ssync_pl.adapters.slot_model import GridAdapter
from ssync_pl.errors import HostError

_DECODERS = ("object_decoder", "decoder")
_SLOT_ATTENTION = ("to_q", "to_k", "to_v", "n_heads", "dims_per_head", "scale")


@register_adapter
class OclfAdapter(GridAdapter):
    """Hosts with ``models.perceptual_grouping[.module].slot_attention`` and ``models.object_decoder`` (or ``decoder``).

    Slot attention takes one softmax over slots and heads, merged by `joint_heads`, and runs once for images (T = 1) or
    once per frame. Slots that the host masks in a frame do not exist in the clip. Decoders have a ``decoder`` of their
    own and a softmax over slots; autoregressive ones, and those that render densities, are refused.

    Source: DINOSAUR (arXiv 2209.14860), SAVi (arXiv 2111.12594).
    """

    name: ClassVar[str] = "oclf"
    attention, decoder = "slot_attention", "decoder"
    decoder_calls = "frames"
    drops_slots: ClassVar[bool] = False
    """Whether slot attention decides which slots to keep, with a score network."""

    def match(self, host: nn.Module) -> bool:
        return self._slot_attention(host) is not None and _decoder(host) is not None

    def needs(self) -> str:
        score = ", `single_gumbel_score_network`" if self.drops_slots else ""
        return (
            f"slot attention at 'models.perceptual_grouping.slot_attention' (with {', '.join(_SLOT_ATTENTION)}{score}) "
            "and a decoder with a `decoder` of its own at 'models.object_decoder' or 'models.decoder'"
        )

    def listen(self, host: Any, capture: Capture) -> None:
        attention, decoder = self._slot_attention(host), _decoder(host)
        _refuse_without_masks(host, attention, decoder)
        capture.facts["patch_size"] = patch_stride(_child(_root(host), "feature_extractor"))
        capture.facts["heads"] = int(attention.n_heads)
        drops = self.drops_slots and getattr(decoder, "mask_type", None) != "none"
        watch_softmax(capture, "slot_attention", attention)
        capture.watch("exist", attention, _kept if drops else _present)
        if drops and decoder.mask_type == "logit":  # its softmax is fed the decision too, times 1e5
            capture.watch("decoder", decoder.decoder, _alpha)
        else:
            watch_softmax(capture, "decoder", decoder, axis=None)

    def calls(self, capture: Capture) -> tuple[list[MapCall], list[MapCall]]:
        calls, drawn = super().calls(capture)
        apart = [call.logits.unflatten(1, (-1, capture.facts["heads"])) for call in calls]  # type: ignore[union-attr]
        return [call._replace(logits=joint_heads(one, 2)) for call, one in zip(calls, apart, strict=True)], drawn

    def _slot_attention(self, host: nn.Module) -> Any:
        grouping = _inside(_child(_root(host), "perceptual_grouping"), "slot_attention")
        module = None if grouping is None else grouping.slot_attention
        if module is None or not all(hasattr(module, name) for name in _SLOT_ATTENTION):
            return None
        return module if (_child(module, "single_gumbel_score_network") is not None) == self.drops_slots else None


@register_adapter
class AdaSlotAdapter(OclfAdapter):
    """Hosts of `OclfAdapter` whose slot attention has a ``single_gumbel_score_network``, which drops slots per image.

    Dropped slots do not exist; an image that keeps none is left out. SSync gives no gradient to the decision itself.
    Where the decoder ignores the decision (``mask_type="none"``), so does this adapter.

    Source: AdaSlot (arXiv 2406.09196).
    """

    name: ClassVar[str] = "adaslot"
    drops_slots: ClassVar[bool] = True


def _present(module: Any, args: tuple[Any, ...], output: Any) -> Tensor | None:
    masked = args[2] if len(args) > 2 else None
    return ~masked.bool() if isinstance(masked, Tensor) else None


def _kept(module: Any, args: tuple[Any, ...], output: Any) -> Tensor:
    decided, present = entry("3")(module, output), _present(module, args, output)
    if decided.ndim != 2:
        name, given = type(module).__name__, tuple(decided.shape)
        raise HostError(f"Expected {name} to return decisions (B, S), but got decisions {given}. {NAME_THEM}")
    kept = decided.detach() > 0.5
    return kept if present is None else kept & present


def _alpha(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> MapCall:
    """The last channel of what is drawn for each slot, ``(B * S, N, C)`` or ``(B * S, C, h, w)``."""
    return MapCall(output.select(-1 if output.ndim == 3 else 1, -1), axis=0)


def _refuse_without_masks(host: nn.Module, attention: nn.Module, decoder: nn.Module) -> None:
    name = type(decoder).__name__
    if hasattr(decoder, "use_decoder_masks"):
        paths = {module: path for path, module in host.named_modules()}
        raise HostError(
            f"Expected {name} to draw object masks, but it predicts patches one after another. Build it with "
            "use_decoder_masks=True and a transformer with return_attention_weights=True, and name that attention: "
            f"SSyncCallback(attention='softmax:{paths[attention]}', masks='{paths[decoder]}:masks') (one head)."
        )
    if hasattr(decoder, "depth_positions"):
        raise HostError(f"Expected {name} to have an alpha channel, but it renders densities and detaches its masks.")


def _root(host: nn.Module) -> nn.Module:
    return _child(host, "models") or host


def _decoder(host: nn.Module) -> Any:
    found = (_inside(_child(_root(host), name), "decoder") for name in _DECODERS)
    return next((one for one in found if hasattr(one, "num_patches") or hasattr(one, "initial_conv_size")), None)


def _inside(module: nn.Module | None, name: str) -> Any:
    """The module with a child of that name, below wrappers that route inputs or go through time."""
    while module is not None and _child(module, name) is None:
        module = _child(module, "module")
    return module


def _child(module: nn.Module, name: str) -> nn.Module | None:
    # Not getattr: a ModuleDict has methods beside its children, and a host may compute attributes.
    return dict(module.named_children()).get(name)
