"""Public checkpoints of VideoSAUR, SlotContrast, SRL and SSync for the hosts of this package."""

from __future__ import annotations

import importlib
import os
import pathlib
import re
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssync_pl.errors import ConfigError, SSyncError
from ssync_pl.tools.official.interpolation import apply_changes, read_config
from ssync_pl.tools.official.model import translate_model
from ssync_pl.tools.official.sections import Findings, Section
from ssync_pl.tools.official.shapes import ReadHost, host_from_shapes

__all__ = [
    "ConvertedCheckpoint",
    "PublicCheckpoint",
    "convert_checkpoint",
    "public_globals",
    "read_checkpoint",
    "why_unreadable",
]


class PublicCheckpoint(NamedTuple):
    """What a public file holds.

    Attributes:
        state: Tensors by name.
        epoch: Epochs trained, where the file says so.
        global_step: Optimizer steps trained, where the file says so.

    Example:
        >>> PublicCheckpoint({}, 0, 100_000).global_step
        100000
    """

    state: dict[str, Tensor]
    epoch: int = 0
    global_step: int = 0


@dataclass(frozen=True)
class ConvertedCheckpoint:
    """What a conversion did.

    Attributes:
        host: Name of the host.
        options: Its arguments.
        assumed: Those of the arguments that neither shapes nor a configuration tell.
        dropped: Tensors that the host does not need.
        tensors: Number of tensors that were kept.

    Example:
        >>> ConvertedCheckpoint("DINOSAUR", {"num_slots": 7}, [], [], 182).host
        'DINOSAUR'
    """

    host: str
    options: dict[str, Any]
    assumed: list[str]
    dropped: list[str]
    tensors: int


def public_globals() -> AbstractContextManager[None]:
    """Let `torch.load(weights_only=True)` read files in which an old Lightning left the path of a folder.

    Returns:
        Context manager; nothing but `pathlib.PosixPath` is allowed in addition.

    Example:
        >>> folder = tempfile.mkdtemp(prefix="ssync-doctest-")
        >>> torch.save({"folder": pathlib.Path("logs")}, f"{folder}/a.ckpt")
        >>> with public_globals():
        ...     torch.load(f"{folder}/a.ckpt", weights_only=True)["folder"].name
        'logs'
    """
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
    """Read a public checkpoint; nothing in it is executed.

    Args:
        path: A file of Lightning with `state_dict`, a bare state dict of PyTorch, or `.safetensors`.

    Returns:
        Its tensors.

    Raises:
        ConfigError: There is no such file, it is damaged, or it holds other things than tensors and plain values.

    Example:
        >>> folder = tempfile.mkdtemp(prefix="ssync-doctest-")
        >>> torch.save({"state_dict": {"a": torch.ones(2)}, "global_step": 5}, f"{folder}/a.ckpt")
        >>> read_checkpoint(f"{folder}/a.ckpt")
        PublicCheckpoint(state={'a': tensor([1., 1.])}, epoch=0, global_step=5)
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"Expected a checkpoint at {str(path)!r}, but there is no such file. Correct the path.")
    try:
        if path.suffix == ".safetensors":
            content: Any = importlib.import_module("safetensors.torch").load_file(path)
        else:
            with public_globals():
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = why_unreadable(error)
        raise ConfigError(
            f"Expected {str(path)!r} to be a checkpoint of PyTorch or safetensors with tensors and plain values only, "
            f"but reading it failed ({type(error).__name__}: {reason}). Take another file; none is read in a way that "
            "could run what is in it."
        ) from error
    whole = content if isinstance(content, Mapping) else {}
    state = whole.get("state_dict", whole)
    if not isinstance(state, Mapping) or not state:
        raise ConfigError(f"Expected {str(path)!r} to hold a state dict, but got {type(content).__name__}.")
    strange = [str(name) for name, value in state.items() if not (isinstance(name, str) and isinstance(value, Tensor))]
    if strange:
        raise ConfigError(
            f"Expected {str(path)!r} to hold tensors by name, but {', '.join(strange[:4])} are none. Take the file "
            "that Lightning's ModelCheckpoint wrote, or the state dict alone."
        )
    steps = whole.get("epoch", 0), whole.get("global_step", 0)
    epoch, step = (value if isinstance(value, int) else 0 for value in steps)
    return PublicCheckpoint(dict(state), epoch, step)


def why_unreadable(error: Exception) -> str:
    """Why a file could not be read, without PyTorch's advice to read it in a way that runs what is in it.

    Args:
        error: What `torch.load` raised.

    Returns:
        One line.

    Example:
        >>> why_unreadable(ValueError("Weights only load failed. Re-running `torch.load` with ..."))
        'Weights only load failed.'
    """
    text = str(error)
    found = re.search(r"(?i)unsupported (?:global|class|operand)[^\n]*?(?= whose| was not| by default|\n|$)", text)
    first = found[0] if found else text.splitlines()[0] if text else "it ends early"
    return re.split(r"In PyTorch 2\.6|Re-running", first)[0].strip()


def convert_checkpoint(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str] | None,
    *,
    config: str | os.PathLike[str] | None = None,
    changes: Iterable[str] = (),
) -> ConvertedCheckpoint:
    """Turn a public checkpoint into one that a host of this package loads by Lightning.

    The host is found from names and shapes, and built and loaded strictly before anything is written. The file holds
    the backbone's weights too, so that nothing is downloaded; it holds no state of the optimizer.

    Args:
        path: The public file.
        out: Where the result goes; `None` only looks whether it would go well.
        config: The public YAML configuration of the training, which tells what shapes do not.
        changes: `OPTION=VALUE` of the host that go before all else, for example `num_slots=11`.

    Returns:
        Host, options, what was assumed and what was dropped.

    Raises:
        ConfigError: The file is of another model, options are missing, or configuration and file contradict each other.

    Example:
        >>> folder = tempfile.mkdtemp(prefix="ssync-doctest-")
        >>> torch.save({"weight": torch.ones(2, 2)}, f"{folder}/a.pth")
        >>> convert_checkpoint(f"{folder}/a.pth", None)
        Traceback (most recent call last):
            ...
        ssync_pl.errors.ConfigError: Expected a state dict of the VideoSAUR family with \
