"""Losses of public configurations: which of the host's losses they are, and SSync's settings."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

from ssync_pl.errors import ConfigError
from ssync_pl.tools.official.sections import Section

__all__ = ["Losses", "translate_losses"]

_SRL = ("DECConsLoss", "ENCConsLoss", "Slot_Redundancy_Loss")
_CONTRAST = ("Slot_Slot_Contrastive_Loss", "Img_Slot_Slot_Contrastive_Loss")
_DIRECTIONS = {
    ("dec_bd_preds", "grp_bd_labels"): "boundary_weight",
    ("grp_nbd_preds", "dec_nbd_labels"): "interior_weight",
}
_KINDS = ("reconstruction", "similarity", "contrast")
_FEATURES = "encoder.backbone_features"


@dataclass
class Losses:
    """Losses in the words of this package.

    Attributes:
        weights: Weight of `reconstruction`, `similarity` (over time) and `contrast` (slot–slot); 0 without.
        similarity: Options of the host's similarity loss.
        contrast: Options of the host's contrast loss.
        single_frames: Whether the contrast is the one for images, which is 0 for clips of one frame.
        ssync: Settings of `SSyncCallback`; `None` where the configuration has no SSync.
    """

    weights: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_KINDS, 0.0))
    similarity: dict[str, Any] = field(default_factory=dict)
    contrast: dict[str, Any] = field(default_factory=dict)
    single_frames: bool = False
    ssync: dict[str, Any] | None = None


def translate_losses(model: Section, feature_dim: int, patches: int, max_steps: int) -> Losses:
    """Translates `losses`, `loss_weights` and SSync's settings of a model section.

    Args:
        model: The section.
        feature_dim: Channels of a feature.
        patches: Patches per frame.
        max_steps: Optimizer steps of the training, to which the warm-up of SSync refers.

    Raises:
        ConfigError: A loss has no counterpart, or is used in a way that has none.
    """
    listed, weights = model.section("losses"), model.section("loss_weights")
    found = Losses()
    if not listed.present:
        found.weights["reconstruction"] = 1.0
    elif weights.present and set(weights.values) != set(listed.values):
        raise ConfigError(
            f"Expected model.loss_weights to name the losses {sorted(listed.values)}, but got {sorted(weights.values)}."
        )
    distilled: dict[str, tuple[float, float]] = {}
    for name in listed.values:
        loss = listed.section(name)
        weight = weights.number(name) if weights.present else 1.0
        kind = loss.take("name")
        if weight == 0.0:
            loss.skip(*loss.values)
        elif kind == "MSELoss":
            why = "Hosts of this package rebuild the main features with the leading channels of the decoder."
            dims = [0, feature_dim]
            loss.fixed(why, pred_key="decoder.reconstruction", target_key=_FEATURES, pred_dims=dims)
            _set_once(found, "reconstruction", weight, loss)
        elif kind == "CrossEntropyLoss":
            _set_once(found, "similarity", weight, loss)
            found.similarity = _similarity(loss, [feature_dim, feature_dim + patches], [0, patches])
        elif kind in _CONTRAST:
            _set_once(found, "contrast", weight, loss)
            found.single_frames = kind == _CONTRAST[1]
            found.contrast = _contrast(loss)
            if model.values.get("projector") is not None:  # only SRL has one
                loss.note("the contrast is SlotContrast's; SRL's of the same name is symmetric")
        elif kind == "MSECLSLoss":
            pair = loss.take("pred_key"), loss.take("target_key")
            if pair not in _DIRECTIONS:
                raise ConfigError(f"Expected {loss.path} to compare the maps as SSync does, but got {pair}.")
            distilled[_DIRECTIONS[pair]] = weight, loss.number("temperature", 1.0)
        elif kind in _SRL:
            loss.skip(*loss.values)
            loss.note(f"a loss of SRL ({kind}) that this package has not: the host trains without")
        else:
            raise ConfigError(
                f"Expected a loss that this package has at {loss.path}, but got {kind!r}: it has MSELoss, "
                "CrossEntropyLoss on similarities over time, Slot_Slot_Contrastive_Loss, and MSECLSLoss of SSync. Set "
                "its weight in model.loss_weights to 0 to go on without."
            )
    found.ssync = _ssync(model, distilled, max_steps)
    return found


def _set_once(found: Losses, kind: str, weight: float, loss: Section) -> None:
    if found.weights[kind]:
        raise ConfigError(f"Expected one loss of the kind of {loss.path}, but it is the second. Leave one out.")
    found.weights[kind] = weight


def _similarity(loss: Section, *dims: list[int]) -> dict[str, Any]:
    why = "Hosts of this package predict similarities over time with the channels behind the features."
    loss.fixed(why, pred_key="decoder.reconstruction")
    loss.need("pred_dims", *dims, why=why)
    target = str(loss.take("target_key", _FEATURES))
    layer = re.fullmatch(r"encoder\.(vit_(?:block|block_keys)\d+|vit_output)", target)
    if target != _FEATURES and layer is None:
        raise ConfigError(f"Expected {loss.key('target_key')} to be a layer of the encoder, but got {target!r}. {why}")
    transform = loss.section("target_transform")
    transform.need("name", "utils.FeatureTimeSimilarity", why=why)
    transform.need("softmax", True, default=False, why=why)
    transform.fixed(why, normalize=True, mask_diagonal=False)
    shift = transform.integer("time_shift", 1)
    loss.need("remove_last_n_frames", shift, default=0, why=why)
    return {
        "similarity_layer": layer[1] if layer else None,
        "similarity_temperature": transform.number("temperature", 1.0),
        "similarity_threshold": transform.number("threshold", None),
        "similarity_shift": shift,
    }


def _contrast(loss: Section) -> dict[str, Any]:
    why = "Hosts of this package contrast the slots that slot attention returns."
    for name, value in (("pred_key", "processor.state"), ("patch_inputs", False), ("keep_input_dim", True)):
        loss.need(name, value, why=why)
    loss.leave("the loss does not read it", "target_key")
    across = loss.need("batch_contrast", True, False, default=True, why=why)
    return {"contrast_temperature": loss.number("temperature", 0.1), "contrast_across_batch": across}


def _ssync(model: Section, weighted: dict[str, tuple[float, float]], max_steps: int) -> dict[str, Any] | None:
    settings: dict[str, Any] = {
        "merge_threshold": model.number("merge_iou_threshold", 0.6),
        "n_bd": model.integer("dif_n_bd", 1),
        "n_nbd": model.integer("dif_n_nbd", 1),
        "n_noise": model.integer("dif_n_bd_noise", 1),
    }
    ratio, steps = model.number("synergistic_warmup_ratio", 0.3), model.integer("max_steps", 100_000)
    if not weighted:
        return None
    temperatures = {temperature for _, temperature in weighted.values()}
    if len(temperatures) > 1:
        raise ConfigError(f"Expected one temperature for both losses of SSync, but got {weighted}. Make them equal.")
    for name in _DIRECTIONS.values():
        settings[name] = weighted.get(name, (0.0,))[0]
    settings["temperature"] = temperatures.pop()
    # The official code counts the warm-up in steps of its own `max_steps`.
    warmup = {"warmup_ratio": ratio} if steps == max_steps else {"warmup_steps": math.ceil(ratio * steps)}
    return settings | warmup
