"""Variants of a configuration: pure functions from the merged configuration to what is laid over it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

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

Options = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """A variant: its name on the command line, what it is in plain words, and the YAML values laid over the rest."""

    name: str
    description: str
    overlay: dict[str, Any]


class _Recipe(NamedTuple):
    """How a variant changes SSync's options (None removes SSync), by which callback, and the contrastive weight."""

    description: str
    edit: Callable[[Options], Options | None] | None = None
    class_path: str = ""
    contrast: float | None = None
    hosts: tuple[str, ...] = ()


def known_variants() -> str:
    """Returns the names of the variants, for help and messages."""
    return ", ".join([*_FIXED, *(f"{name}-X" for name in _NUMBERED), "or a file.yaml of your own"])


def make_variant(name: str, config: Mapping[str, Any]) -> Variant:
    """Works out what a variant of `known_variants`, or a YAML file, lays over the merged configuration."""
    if name.endswith((".yaml", ".yml")):
        variant = _from_file(name)
    else:
        recipe = _FIXED.get(name) or _numbered(name)
        variant = Variant(name, recipe.description, _overlay(name, recipe, config))
    if name not in ("with", "without") and _explicit(merge(config, variant.overlay)) == _explicit(config):
        raise ConfigError(f"Expected variant {name!r} to change something, but it changes nothing. Leave it out.")
    return variant


@cache
def ssync_defaults() -> Options:
    """Returns the default of every setting of SSync."""
    from ssync_pl.plugin.config import SSyncConfig  # imports torch, which --help can do without

    return {field.name: field.default for field in fields(SSyncConfig)}


def ssync_options(config: Mapping[str, Any]) -> list[Options]:
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


def _numbered(name: str) -> _Recipe:
    found = re.fullmatch(r"([a-z]+)-(\d+(?:\.\d+)?)", name)
    if found is None or found.group(1) not in _NUMBERED:
        raise ConfigError(f"Expected --variants to be among {known_variants()}, but got {name!r}.")
    from ssync_pl.plugin.config import SSyncConfig

    setting, words = _NUMBERED[found.group(1)]
    changes: Options = {setting: float(found.group(2))}
    SSyncConfig(**changes)  # refuses what is out of range
    return _changed(f"{words} {found.group(2)}", **changes)


def _overlay(name: str, recipe: _Recipe, config: Mapping[str, Any]) -> dict[str, Any]:
    if recipe.hosts:
        model, options = class_of(config, "model")
        known = model in recipe.hosts or (recipe.contrast is not None and "contrast_weight" in options)
        if not known:
            raise ConfigError(f"Expected a host among {', '.join(recipe.hosts)} for variant {name!r}, but got {model}.")
        if options.get("contrast_weight", CONTRAST_DEFAULTS.get(model)) == recipe.contrast:
            raise ConfigError(
                f"Expected variant {name!r} to change something, but the configuration has contrast_weight "
                f"{recipe.contrast} already. Use `{'with' if recipe.edit is None else 'without'}`."
            )
    own = ssync_options(config)
    if not own and recipe.edit is not _remove:
        raise ConfigError(
            f"Expected an SSyncCallback in trainer.callbacks of the configuration for variant {name!r}, but there is "
            "none. Add it: --config with what `ssync-pl config ssync` prints."
        )
    overlay: dict[str, Any] = {}
    if recipe.contrast is not None:
        contrast = {"contrast_weight": recipe.contrast}
        overlay["model"] = {"class_path": config["model"]["class_path"], "init_args": contrast}
    if recipe.edit is not None:
        callbacks: list[Any] = []
        for callback in callbacks_of(config):
            if callback_name(callback) != "SSyncCallback":
                callbacks.append(callback)
            elif own and (changed := recipe.edit(own.pop())) is not None:
                path = callback["class_path"] if isinstance(callback, Mapping) else callback
                callbacks.append({"class_path": recipe.class_path or path, "init_args": changed})
        overlay["trainer"] = {"callbacks": callbacks}
    return merge({}, overlay)


def _explicit(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with the defaults that variants change, so that equal ones are recognised."""
    full = merge(config, {})
    for callback in callbacks_of(full):
        if callback_name(callback) == "SSyncCallback" and isinstance(callback, dict):
            options = {**ssync_defaults(), **(callback.get("init_args") or {})}
            callback["init_args"] = options if options["warmup_steps"] is None else {**options, "warmup_ratio": None}
    return full


def _remove(options: Options) -> None:
    return None


def _changed(description: str, **changes: Any) -> _Recipe:
    # A warm-up in steps would take the place of a ratio.
    gone = ("warmup_steps",) if "warmup_ratio" in changes else ()

    def edit(options: Options) -> Options:
        return {key: value for key, value in {**options, **changes}.items() if key not in gone}

    return _Recipe(description, edit)


def _only(options: Options, kept: tuple[str, ...], added: Options) -> Options:
    return {**{key: value for key, value in options.items() if key in kept}, **added}


def _schedule(options: Options) -> Options:
    names = ("warmup_ratio", "warmup_steps")
    return _only(
        options, names, {} if set(names) & set(options) else {"warmup_ratio": ssync_defaults()["warmup_ratio"]}
    )


def _contrast(ssync: bool, weight: float) -> _Recipe:
    said = "without the slot-slot contrastive loss" if weight == 0 else f"with slot-slot contrastive loss {weight}"
    edit = None if ssync else _remove
    return _Recipe(f"{'SSync' if ssync else 'no SSync'}, {said}", edit, "", weight, tuple(CONTRAST_DEFAULTS))


_AS_PUBLISHED = {"merge_threshold": 0.7, "warmup_ratio": 0.3, "boundary_weight": 1.0, "interior_weight": 1.0}
_FIXED = {
    "without": _Recipe("without SSync", _remove),
    "with": _Recipe("the configuration as it is"),
    "published": _Recipe(
        "SSync as published: weights 1 and 1, warm-up 0.3, no guard that backs off",
        # How maps are found belongs to the host, and stays.
        partial(_only, kept=_READS_MAPS, added={**_AS_PUBLISHED, "on_collapse": "warn"}),
    ),
    "boundary-only": _changed("only boundaries: slot attention teaches the decoder", interior_weight=0.0),
    "interior-only": _changed("only interiors: the decoder teaches slot attention", boundary_weight=0.0),
    "no-merging": _changed("labels of redundant slots are not merged", merge=False),
    "cross-entropy": _changed("cross-entropy in the place of the Brier loss", loss="ce"),
    "no-warmup": _changed("SSync from the first step", warmup_ratio=0.0),
    "srl": _Recipe("dense alignment (SRL) in the place of SSync", _schedule, _DENSE, None, _DENSE_HOSTS),
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
