"""Public checkpoints of VideoSAUR, SlotContrast, SRL and SSync for the hosts of this package."""

from __future__ import annotations

import importlib
import math
import os
import pathlib
import re
import tempfile
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssync_pl.errors import ConfigError, SSyncError

__all__ = ["ConvertedCheckpoint", "convert_checkpoint", "public_globals", "read_checkpoint", "why_unreadable"]

_DROPPED = ("projector.", "projector2.")
# Width, patch size and whether blocks have a layer scale, which DINOv2's have
_BACKBONES = {
    (384, 14, True): "vit_small_patch14_dinov2.lvd142m",
    (768, 14, True): "vit_base_patch14_dinov2.lvd142m",
    (1024, 14, True): "vit_large_patch14_dinov2.lvd142m",
    (384, 8, False): "vit_small_patch8_224.dino",
    (768, 8, False): "vit_base_patch8_224.dino",
    (384, 16, False): "vit_small_patch16_224.dino",
    (768, 16, False): "vit_base_patch16_224.dino",
    (192, 16, False): "vit_tiny_patch16_224",
}


class PublicCheckpoint(NamedTuple):
    """Tensors by name, and epochs and optimizer steps trained where the file says so."""

    state: dict[str, Tensor]
    epoch: int = 0
    global_step: int = 0


@dataclass(frozen=True)
class ConvertedCheckpoint:
    """What a conversion found.

    Attributes:
        host: Class name of the host.
        options: Its arguments.
        assumed: Names of the arguments that neither shapes nor a configuration tell.
        dropped: Names of tensors that the host does not need.
        tensors: Number of tensors that were kept.
    """

    host: str
    options: dict[str, Any]
    assumed: list[str]
    dropped: list[str]
    tensors: int


@dataclass
class _ReadHost:
    """A host as far as names and shapes tell: what they decide, what is assumed as published, what is missing."""

    host: str = "DINOSAUR"
    options: dict[str, Any] = field(default_factory=dict)
    assumed: dict[str, Any] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)


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
    """Reads a public checkpoint; nothing in it is executed.

    Args:
        path: A file of Lightning with `state_dict`, a bare state dict of PyTorch, or `.safetensors`.

    Raises:
        ConfigError: There is no such file, it is damaged, or it holds other things than tensors and plain values.
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
    epoch, step = (value if isinstance(value, int) else 0 for value in (whole.get("epoch"), whole.get("global_step")))
    return PublicCheckpoint(dict(state), epoch, step)


def why_unreadable(error: Exception) -> str:
    """Why a file could not be read, without PyTorch's advice to read it in a way that runs what is in it."""
    text = str(error)
    found = re.search(r"(?i)unsupported (?:global|class|operand)[^\n]*?(?= whose| was not| by default|\n|$)", text)
    first = found[0] if found else text.splitlines()[0] if text else "it ends early"
    return re.split(r"In PyTorch 2\.6|Re-running", first)[0].strip()


def convert_checkpoint(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str] | None,
    *,
    described: tuple[str, Mapping[str, Any]] | None = None,
    options: Mapping[str, Any] | None = None,
) -> ConvertedCheckpoint:
    """Turns a public checkpoint into one that a host of this package loads through Lightning.

    The host is found from names and shapes, and built and loaded strictly before anything is written. The file holds
    the backbone's weights too, so that nothing is downloaded; it holds no state of the optimizer.

    Args:
        path: The public file.
        out: Where the result goes; `None` only checks that the conversion works.
        described: Class name and arguments of the host in the training's configuration, for what no shape tells.
        options: Arguments of the host that go before all else, for example `{"num_slots": 11}`.

    Raises:
        ConfigError: The file is of another model, options are missing, or configuration and file contradict each other.
    """
    public, own = read_checkpoint(path), dict(options or {})
    dropped = [name for name in public.state if name.startswith(_DROPPED)]
    state = {name: tensor for name, tensor in public.state.items() if not name.startswith(_DROPPED)}
    read = _read_host({name: tuple(tensor.shape) for name, tensor in state.items()})
    told = _checked(described, read) if described is not None else {}
    found = {**read.assumed, **read.options, **told, **own}
    missing = [name for name in read.missing if name not in found]
    if missing:
        raise ConfigError(
            f"Expected {', '.join(missing)} of the host, which no shape tells. Give the public configuration by "
            f"--config, or --set {missing[0]}=…"
        )
    host = _build(read.host, found, any(".backbone.model." in name for name in state))
    _load(host, state, path)
    if out is not None:
        _write(Path(out), host, state, public)
    assumed = [name for name in read.assumed if name not in told and name not in own]
    return ConvertedCheckpoint(read.host, found, assumed, dropped, len(state))


