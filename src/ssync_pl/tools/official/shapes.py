"""What the names and shapes of a public state dict say about the host that it belongs to."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ssync_pl.errors import ConfigError

__all__ = ["ReadHost", "host_from_shapes"]

Shapes = Mapping[str, Sequence[int]]

_DROPPED = ("projector.", "projector2.")
_VIDEO = "processor.module."
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


@dataclass
class ReadHost:
    """A host as far as its state dict tells.

    Attributes:
        host: `VideoSAUR`, `SlotContrast` or `DINOSAUR`.
        options: Arguments of the host that shapes decide.
        assumed: Arguments that no shape tells, with the published value.
        missing: Arguments that have to be given.
        dropped: Tensors of other parts of the training, which the host does not need.

    Example:
        >>> ReadHost("DINOSAUR", {"slot_dim": 64}, missing=["num_slots"]).missing
        ['num_slots']
    """

    host: str
    options: dict[str, Any]
    assumed: dict[str, Any] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)


def host_from_shapes(shapes: Shapes) -> ReadHost:
    """Find out which host a public state dict belongs to.

    Args:
        shapes: Shape by name, of a checkpoint of VideoSAUR, SlotContrast, SRL, SSync or their image models.

    Returns:
        Host and options. What no shape tells is assumed as published, or named as missing.

    Raises:
        ConfigError: Tensors are missing, or belong to parts that the hosts of this package have not.

    Example:
        >>> host_from_shapes({"decoder.weight": (3, 3)})
        Traceback (most recent call last):
            ...
        ssync_pl.errors.ConfigError: Expected a state dict of the VideoSAUR family with \
processor.corrector.to_q.weight, but got decoder.weight. It is of another model.
    """
    dropped = [name for name in shapes if name.startswith(_DROPPED)]
    kept = {name: tuple(shape) for name, shape in shapes.items() if not name.startswith(_DROPPED)}
    video = any(name.startswith(_VIDEO) for name in kept)
    inner = ".module" if video else ""
    if f"processor{inner}.corrector.to_q.weight" not in kept:
        few = ", ".join(list(kept)[:4]) or "nothing"
        raise ConfigError(
            f"Expected a state dict of the VideoSAUR family with processor{inner}.corrector.to_q.weight, but got {few}"
            f"{', …' if len(kept) > 4 else ''}. It is of another model."
        )
    reader = _Reader(kept)
    found = ReadHost("DINOSAUR", {}, dropped=dropped)
    _slots(reader, found)
    feature_dim = _encoder(reader, found, f"encoder{inner}")
    _corrector(reader, found, f"processor{inner}.corrector", video)
    if video:
        _predictor(reader, found, f"processor{inner}.predictor")
    outputs, patches = _decoder(reader, found, f"decoder{inner}")
    _grid(found, patches)
    similar = _losses(found, outputs, feature_dim, patches) if video else False
    if not video and outputs != feature_dim:
        raise ConfigError(
            f"Expected the decoder of an image model to give the {feature_dim} channels of the features, but it gives "
            f"{outputs}. DINOSAUR has no others."
        )
    _backbone(reader, found, f"encoder{inner}.backbone.model", similar)
    if video:
        learned = found.options["slot_init"] == "learned"
        found.host = "SlotContrast" if learned and not similar else "VideoSAUR"
    reader.close()
    return found


class _Reader:
    """Shapes, each of which has to be asked for."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = shapes
        self._taken: set[str] = set()

    def take(self, name: str, axes: int = 1) -> tuple[int, ...]:
        if name not in self.shapes:
            raise ConfigError(f"Expected a tensor {name} in the state dict, but there is none. It is of another model.")
        self._taken.add(name)
        shape = self.shapes[name]
        if len(shape) < axes:
            raise ConfigError(f"Expected {name} to have {axes} axes, but got shape {shape}. It is of another model.")
        return shape

    def has(self, name: str) -> bool:
        return name in self.shapes

    def linear(self, name: str, bias: bool = True) -> tuple[int, int]:
        if bias:
            self.take(f"{name}.bias")
        shape = self.take(f"{name}.weight")
        if len(shape) != 2:
            raise ConfigError(f"Expected {name}.weight to be a matrix, but got shape {shape}. It is of another model.")
        return shape[0], shape[1]

    def norm(self, name: str) -> None:
        self.take(f"{name}.weight")
        self.take(f"{name}.bias")

    def mlp(self, name: str) -> list[int]:
        """Output sizes of the linear layers of a plain stack, in order."""
        found = (re.fullmatch(rf"{re.escape(name)}\.layers\.(\d+)\.weight", key) for key in self.shapes)
        numbers = sorted(int(match.group(1)) for match in found if match)
        if not numbers:
            raise ConfigError(f"Expected tensors {name}.layers.* in the state dict, but there are none.")
        return [self.linear(f"{name}.layers.{number}")[0] for number in numbers]

    def blocks(self, name: str) -> int:
        found = (re.match(rf"{re.escape(name)}\.blocks\.(\d+)\.", key) for key in self.shapes)
        return 1 + max((int(match.group(1)) for match in found if match), default=-1)

    def below(self, name: str) -> list[str]:
        names = [key for key in self.shapes if key.startswith(f"{name}.")]
        self._taken.update(names)
        return names

    def close(self) -> None:
        rest = [name for name in self.shapes if name not in self._taken]
        if rest:
            shown = ", ".join(rest[:6]) + (f" and {len(rest) - 6} more" if len(rest) > 6 else "")
            raise ConfigError(
                f"Expected only tensors of parts that hosts of this package have, but got {shown}. The model was "
                "changed, or is another one."
            )


