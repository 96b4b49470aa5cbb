"""Copies to CUDA that overlap with the step before: pinned memory, a side stream, two batches in flight."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor


class DevicePrefetcher:
    """Brings batches to a device one ahead of their use.

    On CUDA the copy of the next batch is queued on a stream of its own before the current batch is handed out, so it
    runs while the current step computes; the computing stream waits for an event, never the host. On a CPU batches pass
    through as they are. Copies only overlap from page-locked memory (`pin_memory`).

    Args:
        device: Where the batches go: dicts of tensors, lists of tensors and anything else.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Iterates over the same batches, their tensors on the device."""
        if self.device.type != "cuda":
            yield from batches
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        ahead = self._copy(next(batches, None))
        while ahead is not None:
            batch, copied = ahead
            ahead = self._copy(next(batches, None))
            computing = torch.cuda.current_stream(self.device)
            computing.wait_event(copied)
            # The allocator must not hand the memory out again before the computing stream is done with it.
            apply_to_collection(batch, Tensor, Tensor.record_stream, computing)
            yield batch

    def _copy(self, batch: dict[str, Any] | None) -> tuple[dict[str, Any], torch.cuda.Event] | None:
        if batch is None or self._stream is None:
            return None
        with torch.cuda.stream(self._stream):
            return move_data_to_device(batch, self.device), self._stream.record_event()