def _checked(described: tuple[str, Mapping[str, Any]], read: _ReadHost) -> dict[str, Any]:
    host, options = described
    if (host == "DINOSAUR") != (read.host == "DINOSAUR"):
        raise ConfigError(f"Expected the configuration to describe {read.host} as the file, but it describes {host}.")
    loose = ("reconstruction_weight", "similarity_weight")  # shapes tell only whether there is such a loss
    differ = [
        f"{name} is {options.get(name)} instead of {value}"
        for name, value in read.options.items()
        if name in options and (bool(options[name]) != bool(value) if name in loose else options[name] != value)
    ]
    if differ:
        raise ConfigError(
            f"Expected the configuration to describe the model of the checkpoint, but {'; '.join(differ)}. Take "
            "the one that it was trained with."
        )
    return dict(options)


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
    try:
        host.load_state_dict(dict(state), strict=True)  # the backbone takes tensors out of the dict that it is given
    except RuntimeError as error:
        reasons = " ".join(line.strip() for line in str(error).splitlines()[1:5])
        raise ConfigError(
            f"Expected the tensors of {str(path)!r} to be those of {type(host).__name__} with the options found, but "
            f"{reasons} Set the options that differ by --set, or the model was changed."
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


class _Shapes(dict[str, tuple[int, ...]]):
    """Shapes by name; a missing one is an error that names it."""

    def __missing__(self, name: str) -> tuple[int, ...]:
        raise ConfigError(f"Expected a tensor {name} in the state dict, but there is none. It is of another model.")

    def sizes(self, name: str, axes: int) -> tuple[int, ...]:
        shape = self[name]
        if len(shape) < axes:
            raise ConfigError(f"Expected {name} to have {axes} axes, but got shape {shape}. It is of another model.")
        return shape

    def outputs(self, name: str) -> list[int]:
        """Output sizes of the linear layers of a plain stack, in order."""
        found = (re.fullmatch(rf"{re.escape(name)}\.layers\.(\d+)\.weight", key) for key in self)
        numbers = sorted(int(match[1]) for match in found if match)
        if not numbers:
            raise ConfigError(f"Expected tensors {name}.layers.* in the state dict, but there are none.")
        return [self.sizes(f"{name}.layers.{number}.weight", 2)[0] for number in numbers]

    def blocks(self, name: str) -> int:
        found = (re.match(rf"{re.escape(name)}\.blocks\.(\d+)\.", key) for key in self)
        return 1 + max((int(match[1]) for match in found if match), default=-1)


def _read_host(state: dict[str, tuple[int, ...]]) -> _ReadHost:
    shapes, found = _Shapes(state), _ReadHost()
    video = any(name.startswith("processor.module.") for name in shapes)
    inner = ".module" if video else ""
    encoder, corrector, decoder = f"encoder{inner}", f"processor{inner}.corrector", f"decoder{inner}"
    if f"{corrector}.to_q.weight" not in shapes:
        few = ", ".join(list(shapes)[:4]) or "nothing"
        raise ConfigError(
            f"Expected a state dict of the VideoSAUR family with {corrector}.to_q.weight, but got {few}"
            f"{', …' if len(shapes) > 4 else ''}. It is of another model."
        )
    learned = "initializer.slots" in shapes
    if learned:
        slots, dim = shapes.sizes("initializer.slots", 3)[-2:]
        found.options.update(num_slots=slots, slot_dim=dim, slot_init="learned")
    else:
        dim = shapes.sizes("initializer.mean", 1)[-1]
        found.options.update(slot_dim=dim, slot_init="gaussian")
        found.missing.append("num_slots")
    found.options["encoder_hidden"], feature_dim = shapes.sizes(f"{encoder}.output_transform.layers.1.weight", 2)
    hidden = f"{corrector}.mlp.layers.1.weight"
    found.options["corrector_mlp_hidden"] = shapes.sizes(hidden, 2)[0] if hidden in shapes else 0
    found.assumed.update({"iterations_first": 3, "iterations_later": 2} if video else {"iterations": 3})
    if video:
        predictor = f"processor{inner}.predictor"
        found.options["predictor_blocks"] = shapes.blocks(predictor)
        if found.options["predictor_blocks"]:
            found.options["predictor_mlp_hidden"] = shapes.sizes(f"{predictor}.blocks.0.linear1.weight", 2)[0]
            found.assumed["predictor_heads"] = 4
    outputs, patches = _read_decoder(shapes, found, decoder, dim)
    side = math.isqrt(patches)
    if side * side == patches:
        found.assumed["grid"] = [side, side]
    else:
        found.missing.append("grid")
    similar = _read_losses(found, outputs, feature_dim, patches, video)
    _read_backbone(shapes, found, f"{encoder}.backbone.model", similar)
    if video:
        found.host = "SlotContrast" if learned and not similar else "VideoSAUR"
    return found


def _read_decoder(shapes: _Shapes, found: _ReadHost, name: str, slot_dim: int) -> tuple[int, int]:
    patches = shapes.sizes(f"{name}.pos_emb", 2)[-2]
    if f"{name}.mlp.layers.0.weight" in shapes:
        *hidden, last = shapes.outputs(f"{name}.mlp")
        found.options.update(decoder="mlp", decoder_hidden=hidden)
        return last - 1, patches
    blocks = shapes.blocks(f"{name}.allocator")
    hidden_size = shapes.sizes(f"{name}.allocator.blocks.0.linear1.weight", 2)[0]
    if hidden_size != 4 * slot_dim:
        raise ConfigError(
            f"Expected {name}.allocator to have hidden layers of {4 * slot_dim}, four times the slot size, but got "
            f"{hidden_size}. Hosts of this package have no others."
        )
    found.options.update(decoder="mixer", decoder_hidden=shapes.outputs(f"{name}.renderer"), mixer_blocks=blocks)
    found.assumed["mixer_heads"] = 4
    return shapes.sizes(f"{name}.output_transform.weight", 2)[0], patches


def _read_losses(found: _ReadHost, outputs: int, feature_dim: int, patches: int, video: bool) -> bool:
    """Which losses the decoder's channels were for; returns whether similarities are among them."""
    choices = {feature_dim + patches: (1.0, 0.1), patches: (0.0, 0.1), feature_dim: (1.0, 0.0)}
    if not video:
        choices = {feature_dim: (1.0, 0.0)}
    if outputs not in choices:
        raise ConfigError(
            f"Expected the decoder to give {feature_dim} channels of features"
            f"{f', {patches} of similarities or both' if video else ''}, but it gives {outputs}. It was trained for "
            "something that hosts of this package have not."
        )
    reconstruction, similarity = choices[outputs]
    if video:
        found.options.update(reconstruction_weight=reconstruction, similarity_weight=similarity)
    return similarity > 0


def _read_backbone(shapes: _Shapes, found: _ReadHost, name: str, similar: bool) -> None:
    names = [key for key in shapes if key.startswith(f"{name}.")]
    if not names:
        found.missing += ["backbone", "layer"]
        return
    blocks = shapes.blocks(name)
    projection = shapes.get(f"{name}.patch_embed.proj.weight") or (0, 0, 0, 0)
    model = _BACKBONES.get((projection[0], projection[-1], f"{name}.blocks.0.ls1.gamma" in shapes))
    if model is None or any(part in key for key in names for part in ("reg_token", "dist_token")):
        found.missing.append("backbone")
    else:
        found.assumed["backbone"] = model
    found.assumed["layer"] = f"vit_block{blocks}"
    if similar:
        found.assumed["similarity_layer"] = f"vit_block_keys{blocks}"