def _slots(reader: _Reader, found: ReadHost) -> None:
    if reader.has("initializer.slots"):
        slots, dim = reader.take("initializer.slots", axes=3)[-2:]
        found.options.update(num_slots=slots, slot_dim=dim, slot_init="learned")
        return
    reader.take("initializer.log_std")
    found.options.update(slot_dim=reader.take("initializer.mean")[-1], slot_init="gaussian")
    found.missing.append("num_slots")


def _encoder(reader: _Reader, found: ReadHost, name: str) -> int:
    transform = f"{name}.output_transform.layers"
    reader.norm(f"{transform}.0")
    hidden, feature_dim = reader.linear(f"{transform}.1")
    reader.linear(f"{transform}.3")
    found.options["encoder_hidden"] = hidden
    return feature_dim


def _corrector(reader: _Reader, found: ReadHost, name: str, video: bool) -> None:
    for part in ("to_q", "to_k", "to_v"):
        reader.linear(f"{name}.{part}", bias=False)
    for part in ("norm_features", "norm_slots"):
        reader.norm(f"{name}.{part}")
    for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        reader.take(f"{name}.gru.{part}")
    hidden = 0
    if reader.has(f"{name}.mlp.layers.1.weight"):
        reader.norm(f"{name}.mlp.layers.0")
        hidden, _ = reader.linear(f"{name}.mlp.layers.1")
        reader.linear(f"{name}.mlp.layers.3")
    found.options["corrector_mlp_hidden"] = hidden
    found.assumed.update({"iterations_first": 3, "iterations_later": 2} if video else {"iterations": 3})


def _transformer(reader: _Reader, name: str) -> tuple[int, int]:
    blocks, hidden = reader.blocks(name), 0
    for number in range(blocks):
        block = f"{name}.blocks.{number}"
        for norm in ("norm1", "norm2"):
            reader.norm(f"{block}.{norm}")
        for linear in ("linear2", "linear1", "self_attn.qkv", "self_attn.out_proj"):
            size, _ = reader.linear(f"{block}.{linear}")
            hidden = size if linear == "linear1" else hidden
    return blocks, hidden


def _predictor(reader: _Reader, found: ReadHost, name: str) -> None:
    blocks, hidden = _transformer(reader, name)
    found.options["predictor_blocks"] = blocks
    if blocks:
        found.options["predictor_mlp_hidden"] = hidden
        found.assumed["predictor_heads"] = 4


def _decoder(reader: _Reader, found: ReadHost, name: str) -> tuple[int, int]:
    patches = reader.take(f"{name}.pos_emb", axes=2)[-2]
    if reader.has(f"{name}.mlp.layers.0.weight"):
        *hidden, last = reader.mlp(f"{name}.mlp")
        found.options.update(decoder="mlp", decoder_hidden=hidden)
        return last - 1, patches
    for part in ("norm_q", "norm_k", "norm_memory"):
        reader.norm(f"{name}.{part}")
    for part in ("to_q", "to_k"):
        reader.linear(f"{name}.{part}", bias=False)
    blocks, hidden_size = _transformer(reader, f"{name}.allocator")
    if hidden_size != 4 * found.options["slot_dim"]:
        raise ConfigError(
            f"Expected {name}.allocator to have hidden layers of {4 * found.options['slot_dim']}, four times the slot "
            f"size, but got {hidden_size}. Hosts of this package have no others."
        )
    found.options.update(decoder="mixer", decoder_hidden=reader.mlp(f"{name}.renderer"), mixer_blocks=blocks)
    found.assumed["mixer_heads"] = 4
    return reader.linear(f"{name}.output_transform")[0], patches


def _grid(found: ReadHost, patches: int) -> None:
    side = math.isqrt(patches)
    if side * side == patches:
        found.assumed["grid"] = [side, side]
    else:
        found.missing.append("grid")


def _losses(found: ReadHost, outputs: int, feature_dim: int, patches: int) -> bool:
    """Which losses the decoder's channels were for; returns whether similarities are among them."""
    choices = {feature_dim + patches: (1.0, 0.1), patches: (0.0, 0.1), feature_dim: (1.0, 0.0)}
    if outputs not in choices:
        raise ConfigError(
            f"Expected the decoder to give {feature_dim} channels of features, {patches} of similarities or both, but "
            f"it gives {outputs}. It was trained for something that hosts of this package have not."
        )
    reconstruction, similarity = choices[outputs]
    found.options["reconstruction_weight"] = reconstruction
    found.options["similarity_weight"] = similarity
    return similarity > 0


def _backbone(reader: _Reader, found: ReadHost, name: str, similar: bool) -> None:
    names = reader.below(name)
    if not names:
        found.missing.append("backbone")
        found.missing.append("layer")
        return
    blocks = reader.blocks(name)
    projection = reader.shapes.get(f"{name}.patch_embed.proj.weight") or (0, 0, 0, 0)
    scaled = reader.has(f"{name}.blocks.0.ls1.gamma")
    model = _BACKBONES.get((projection[0], projection[-1], scaled))
    if model is None or any(part in key for key in names for part in ("reg_token", "dist_token")):
        found.missing.append("backbone")
    else:
        found.assumed["backbone"] = model
    found.assumed["layer"] = f"vit_block{blocks}"
    if similar:
        found.assumed["similarity_layer"] = f"vit_block_keys{blocks}"
