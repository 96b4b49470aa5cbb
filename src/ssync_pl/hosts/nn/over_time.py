"""Modules for one frame, run over the frames of clips: all at once, or one after the other."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

__all__ = ["MapOverTime", "ScanOverTime", "SlotProcessor"]


class MapOverTime(nn.Module):
    """Runs a module on all frames of all clips at once.

    Args:
        module: takes and returns tensors with a batch of frames in front; a dict of them may come out.

    Example:
        >>> MapOverTime(nn.Linear(4, 2))(torch.randn(3, 5, 7, 4)).shape
        torch.Size([3, 5, 7, 2])
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, inputs: Tensor) -> Tensor | dict[str, Tensor]:
        """Run the module.

        Args:
            inputs: `(B, T, ...)`.

        Returns:
            What the module gives for `(B * T, ...)`, as `(B, T, ...)`.
        """
        clips = inputs.shape[:2]
        outputs = self.module(inputs.flatten(0, 1))
        if isinstance(outputs, dict):
            return {name: value.unflatten(0, clips) for name, value in outputs.items()}
        return torch.as_tensor(outputs.unflatten(0, clips))


class SlotProcessor(nn.Module):
    """One step of the recurrence: predict the slots from the frame before, then correct them by this frame.

    Args:
        corrector: slot attention; takes slots, features and iterations, returns a dict with `slots`.
        predictor: takes and returns slots; None carries them over.
        iterations_first: iterations on the first frame; None leaves that to the corrector.

    Example:
        >>> from ssync_pl.hosts.nn.corrector import SlotCorrector
        >>> processor = SlotProcessor(SlotCorrector(8, 16), iterations_first=3)
        >>> processor(torch.randn(2, 4, 16), torch.randn(2, 25, 8))["slots"].shape
        torch.Size([2, 4, 16])
    """

    def __init__(
        self, corrector: nn.Module, predictor: nn.Module | None = None, iterations_first: int | None = None
    ) -> None:
        super().__init__()
        self.corrector = corrector
        self.predictor = predictor
        self.iterations_first = iterations_first

    def forward(self, slots: Tensor, features: Tensor, step: int = 0) -> dict[str, Tensor]:
        """Process one frame.

        Args:
            slots: `(B, S, D)`: initial ones at step 0, else those of the frame before.
            features: `(B, N, C)`.
            step: number of the frame in its clip, from 0.

        Returns:
            What the corrector gives.
        """
        if step > 0 and self.predictor is not None:
            slots = self.predictor(slots)
        outputs: dict[str, Tensor] = self.corrector(slots, features, self.iterations_first if step == 0 else None)
        return outputs


class ScanOverTime(nn.Module):
    """Runs a processor frame by frame, handing the slots on.

    Args:
        module: takes slots, features and the frame's number, returns a dict with `slots`.
        compiled: run the module by `torch.compile`. It is one graph on the first frame and one on later frames; hooks
            that come or go later are seen.

    Example:
        >>> from ssync_pl.hosts.nn.corrector import SlotCorrector
        >>> scan = ScanOverTime(SlotProcessor(SlotCorrector(8, 16)))
        >>> scan(torch.randn(2, 4, 16), torch.randn(2, 3, 25, 8))["masks"].shape
        torch.Size([2, 3, 4, 25])
    """

    def __init__(self, module: nn.Module, compiled: bool = False) -> None:
        super().__init__()
        self.module = module
        self.compiled = compiled
        if compiled:
            module.compile()

    def forward(self, slots: Tensor, features: Tensor) -> dict[str, Tensor]:
        """Process clips.

        Args:
            slots: `(B, S, D)`, initial.
            features: `(B, T, N, C)`.

        Returns:
            Everything the processor gives, stacked to `(B, T, ...)`.
        """
        outputs: list[dict[str, Tensor]] = []
        with _hook_guards() if self.compiled else contextlib.nullcontext():
            for step, frame in enumerate(features.unbind(dim=1)):
                outputs.append(self.module(slots, frame, step))
                slots = outputs[-1]["slots"]
        return {name: torch.stack([output[name] for output in outputs], dim=1) for name in outputs[0]}


def _hook_guards() -> contextlib.AbstractContextManager[None]:
    """Compile so that graphs know the hooks they contain: SSync's may be attached after the first step."""
    import torch._dynamo

    patch: contextlib.AbstractContextManager[None] = torch._dynamo.config.patch(skip_nnmodule_hook_guards=False)
    return patch
