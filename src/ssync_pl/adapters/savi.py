"""Adapter of this package's SAVi (and of hosts that keep its contract)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from ssync_pl.adapters.base import HostAdapter, maps_on_common_grid, register_adapter, stack_frames
from ssync_pl.adapters.capture import Capture, submodule
from ssync_pl.method.maps import SSyncMaps

__all__ = ["SaviAdapter"]


@register_adapter
class SaviAdapter(HostAdapter):
    """`ssync_pl.hosts.SAVi`: ``corrector`` once a frame, ``decoder`` once a clip.

    The corrector returns ``logits`` ``(B, S, N)``, the decoder ``mask_logits`` ``(B, T, S, h, w)``. Where the decoder's
    grid is finer or coarser, the finer map is averaged to the coarser grid: probabilities stay probabilities.

    Example:
        >>> SaviAdapter().match(nn.Identity())
        False
    """

    name: ClassVar[str] = "savi"

    def match(self, host: nn.Module) -> bool:
        """Whether the host keeps SAVi's contract.

        Args:
            host: The model that is trained.

        Returns:
            True for `ssync_pl.hosts.SAVi` and its subclasses.

        Example:
            >>> SaviAdapter().match(nn.Identity())
            False
        """
        return any(cls.__name__ == "SAVi" and cls.__module__.startswith("ssync_pl.hosts") for cls in type(host).__mro__)

    def attach(self, host: nn.Module) -> Capture:
        """Listen to corrector and decoder.

        Args:
            host: The model that is trained.

        Returns:
            A closed capture.

        Example:
            >>> from ssync_pl.hosts import SAVi
            >>> SaviAdapter().attach(SAVi()).silent
            ['corrector', 'encoder', 'decoder']
        """
        capture = Capture()
        capture.watch("corrector", submodule(host, "corrector"), _logits)
        capture.watch("encoder", submodule(host, "encoder"), _grid)
        capture.watch("decoder", submodule(host, "decoder"), _mask_logits)
        return capture

    def collect(self, capture: Capture, batch: Any = None) -> SSyncMaps:
        """Bring both maps to one grid.

        Args:
            capture: Filled by one training step.
            batch: Not needed.

        Returns:
            The maps.

        Raises:
            HostError: The two grids do not divide each other.

        Example:
            >>> import torch
            >>> from ssync_pl.hosts import SAVi
            >>> host = SAVi(num_slots=3, encoder_strides=(2, 2, 2, 1))
            >>> adapter = SaviAdapter()
            >>> capture = adapter.attach(host)
            >>> capture.open()
            >>> _ = host(torch.zeros(1, 2, 3, 64, 64))
            >>> adapter.collect(capture).shape
            (1, 2, 3, 64)
        """
        attention = stack_frames(capture["corrector"], "corrector")
        return maps_on_common_grid(attention, capture.only("encoder"), capture.only("decoder"))


def _logits(module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor:
    return output.logits


def _mask_logits(module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor:
    return output.mask_logits


def _grid(module: nn.Module, args: tuple[Any, ...], output: Any) -> tuple[int, int]:
    return output[1]