processor.corrector.to_q.weight, but got weight. It is of another model.
    """
    public = read_checkpoint(path)
    read = host_from_shapes({name: tuple(tensor.shape) for name, tensor in public.state.items()})
    options = {**read.assumed, **read.options}
    told = _from_config(config, read) if config is not None else {}
    options.update(told)
    own: dict[str, Any] = {}
    apply_changes(own, changes)
    options.update(own)
    missing = [name for name in read.missing if name not in options]
    if missing:
        raise ConfigError(
            f"Expected {', '.join(missing)} of the host, which no shape tells. Give the public configuration by "
            f"--config, or --set {missing[0]}=…"
        )
    state = {name: tensor for name, tensor in public.state.items() if name not in set(read.dropped)}
    host = _build(read.host, options, any(".backbone.model." in name for name in state))
    _load(host, state, path)
    if out is not None:
        _write(Path(out), host, state, public)
    assumed = [name for name in read.assumed if name not in told and name not in own]
    return ConvertedCheckpoint(read.host, options, assumed, read.dropped, len(state))


def _from_config(path: str | os.PathLike[str], read: ReadHost) -> dict[str, Any]:
    tree = read_config(Path(path))
    findings = Findings()
    steps = Section(tree.get("trainer"), "trainer", findings).integer("max_steps", 100_000)
    model = translate_model(Section(tree.get("model"), "model", findings), steps)
    if (model.host == "DINOSAUR") != (read.host == "DINOSAUR"):
        raise ConfigError(
            f"Expected {path} to describe the model of the checkpoint, {read.host}, but it describes {model.host}."
        )
    weights = {"reconstruction_weight", "similarity_weight"}
    differ = [
        f"{name} is {model.options.get(name)} instead of {value}"
        for name, value in read.options.items()
        if name in model.options
        and (bool(model.options[name]) != bool(value) if name in weights else model.options[name] != value)
    ]
    if differ:
        raise ConfigError(
            f"Expected {path} to describe the model of the checkpoint, but {'; '.join(differ)}. Take the configuration "
            "that it was trained with."
        )
    return model.options


def _build(host: str, options: dict[str, Any], with_backbone: bool) -> Any:
    import ssync_pl.hosts

    options.pop("backbone_checkpoint", None)
    if with_backbone:
        options["backbone_weights"] = "none"  # they are in the file
    try:
        return getattr(ssync_pl.hosts, host)(**{**options, "grid": tuple(options["grid"])})
    except (TypeError, AttributeError) as error:
        raise ConfigError(f"Expected options of {host}, but got others ({error}). Correct --set.") from error
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, SSyncError):
            raise
        reason = str(error).splitlines()[0] if str(error) else "no memory"
        raise ConfigError(
            f"Expected {host} to fit into memory with the sizes of the file and of --set, but it does not ({reason}). "
            "The file is damaged, or --set is wrong."
        ) from error


def _load(host: Any, state: dict[str, Tensor], path: str | os.PathLike[str]) -> None:
    # The backbone takes tensors out of the dict that it is given.
    try:
        host.load_state_dict(dict(state), strict=True)
    except RuntimeError as error:
        reasons = " ".join(line.strip() for line in str(error).splitlines()[1:5])
        raise ConfigError(
            f"Expected the tensors of {str(path)!r} to be those of {type(host).__name__} with the options found, but "
            f"{reasons} Set the options that differ by --set."
        ) from error


def _write(out: Path, host: Any, state: dict[str, Tensor], public: PublicCheckpoint) -> None:
    import lightning.pytorch as L

    cls = type(host)
    hyper_parameters = {name: list(v) if isinstance(v, tuple) else v for name, v in dict(host.hparams).items()}
    content = {
        "epoch": public.epoch,
        "global_step": public.global_step,
        "pytorch-lightning_version": L.__version__,
        "state_dict": {name: tensor.clone() for name, tensor in state.items()},
        "hparams_name": "kwargs",
        # The form in which LightningCLI saves them, and takes them back for `--ckpt_path`
        "hyper_parameters": {
            **hyper_parameters,
            "_class_path": f"{cls.__module__}.{cls.__qualname__}",
            "_instantiator": "lightning.pytorch.cli.instantiate_module",
        },
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{out.name}-", dir=out.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            torch.save(content, stream)
        os.chmod(temporary, 0o644)  # mkstemp keeps others from reading
        os.replace(temporary, out)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
