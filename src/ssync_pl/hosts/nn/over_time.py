"""Modules for one frame, run over the frames of clips: all at once, or one after the other."""

import torch
from torch import Tensor, nn


class MapOverTime(nn.Module):
    """Runs a module, which returns a dict of tensors, on all frames `(B, T, ...)` of all clips at once."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        """Run the module on `(B * T, ...)` and give its results as `(B, T, ...)`."""
        outputs: dict[str, Tensor] = self.module(inputs.flatten(0, 1))
        return {name: value.unflatten(0, inputs.shape[:2]) for name, value in outputs.items()}


class SlotProcessor(nn.Module):
    """One step of the recurrence: predict the slots from the frame before, then correct them by this frame."""

    def __init__(
        self, corrector: nn.Module, predictor: nn.Module | None = None, iterations_first: int | None = None
    ) -> None:
        super().__init__()
        self.corrector = corrector
        self.predictor = predictor
        self.iterations_first = iterations_first

    def forward(self, slots: Tensor, features: Tensor, step: int = 0) -> dict[str, Tensor]:
        """Process frame `step` with features `(B, N, C)`, from initial slots or those of the frame before."""
        if step > 0 and self.predictor is not None:
            slots = self.predictor(slots)
        outputs: dict[str, Tensor] = self.corrector(slots, features, self.iterations_first if step == 0 else None)
        return outputs


class ScanOverTime(nn.Module):
    """Runs a processor frame by frame, handing the slots on."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, slots: Tensor, features: Tensor) -> dict[str, Tensor]:
        """Process clips: initial slots `(B, S, D)` and features `(B, T, N, C)` to results `(B, T, ...)`."""
        outputs: list[dict[str, Tensor]] = []
        for step, frame in enumerate(features.unbind(dim=1)):
            outputs.append(self.module(slots, frame, step))
            slots = outputs[-1]["slots"]
        return {name: torch.stack([output[name] for output in outputs], dim=1) for name in outputs[0]}
