"""What of a host the maps' gradient reaches, and what SSync costs beside it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from ssync_pl.method.loss import SSyncOutput, ssync_loss
from ssync_pl.method.maps import SSyncMaps
from ssync_pl.tools.doctor.report import CostReport, MapReport

__all__ = ["map_report", "measure_cost"]

# Of the method: both maps are read, and softmax, labels and both gradients are kept, 28 bytes an entry.
_BYTES_AN_ENTRY = 28
_REPEATS = 5
_PATIENCE_SECONDS = 10.0


def map_report(host: nn.Module, maps: SSyncMaps, side: str, places: tuple[str, ...], output: SSyncOutput) -> MapReport:
    """Describe one of two maps."""
    field = "attention" if side == "attention" else "mask"
    logits, probs = getattr(maps, f"{field}_logits"), getattr(maps, f"{field}_probs")
    value = maps.attention if side == "attention" else maps.masks
    distribution = value.float().softmax(2) if probs is None else value.float()
    sums = distribution.detach().sum(2)
    if maps.patch_valid is not None:
        sums = sums[maps.patch_valid]
    parameters = _reached(host, distribution)
    used = output.used_encoder_slots if side == "attention" else output.used_decoder_slots
    return MapReport(
        side=side,
        places=places,
        kind="+".join(kind for kind, given in (("logits", logits), ("probs", probs)) if given is not None),
        sums=(float(sums.min()), float(sums.max())),
        parameters=len(parameters),
        reaches=_modules(host, parameters),
        used_slots=float(used.mean()),
    )


def _reached(host: nn.Module, value: Tensor) -> list[str]:
    named = [(name, parameter) for name, parameter in host.named_parameters() if parameter.requires_grad]
    if not named or not value.requires_grad:
        return []
    # Any function of the map will do that is not constant over slots.
    weights = torch.linspace(-1, 1, value.shape[2], device=value.device)[:, None]
    objective = (value * weights).nan_to_num().square().sum()
    gradients = torch.autograd.grad(objective, [p for _, p in named], allow_unused=True, retain_graph=True)
    return [name for (name, _), gradient in zip(named, gradients, strict=True) if gradient is not None]


def _modules(host: nn.Module, names: Iterable[str]) -> tuple[str, ...]:
    everywhere = [name.split(".") for name, _ in host.named_parameters()]
    depth = 1
    # The one child of a wrapper says nothing.
    while len({tuple(parts[:depth]) for parts in everywhere}) == 1 and all(len(parts) > depth for parts in everywhere):
        depth += 1
    return tuple(dict.fromkeys(".".join(name.split(".")[:depth]) for name in names))


def measure_cost(maps: SSyncMaps, host: nn.Module, run: Callable[[], Tensor | None]) -> CostReport:
    """Time SSync on maps of these shapes, and the host's own step."""
    device = maps.attention.device
    leaves = {
        name: value.detach().requires_grad_()
        for name in ("attention_logits", "attention_probs", "mask_logits", "mask_probs")
        if (value := getattr(maps, name)) is not None
    }
    alone = replace(maps, **leaves)
    trained = [alone.attention, alone.masks]
    parameters = [parameter for parameter in host.parameters() if parameter.requires_grad]

    def block() -> None:
        torch.autograd.grad(ssync_loss(alone).loss, trained, allow_unused=True)

    def step() -> None:
        loss = run()
        if parameters and loss is not None and loss.requires_grad:
            torch.autograd.grad(loss, parameters, allow_unused=True)

    batch, frames, slots, patches = maps.shape
    return CostReport(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        ssync_seconds=_median_seconds(block, device),
        step_seconds=_median_seconds(step, device),
        bytes=_BYTES_AN_ENTRY * batch * frames * slots * patches,
    )


def _median_seconds(work: Callable[[], None], device: torch.device) -> float:
    first = _seconds(work, device)
    # A host whose step takes long is measured less often.
    repeats = max(1, min(_REPEATS, int(_PATIENCE_SECONDS / max(first, 1e-9))))
    return statistics.median(_seconds(work, device) for _ in range(repeats))


def _seconds(work: Callable[[], None], device: torch.device) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start
