"""Variants of a configuration: pure functions from the merged configuration to what is laid over it."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ssync_pl.compare.configs import callback_name, callbacks_of, class_of, merge, read_yaml
from ssync_pl.errors import ConfigError

__all__ = ["CONTRAST_DEFAULTS", "Variant", "known_variants", "make_variant", "ssync_defaults", "ssync_options"]

# Hosts with a slot-slot contrastive loss, and its weight there unless the configuration names one.
CONTRAST_DEFAULTS = {"SlotContrast": 0.5, "VideoSAUR": 0.0}
_PUBLISHED_CONTRAST = 0.1
_TOP_LEVEL = frozenset(
    ("ckpt_path", "data", "lr_scheduler", "model", "name", "optimizer", "seed_everything", "trainer", "weights_only")
)
_READS_MAPS = ("adapter", "attention", "masks", "attention_kind", "masks_kind", "grid")
_DENSE = "ssync_pl.rivals.dense_callback.DenseAlignmentCallback"
_DENSE_HOSTS = ("VideoSAUR", "SlotContrast", "DINOSAUR")


@dataclass(frozen=True)
class Variant:
    """A variant: its name on the command line, what it is in plain words, and the YAML values laid over the rest."""

    name: str
    description: str
    overlay: dict[str, Any]


def known_variants() -> str:
    """Returns the names of the variants, for help and messages."""
    return ", ".join([*_FIXED, *(f"{name}-X" for name in _NUMBERED), "or a file.yaml of your own"])


def make_variant(name: str, config: Mapping[str, Any]) -> Variant:
    """Works out what a variant lays over a configuration.

    Args:
        name: one of `known_variants`, with a number in the place of X, or the path of a YAML file.
        config: the merged configuration.

    Raises:
        ConfigError: there is no such variant, it does not fit the configuration, or it changes nothing.
    """
    if name.endswith((".yaml", ".yml")):
        variant = _from_file(name)
    elif name in _FIXED:
        variant = _FIXED[name](name, config)
    else:
        variant = _numbered(name, config)
    if name not in ("with", "without") and merge(config, variant.overlay) == merge({}, config):
        raise ConfigError(f"Expected variant {name!r} to change something, but it changes nothing. Leave it out.")
    return variant


@cache
def ssync_defaults() -> dict[str, Any]:
    """Returns the default of every setting of SSync."""
    from dataclasses import fields

    from ssync_pl.plugin.config import SSyncConfig  # imports torch, which --help can do without

    return {field.name: field.default for field in fields(SSyncConfig)}


def ssync_options(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the options of each SSyncCallback in a configuration."""
    found = [callback for callback in callbacks_of(config) if callback_name(callback) == "SSyncCallback"]
    return [dict(one.get("init_args") or {}) if isinstance(one, Mapping) else {} for one in found]


def _from_file(path: str) -> Variant:
    overlay = read_yaml(path, "--variants")
    # A misspelt key would else be found when its run begins, after the runs before it.
    unknown = sorted({key.split(".")[0].rstrip("+") for key in overlay} - _TOP_LEVEL)
    if unknown:
        raise ConfigError(
            f"Expected {path} to hold keys of a configuration ({', '.join(sorted(_TOP_LEVEL))}), but got "
            f"{', '.join(unknown)}. Correct them."
        )
    return Variant(Path(path).stem, f"with {Path(path).name} laid over the configuration", overlay)


def _numbered(name: str, config: Mapping[str, Any]) -> Variant:
    found = re.fullmatch(r"([a-z]+)-(\d+(?:\.\d+)?)", name)
    if found is None or found.group(1) not in _NUMBERED:
        raise ConfigError(f"Expected --variants to be among {known_variants()}, but got {name!r}.")
    setting, words = _NUMBERED[found.group(1)]
    value = float(found.group(2))
    if setting != "relative_weight" and value > 1.0:
        raise ConfigError(f"Expected variant {name!r} to have a number in [0, 1], but got {found.group(2)}.")
    if setting == "relative_weight" and value <= 0.0:
        raise ConfigError(f"Expected variant {name!r} to have a number above 0. To leave SSync out, use `without`.")
    return Variant(name, f"{words} {found.group(2)}", _settings(name, config, **{setting: value}))


