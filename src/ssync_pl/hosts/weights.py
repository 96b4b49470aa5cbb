"""Files of weights, read without running or unpacking what is in them."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import torch

from ssync_pl.data.files import require_unpacked
from ssync_pl.errors import ConfigError


def load_tensors(path: str | os.PathLike[str]) -> Any:
    """Reads a file of PyTorch or safetensors; nothing in it is executed or unpacked. `ConfigError` if it cannot be."""
    require_unpacked(path, os.path.getsize(path) if os.path.exists(path) else 0)
    try:
        if Path(path).suffix == ".safetensors":
            return importlib.import_module("safetensors.torch").load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
        raise ConfigError(
            f"Expected {str(path)!r} to be a checkpoint of PyTorch or safetensors with tensors and plain values only, "
            f"but reading it failed ({reason}). Take another file; none is read in a way that could run what is in it."
        ) from error
