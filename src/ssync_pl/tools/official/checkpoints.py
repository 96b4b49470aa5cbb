"""Public checkpoints of VideoSAUR, SlotContrast, SRL and SSync for the hosts of this package."""

from __future__ import annotations

import importlib
import io
import os
import pathlib
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssync_pl.data.files import write_bytes
from ssync_pl.errors import ConfigError, require

__all__ = ["PublicCheckpoint", "convert_checkpoint", "public_globals", "read_checkpoint"]

_DROPPED = ("projector.", "projector2.")


class PublicCheckpoint(NamedTuple):
    """Tensors by name, and epochs and optimizer steps trained where the file says so."""

    state: dict[str, Tensor]
    epoch: int = 0
    global_step: int = 0


def public_globals() -> AbstractContextManager[None]:
    """Lets `torch.load(weights_only=True)` read files in which an old Lightning left the path of a folder."""
    allow: Any = getattr(torch.serialization, "safe_globals", None)
    if allow is None:  # torch 2.4: such files are refused
        return nullcontext()
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 6):
        plain: AbstractContextManager[None] = allow([pathlib.PosixPath])
        return plain
    # Python 3.13 moved the class, and files name the place where the writer's Python had it. The pure class does on any
    # system, and reaches no disk.
    names = ("pathlib.PosixPath", "pathlib._local.PosixPath")
    named: AbstractContextManager[None] = allow([(pathlib.PurePosixPath, name) for name in names])
    return named


def read_checkpoint(path: str | os.PathLike[str]) -> PublicCheckpoint:
    """Reads a file of Lightning, a bare state dict of PyTorch, or `.safetensors`; nothing in it is executed."""
    path = Path(path)
    require(path.is_file(), f"a checkpoint at {str(path)!r}", "no such file", advice="Correct the path.")
    try:
        if path.suffix == ".safetensors":
            content: Any = importlib.import_module("safetensors.torch").load_file(path)
        else:
            with public_globals():
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ConfigError(
            f"Expected {str(path)!r} to be a checkpoint of PyTorch or safetensors with tensors and plain values only, "
            f"but reading it failed ({type(error).__name__}). Take another file; none is read in a way that could run "
            "what is in it."
        ) from error
    whole = content if isinstance(content, Mapping) else {}
    state = whole.get("state_dict", whole)
    known = isinstance(state, Mapping) and len(state) > 0
    require(known, f"{str(path)!r} to hold a state dict", type(content).__name__)
    strange = [str(name) for name, value in state.items() if not (isinstance(name, str) and isinstance(value, Tensor))]
    require(not strange, f"{str(path)!r} to hold tensors by name", f"{', '.join(strange[:4])}, which are none")
    epoch, step = (value if isinstance(value, int) else 0 for value in (whole.get("epoch"), whole.get("global_step")))
    return PublicCheckpoint(dict(state), epoch, step)


def convert_checkpoint(path: str | os.PathLike[str], out: str | os.PathLike[str]) -> list[str]:
    """Turns a public checkpoint into one that `--ckpt_path` takes, beside the converted configuration.

    It keeps the tensors of the model with those of its backbone, so that nothing is downloaded, and the epoch and step;
    it leaves out the state of the optimizer and the parts of SRL that no host has, whose names it returns. The host
    loads it strictly.
    """
    import lightning.pytorch as L

    public = read_checkpoint(path)
    buffer = io.BytesIO()
    content = {
        "epoch": public.epoch,
        "global_step": public.global_step,
        "pytorch-lightning_version": L.__version__,
        "state_dict": {name: tensor.clone() for name, tensor in public.state.items() if not name.startswith(_DROPPED)},
    }
    torch.save(content, buffer)
    write_bytes(Path(out), buffer.getvalue())
    return [name for name in public.state if name.startswith(_DROPPED)]