def _settings(name: str, config: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """Changes options of the SSyncCallback; refuses a change that is there already."""
    options = _own_options(config, name)
    defaults = ssync_defaults()
    steps = options.get("warmup_steps") if "warmup_ratio" in changes else None
    if steps is None and all(options.get(key, defaults[key]) == value for key, value in changes.items()):
        said = ", ".join(f"{key} {value}" for key, value in changes.items())
        raise ConfigError(
            f"Expected variant {name!r} to change something, but the configuration has {said} already. Leave it out."
        )
    options = {**options, **changes}
    if "warmup_ratio" in changes:
        options.pop("warmup_steps", None)  # it would take the ratio's place
    return _with_callback(config, _like(config, options))


def _own_options(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = ssync_options(config)
    if not found:
        raise ConfigError(
            f"Expected an SSyncCallback in trainer.callbacks of the configuration for variant {name!r}, but there is "
            "none. Add it: --config with what `ssync-pl config ssync` prints."
        )
    return found[0]


def _like(config: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """An SSyncCallback with other options, named as in the configuration."""
    own = next(callback for callback in callbacks_of(config) if callback_name(callback) == "SSyncCallback")
    path = own["class_path"] if isinstance(own, Mapping) else own
    return {"class_path": path, **({"init_args": dict(options)} if options else {})}


def _with_callback(config: Mapping[str, Any], new: Mapping[str, Any] | None) -> dict[str, Any]:
    """The callbacks with another one in the place of SSync's, or with none."""
    callbacks: list[Any] = []
    placed = new is None
    for callback in callbacks_of(config):
        if callback_name(callback) != "SSyncCallback":
            callbacks.append(copy.deepcopy(callback))
        elif not placed:
            callbacks.append(copy.deepcopy(dict(new or {})))
            placed = True
    return {"trainer": {"callbacks": callbacks}}


def _with(name: str, config: Mapping[str, Any]) -> Variant:
    _own_options(config, name)
    return Variant(name, "the configuration as it is", {})


def _without(name: str, config: Mapping[str, Any]) -> Variant:
    return Variant(name, "without SSync", _with_callback(config, None))


def _published(name: str, config: Mapping[str, Any]) -> Variant:
    # How maps are found belongs to the host, and stays.
    reads = {key: value for key, value in _own_options(config, name).items() if key in _READS_MAPS}
    options = {"merge_threshold": 0.7, "warmup_ratio": 0.3, "boundary_weight": 1.0, "interior_weight": 1.0}
    overlay = _with_callback(config, _like(config, {**reads, **options, "on_collapse": "warn"}))
    return Variant(name, "SSync as published: weights 1 and 1, warm-up 0.3, no guard that backs off", overlay)


def _srl(name: str, config: Mapping[str, Any]) -> Variant:
    own = _own_options(config, name)
    model, _ = class_of(config, "model")
    if model not in _DENSE_HOSTS:
        raise ConfigError(
            f"Expected a host that reconstructs features ({', '.join(_DENSE_HOSTS)}) for variant {name!r}, but got "
            f"{model}."
        )
    options = {key: value for key, value in own.items() if key in ("warmup_ratio", "warmup_steps")}
    if "warmup_steps" not in options:
        options.setdefault("warmup_ratio", ssync_defaults()["warmup_ratio"])
    overlay = _with_callback(config, {"class_path": _DENSE, "init_args": options})
    return Variant(name, "dense alignment (SRL) in the place of SSync", overlay)


def _contrast(ssync: bool, weight: float) -> Callable[[str, Mapping[str, Any]], Variant]:
    def make(name: str, config: Mapping[str, Any]) -> Variant:
        model, options = class_of(config, "model")
        if model not in CONTRAST_DEFAULTS and "contrast_weight" not in options:
            known = " or ".join(CONTRAST_DEFAULTS)
            raise ConfigError(
                f"Expected a host with `contrast_weight` ({known}) for variant {name!r}, but got {model}."
            )
        now = options.get("contrast_weight", CONTRAST_DEFAULTS.get(model))
        if (now == 0) == (weight == 0):
            raise ConfigError(
                f"Expected variant {name!r} to change something, but the configuration has contrast_weight {now} "
                f"already. Use {'`with`' if ssync else '`without`'}."
            )
        model_part = {"class_path": config["model"]["class_path"], "init_args": {"contrast_weight": weight}}
        overlay: dict[str, Any] = {"model": model_part}
        if ssync:
            _own_options(config, name)
        else:
            overlay.update(_with_callback(config, None))
        said = "without the slot-slot contrastive loss" if weight == 0 else f"with slot-slot contrastive loss {weight}"
        return Variant(name, f"{'SSync' if ssync else 'no SSync'}, {said}", overlay)

    return make


def _changed(words: str, **changes: Any) -> Callable[[str, Mapping[str, Any]], Variant]:
    return lambda name, config: Variant(name, words, _settings(name, config, **changes))


_FIXED: dict[str, Callable[[str, Mapping[str, Any]], Variant]] = {
    "without": _without,
    "with": _with,
    "published": _published,
    "boundary-only": _changed("only boundaries: slot attention teaches the decoder", interior_weight=0.0),
    "interior-only": _changed("only interiors: the decoder teaches slot attention", boundary_weight=0.0),
    "no-merging": _changed("labels of redundant slots are not merged", merge=False),
    "cross-entropy": _changed("cross-entropy in the place of the Brier loss", loss="ce"),
    "no-warmup": _changed("SSync from the first step", warmup_ratio=0.0),
    "srl": _srl,
    "no-contrast": _contrast(ssync=False, weight=0.0),
    "ssync-no-contrast": _contrast(ssync=True, weight=0.0),
    "slot-contrast": _contrast(ssync=False, weight=_PUBLISHED_CONTRAST),
    "ssync-slot-contrast": _contrast(ssync=True, weight=_PUBLISHED_CONTRAST),
}
_NUMBERED = {
    "threshold": ("merge_threshold", "slots are merged above an overlap of"),
    "weight": ("relative_weight", "SSync's share of the host's own loss is"),
    "warmup": ("warmup_ratio", "share of the training before SSync switches on:"),
}
