"""Weights of backbones from files: PyTorch's or safetensors' format, bare or inside a host's checkpoint."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ssync_pl.errors import ConfigError

if TYPE_CHECKING:
    from ssync_pl.hosts.nn.backbones import FrozenBackbone

__all__ = ["fill_backbone", "read_state"]

_WRAPPERS = ("state_dict", "model", "state_dict_ema", "model_ema", "teacher", "module")


def read_state(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read named tensors from a file; nothing in it is executed.

    Args:
        path: `.safetensors`, or any name for a file of `torch.save` that holds a state dict, bare or under one of the
            usual names (`state_dict`, `model`, `teacher`, …).

    Returns:
        Name → tensor on CPU.

    Raises:
        ConfigError: There is no such file, it is damaged, or it holds other things than tensors.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(prefix="ssync-doctest-")) / "a.pth"
        >>> torch.save({"state_dict": {"weight": torch.ones(2)}}, path)
        >>> read_state(path)
        {'weight': tensor([1., 1.])}
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"Expected argument `checkpoint` to be a file of weights, but {str(path)!r} is none.")
    try:
        if path.suffix == ".safetensors":
            state: Any = importlib.import_module("safetensors.torch").load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ConfigError(
            f"Expected {str(path)!r} to be weights in PyTorch's or safetensors' format, but reading failed "
            f"({type(error).__name__}: {str(error).splitlines()[0]}). Files that hold more than tensors are refused: "
            "save the state dict alone."
        ) from error
    for wrapper in _WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    tensors = (
        {str(key): value for key, value in state.items() if isinstance(value, Tensor)}
        if isinstance(state, dict)
        else {}
    )
    if not tensors:
        raise ConfigError(f"Expected {str(path)!r} to hold a state dict, but it holds no tensor by name.")
    return tensors


def fill_backbone(
    backbone: FrozenBackbone,
    state: dict[str, Tensor],
    source: str,
    adapt: Callable[[dict[str, Tensor], nn.Module], Mapping[str, Tensor]] | None = None,
) -> None:
    """Load the weights that a backbone needs; others in the file, such as a head, are left alone.

    Args:
        backbone: The backbone.
        state: Name → tensor. Names may share a prefix, as in the checkpoint of a host.
        source: Name of the file, for the message.
        adapt: Turns the published form of a file into the network's, for example by resizing position embeddings.

    Raises:
        ConfigError: A tensor is missing or has another shape.

    Example:
        >>> from ssync_pl.hosts.nn.backbones import FrozenBackbone
        >>> class Pixels(FrozenBackbone):
        ...     def grid_for(self, height, width):
        ...         return height, width
        ...
        ...     def extract(self, frames):
        ...         return self.model(frames.flatten(2).mT)
        >>> backbone = Pixels(nn.Linear(3, 1), name="a", layer="b", dim=1, mean=[0.5] * 3, std=[0.5] * 3)
        >>> fill_backbone(backbone, {"net.weight": torch.ones(1, 3), "net.bias": torch.ones(1)}, "a.pth")
        >>> backbone(torch.ones(1, 3, 1, 1)).features.item()
        4.0
    """
    ours = backbone.model.state_dict()
    state = _without_prefix(state, next(iter(ours)))
    if adapt is not None:
        state = dict(adapt(state, backbone.model))
    # Nets cut to their features write `stages_0` for `stages.0`.
    theirs = {key.replace(".", "_"): value for key, value in state.items()}
    found = {key: theirs[flat] for key in ours if (flat := key.replace(".", "_")) in theirs}
    missing = [key for key in ours if key not in found]
    wrong = [key for key, value in found.items() if value.shape != ours[key].shape]
    if missing or wrong:
        what = (
            f"{len(missing)} of {len(ours)} tensors are missing ({', '.join(missing[:3])}, …)"
            if missing
            else f"{wrong[0]} has shape {tuple(found[wrong[0]].shape)} instead of {tuple(ours[wrong[0]].shape)}"
        )
        raise ConfigError(f"Expected {source} to hold the weights of {backbone.name} ({backbone.layer}), but {what}.")
    backbone.load_state_dict({f"model.{key}": value for key, value in found.items()})


def _without_prefix(state: dict[str, Tensor], sentinel: str) -> dict[str, Tensor]:
    # A host's checkpoint holds its backbone under a path of its own.
    if sentinel in state:
        return state
    prefixes = {key[: -len(sentinel)] for key in state if key.endswith(f".{sentinel}")}
    if len(prefixes) != 1:
        return state
    prefix = prefixes.pop()
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
