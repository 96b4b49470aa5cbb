"""Public checkpoints of VideoSAUR, SlotContrast, SRL and SSync for the hosts of this package."""

import io
import os
import pathlib
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml

from ssync_pl.data.files import load_tensors, write_bytes
from ssync_pl.errors import require

_DROPPED = ("projector.", "projector2.")


def public_globals() -> AbstractContextManager[Any]:
    """Lets `torch.load(weights_only=True)` read files in which an old Lightning left the path of a folder."""
    if not hasattr(torch.serialization, "get_unsafe_globals_in_checkpoint"):  # torch before 2.6: they are refused
        return nullcontext()
    # Files name the place where the writer's Python had the class. The pure class does on any system, without a disk.
    names: Any = [(pathlib.PurePosixPath, f"pathlib.{name}") for name in ("PosixPath", "_local.PosixPath")]
    return torch.serialization.safe_globals(names)


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a file of Lightning, a bare state dict of PyTorch, or `.safetensors`; nothing in it is executed.

    Returns `state_dict`, the tensors by name, with `epoch` and `global_step`, which are 0 where the file has none.
    """
    path = Path(path)
    with public_globals():
        content = load_tensors(path)
    whole = content if isinstance(content, Mapping) else {}
    state = whole.get("state_dict", whole)
    known = isinstance(state, Mapping) and len(state) > 0
    require(known, f"{str(path)!r} to hold a state dict", type(content).__name__)
    strange = [str(name) for name, value in state.items() if not (isinstance(name, str) and torch.is_tensor(value))]
    require(not strange, f"{str(path)!r} to hold tensors by name", f"{', '.join(strange[:4])}, which are none")
    size, most = sum(value.numel() * value.element_size() for value in state.values()), 8 * path.stat().st_size
    require(size <= most, f"the tensors of {str(path)!r} to take at most {most} bytes, 8 times the file", size)
    steps = {name: whole.get(name) for name in ("epoch", "global_step")}
    counted = {name: value if isinstance(value, int) else 0 for name, value in steps.items()}
    return {"state_dict": dict(state), **counted}


def convert_checkpoint(
    path: str | os.PathLike[str], out: str | os.PathLike[str], config: Mapping[str, Any] | None = None
) -> list[str]:
    """Turns a public checkpoint into one that `--ckpt_path` takes, beside the converted configuration.

    It keeps the tensors of the model and its backbone, the epoch and the step; it leaves out the state of the optimizer
    and the parts of SRL that no host has, whose names it returns. The host loads it strictly. A converted `config`
    goes beside it as a new `config.yaml`, with which `validate`, `test` and `predict` need no other.
    """
    import lightning.pytorch as L

    beside, model = Path(out).parent / "config.yaml", (config or {}).get("model")
    ours = isinstance(model, Mapping) and "class_path" in model
    fits, got = config is None or (ours and not beside.exists()), str(beside) if ours else "another file"
    require(fits, "--config of `ssync-pl config convert`, and no config.yaml in OUT's folder yet", got)
    content = read_checkpoint(path)
    state = content["state_dict"]
    content["state_dict"] = {name: value.clone() for name, value in state.items() if not name.startswith(_DROPPED)}
    buffer = io.BytesIO()
    torch.save({**content, "pytorch-lightning_version": L.__version__}, buffer)
    write_bytes(Path(out), buffer.getvalue())
    if config is not None and model is not None:
        options = {**model.get("init_args", {}), "backbone_weights": "none"}  # the checkpoint has them
        text = yaml.safe_dump({**config, "model": {**model, "init_args": options}}, sort_keys=False)
        write_bytes(beside, text.encode("utf-8"))
    return [name for name in state if name.startswith(_DROPPED)]
