"""Vision transformers of the public configurations: their sizes, and their names in timm."""

from __future__ import annotations

import re

from ssync_pl.errors import ConfigError

__all__ = ["timm_name", "vit_property"]

_WIDTHS = {"tiny": 192, "small": 384, "base": 768, "large": 1024}
_VIT = re.compile(r"vit_(?P<size>tiny|small|base|large)_patch(?P<patch>\d+)(?:_(?P<pixels>\d+))?_\w+")
_TAGS = {"dino": "dino", "mae": "mae", "dinov2": "lvd142m"}


def vit_property(table: str, name: str, key: str) -> int:
    """Width or number of patches of a vision transformer, as `config_prop` of the public configurations gives them.

    Args:
        table: `VIT_PARAMS`, the only one there is.
        name: For example `vit_base_patch8_224_dino`; without a size of frames, 224.
        key: `FEAT_DIM` or `NUM_PATCHES`.

    Returns:
        The number.

    Raises:
        ConfigError: The table, the name or the key is not known.

    Example:
        >>> vit_property("VIT_PARAMS", "vit_base_patch14_dinov2", "NUM_PATCHES")
        256
    """
    if table != "VIT_PARAMS" or key not in ("FEAT_DIM", "NUM_PATCHES"):
        raise ConfigError(
            f"Expected FEAT_DIM or NUM_PATCHES of VIT_PARAMS, but got {key!r} of {table!r}. Write the number itself."
        )
    found = _VIT.fullmatch(str(name))
    if found is None:
        raise ConfigError(
            f"Expected a vision transformer such as vit_base_patch16_224_dino, but got {name!r}. Write the number."
        )
    if key == "FEAT_DIM":
        return _WIDTHS[found["size"]]
    return (int(found["pixels"] or 224) // int(found["patch"])) ** 2


def timm_name(name: str) -> str:
    """Name in today's timm of a backbone of the public configurations.

    Args:
        name: For example `vit_base_patch16_224_dino`, which older versions of timm knew, or any other name.

    Returns:
        The name with its tag of weights; names without a known ending as they are.

    Raises:
        ConfigError: The weights were registered by the official code itself and timm has none of them.

    Example:
        >>> timm_name("vit_base_patch8_224_dino"), timm_name("vit_small_patch14_dinov2")
        ('vit_base_patch8_224.dino', 'vit_small_patch14_dinov2.lvd142m')
    """
    head, _, ending = name.rpartition("_")
    if ending in ("msn", "mocov3", "savi"):
        raise ConfigError(
            f"Expected a backbone that timm has, but got {name!r}, which only the official code registers. Name "
            "another one of the same shape, and give its file of weights by `backbone_checkpoint`."
        )
    if ending == "dinov2":
        return f"{name}.{_TAGS[ending]}"
    return f"{head}.{_TAGS[ending]}" if ending in _TAGS else name
