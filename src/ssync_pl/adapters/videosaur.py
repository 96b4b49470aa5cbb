"""Spec of the VideoSAUR family: VideoSAUR, SlotContrast and the forks that keep their modules."""

import warnings
from typing import Any, ClassVar

from torch import nn

from ssync_pl.adapters.base import register_adapter
from ssync_pl.adapters.calls import MapCall, watch_softmax
from ssync_pl.adapters.capture import Capture, has_modules, submodule
from ssync_pl.adapters.grids import patch_stride
from ssync_pl.adapters.slot_model import GridAdapter

_CORRECTORS = ("processor.module.corrector", "processor.corrector")
_DECODERS = ("decoder.module", "decoder")
_OWN_LOSSES = ("loss_grp2deccls", "loss_dec2grpcls")


@register_adapter
class VideosaurAdapter(GridAdapter):
    """Hosts with ``processor[.module].corrector`` and ``decoder[.module]``, for videos and for images (T = 1).

    These are VideoSAUR with its SAVi, SAVi++ and DINOSAUR configurations, SlotContrast, SRL, SlotCurri, and SSync's own
    code, whose two losses should be off then: a warning says so. Decoders: an ``mlp`` per slot, a slot mixer, a spatial
    broadcast decoder, this package's.

    Source: VideoSAUR (arXiv 2306.04829), SlotContrast (arXiv 2412.14295).
    """

    name: ClassVar[str] = "videosaur"
    attention, decoder = "corrector", "decoder"

    def match(self, host: nn.Module) -> bool:
        return _corrector(host) is not None and _decoder(host) is not None

    def needs(self) -> str:
        return (
            f"a corrector with `to_q`, `to_k` and `scale` at {' or '.join(map(repr, _CORRECTORS))} and a decoder with "
            f"object masks at {' or '.join(map(repr, _DECODERS))}"
        )

    def listen(self, host: Any, capture: Capture) -> None:
        losses, name = getattr(host, "loss_fns", None), type(host).__name__
        own = ", ".join(one for one in _OWN_LOSSES if isinstance(losses, nn.ModuleDict) and one in losses)
        if own:
            warnings.warn(f"{name} has SSync's losses itself ({own}): weigh them 0, or they count twice.", stacklevel=2)
        corrector, decoder = _corrector(host), _decoder(host)
        capture.facts["patch_size"] = patch_stride(getattr(host, "encoder", None))
        capture.facts["grid"] = _stated_grid(host)
        for key, module, axis in (("corrector", corrector, -2), ("decoder", decoder, None)):
            if getattr(module, "returns_logits", False):
                capture.watch(key, module, lambda module, args, output: MapCall(output["dots"]))
            else:
                watch_softmax(capture, key, module, axis)


def _corrector(host: nn.Module) -> Any:
    found = (submodule(host, path) for path in _CORRECTORS if has_modules(host, path))
    return next((module for module in found if _projects(module)), None)


def _decoder(host: nn.Module) -> Any:
    found = (submodule(host, path) for path in _DECODERS if has_modules(host, path))
    kinds = (("mlp",), ("backbone", "output_transform"))
    return next((one for one in found if _projects(one) or any(has_modules(one, *kind) for kind in kinds)), None)


def _projects(module: nn.Module) -> bool:
    """A corrector and a slot mixer are alike: both compare what two projections give."""
    return has_modules(module, "to_q", "to_k") and hasattr(module, "scale")


def _stated_grid(host: nn.Module) -> tuple[int, int] | None:
    """The grid that a host states itself: cached features come without frames that it could follow from."""
    grid = getattr(host, "grid", None)
    if isinstance(grid, (tuple, list)) and len(grid) == 2 and all(isinstance(side, int) for side in grid):
        return grid[0], grid[1]
    return None
