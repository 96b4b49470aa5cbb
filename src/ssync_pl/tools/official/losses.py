"""Losses of public configurations: which of the host's losses they are, and SSync's settings."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

from ssync_pl.errors import ConfigError
from ssync_pl.tools.official.sections import Section

__all__ = ["Losses", "translate_losses"]

_SRL = {"DECConsLoss", "ENCConsLoss", "Slot_Redundancy_Loss"}
_FEATURES = "encoder.backbone_features"


@dataclass
class Losses:
    """Losses in the words of this package.

    Attributes:
        reconstruction: Weight of the error of reconstructed features; 0 without.
        similarity: Weight of the similarity over time; 0 without.
        similarity_layer: Layer whose features are compared; `None` for the main features.
        similarity_options: `similarity_temperature`, `similarity_threshold`, `similarity_shift`.
        contrast: Weight of the slot-slot contrast; 0 without.
        contrast_options: `contrast_temperature`, `contrast_across_batch`.
        single_frames: Whether the contrast is the one for images, which is 0 for clips of one frame.
        ssync: Settings of `SSyncCallback`; `None` where the configuration has no SSync.

    Example:
        >>> Losses(reconstruction=1.0).ssync is None
        True
    """

    reconstruction: float = 0.0
    similarity: float = 0.0
    similarity_layer: str | None = None
    similarity_options: dict[str, Any] = field(default_factory=dict)
    contrast: float = 0.0
    contrast_options: dict[str, Any] = field(default_factory=dict)
    single_frames: bool = False
    ssync: dict[str, Any] | None = None


def translate_losses(model: Section, feature_dim: int, patches: int, max_steps: int) -> Losses:
    """Translate `losses`, `loss_weights` and SSync's settings of a model section.

    Args:
        model: The section.
        feature_dim: Channels of a feature.
        patches: Patches of a frame.
        max_steps: Optimizer steps of the training, to which the warm-up of SSync refers.

    Returns:
        The losses.

    Raises:
        ConfigError: A loss has no counterpart, or is used in a way that has none.

    Example:
        >>> from ssync_pl.tools.official.sections import Findings
        >>> section = Section({"losses": {"a": {"name": "MSELoss"}}}, "model", Findings())
        >>> translate_losses(section, 384, 196, 1000).reconstruction
        1.0
    """
    listed = model.section("losses")
    weights = model.section("loss_weights")
    found = Losses()
    if not listed.present:
        found.reconstruction = 1.0
        return _with_ssync(found, model, {}, max_steps)
    if weights.present and set(weights.values) != set(listed.values):
        raise ConfigError(
            f"Expected model.loss_weights to name the losses {sorted(listed.values)}, but got {sorted(weights.values)}."
        )
    temperatures: dict[str, tuple[float, float]] = {}
    for name in listed.values:
        loss = listed.section(name)
        weight = weights.number(name) if weights.present else 1.0
        kind = loss.take("name")
        if weight == 0.0:
            for key in loss.values:
                loss.take(key, None)
        elif kind == "MSELoss":
            _features_only(loss, [0, feature_dim])
            found.reconstruction = _once(found.reconstruction, weight, loss)
        elif kind == "CrossEntropyLoss":
            found.similarity = _once(found.similarity, weight, loss)
            _similarity(loss, found, (feature_dim, patches))
        elif kind in ("Slot_Slot_Contrastive_Loss", "Img_Slot_Slot_Contrastive_Loss"):
            found.contrast = _once(found.contrast, weight, loss)
            found.single_frames = kind.startswith("Img_")
            _contrast(loss, found)
            if model.values.get("projector") is not None:  # only SRL has one
                loss.findings.leave(loss.path, "the contrast is SlotContrast's; SRL's of the same name is symmetric")
        elif kind == "MSECLSLoss":
            temperatures[_direction(loss)] = weight, loss.number("temperature", 1.0)
        elif kind in _SRL:
            for key in loss.values:
                loss.take(key, None)
            loss.findings.leave(loss.path, f"a loss of SRL ({kind}) that this package has not: the host trains without")
        else:
            raise ConfigError(
                f"Expected a loss that this package has at {loss.path}, but got {kind!r}. Its losses: MSELoss, "
                "CrossEntropyLoss on similarities over time, Slot_Slot_Contrastive_Loss, MSECLSLoss of SSync. Set its "
                "weight in model.loss_weights to 0 to go on without."
            )
    return _with_ssync(found, model, temperatures, max_steps)


def _once(before: float, weight: float, loss: Section) -> float:
    if before:
        raise ConfigError(f"Expected one loss of the kind of {loss.path}, but it is the second. Leave one out.")
    return weight


def _features_only(loss: Section, dims: list[int]) -> None:
    why = "Hosts of this package rebuild the main features with the leading channels of the decoder."
    loss.need("pred_key", "decoder.reconstruction", default="decoder.reconstruction", why=why)
    loss.need("target_key", _FEATURES, default=_FEATURES, why=why)
    loss.need("pred_dims", dims, default=dims, why=why)


def _similarity(loss: Section, found: Losses, sizes: tuple[int, int]) -> None:
    feature_dim, patches = sizes
    why = "Hosts of this package predict similarities over time with the channels behind the features."
    loss.need("pred_key", "decoder.reconstruction", default="decoder.reconstruction", why=why)
    loss.need("pred_dims", [0, patches], [feature_dim, feature_dim + patches], why=why)
    target = str(loss.take("target_key", _FEATURES))
    layer = re.fullmatch(r"encoder\.(vit_(?:block|block_keys)\d+|vit_output)", target)
    if target != _FEATURES and layer is None:
        raise ConfigError(f"Expected {loss.key('target_key')} to be a layer of the encoder, but got {target!r}. {why}")
    found.similarity_layer = layer.group(1) if layer else None
    transform = loss.section("target_transform")
    transform.need("name", "utils.FeatureTimeSimilarity", why=why)
    for name, value, default in (("softmax", True, False), ("normalize", True, True), ("mask_diagonal", False, False)):
        transform.need(name, value, default=default, why=why)
    shift = transform.integer("time_shift", 1)
    loss.need("remove_last_n_frames", shift, default=0, why=why)
    found.similarity_options = {
        "similarity_temperature": transform.number("temperature", 1.0),
        "similarity_threshold": transform.number("threshold", None),
        "similarity_shift": shift,
    }


def _contrast(loss: Section, found: Losses) -> None:
    why = "Hosts of this package contrast the slots that slot attention returns."
    loss.need("pred_key", "processor.state", why=why)
    for name, value in (("patch_inputs", False), ("keep_input_dim", True)):
        loss.need(name, value, why=why)
    loss.leave("the loss does not read it", "target_key")
    across = loss.need("batch_contrast", True, False, default=True, why=why)
    found.contrast_options = {
        "contrast_temperature": loss.number("temperature", 0.1),
        "contrast_across_batch": across,
    }


def _direction(loss: Section) -> str:
    pair = loss.take("pred_key"), loss.take("target_key")
    directions = {
        ("dec_bd_preds", "grp_bd_labels"): "boundary_weight",
        ("grp_nbd_preds", "dec_nbd_labels"): "interior_weight",
    }
    if pair not in directions:
        raise ConfigError(f"Expected {loss.path} to compare the maps as SSync does, but got {pair}. Leave it out.")
    return directions[pair]


def _with_ssync(found: Losses, model: Section, weighted: dict[str, tuple[float, float]], max_steps: int) -> Losses:
    settings: dict[str, Any] = {
        "merge_threshold": model.number("merge_iou_threshold", 0.6),
        "n_bd": model.integer("dif_n_bd", 1),
        "n_nbd": model.integer("dif_n_nbd", 1),
        "n_noise": model.integer("dif_n_bd_noise", 1),
    }
    ratio, steps = model.number("synergistic_warmup_ratio", 0.3), model.integer("max_steps", 100_000)
    if not weighted:
        return found
    if len({temperature for _, temperature in weighted.values()}) > 1:
        raise ConfigError(f"Expected one temperature for both losses of SSync, but got {weighted}. Make them equal.")
    for name in ("boundary_weight", "interior_weight"):
        settings[name] = weighted[name][0] if name in weighted else 0.0
    settings["temperature"] = next(iter(weighted.values()))[1]
    # The official code counts the warm-up in steps of its own `max_steps`.
    if steps == max_steps:
        settings["warmup_ratio"] = ratio
    else:
        settings["warmup_steps"] = math.ceil(ratio * steps)
    found.ssync = settings
    return found
