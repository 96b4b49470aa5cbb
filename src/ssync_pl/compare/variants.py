"""Configurations as plain dicts, merged as LightningCLI merges its files, and what variants lay over them."""

import ast
import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ssync_pl.errors import ConfigError, explained, require

_CONTRAST_HOSTS = ("SlotContrast", "VideoSAUR")  # with a slot-slot contrastive loss
_TOP_LEVEL = frozenset(
    ("ckpt_path", "data", "lr_scheduler", "model", "name", "optimizer", "seed_everything", "trainer", "weights_only")
)
_WARMUP = ("warmup_ratio", "warmup_steps")
_PLACES = ("adapter", "attention", "masks", "attention_kind", "masks_kind", "grid")  # they belong to the host
_MOST_VALUES = 100_000  # of a configuration, with its references followed


@dataclass(frozen=True)
class Variant:
    """A variant: its name on the command line, what it is in plain words, and the YAML values laid over the rest."""

    name: str
    description: str
    overlay: dict[str, Any]


@dataclass(frozen=True)
class _Recipe:
    """A variant before the configuration is known.

    `ssync` changes options of SSync (None removes SSync), of which those in `kept` stay (None: all); `callback` takes
    SSync's place, `contrast` that of the host's contrastive weight, and only `hosts` can be changed so.
    """

    description: str
    ssync: Mapping[str, Any] | None = None
    kept: tuple[str, ...] | None = None
    callback: str = ""
    contrast: float | None = None
    hosts: tuple[str, ...] = ()


def _contrast(ssync: bool, weight: float) -> _Recipe:
    said = f"with slot-slot contrastive loss {weight}" if weight else "without the slot-slot contrastive loss"
    name = "SSync" if ssync else "no SSync"
    return _Recipe(f"{name}, {said}", {} if ssync else None, contrast=weight, hosts=_CONTRAST_HOSTS)


_FIXED = {
    "without": _Recipe("without SSync"),
    "with": _Recipe("the configuration as it is", {}),
    "published": _Recipe(
        "SSync as published: weights 1 and 1, warm-up 0.3, no guard that backs off",  # which are the defaults
        {},
        kept=_PLACES,
    ),
    "auto": _Recipe(
        "SSync with mode='auto', switched on as in the configuration", {"mode": "auto"}, kept=_PLACES + _WARMUP
    ),
    "boundary-only": _Recipe("only boundaries: slot attention teaches the decoder", {"interior_weight": 0.0}),
    "interior-only": _Recipe("only interiors: the decoder teaches slot attention", {"boundary_weight": 0.0}),
    "no-merging": _Recipe("labels of redundant slots are not merged", {"merge": False}),
    "soft-iou": _Recipe("labels merged by Soft-IoU, its threshold inferred for each clip", {"merge_by": "soft_iou"}),
    "cross-entropy": _Recipe("cross-entropy in the place of the Brier loss", {"loss": "ce"}),
    "no-warmup": _Recipe("SSync from the first step", {"warmup_ratio": 0.0}),
    "srl": _Recipe(
        "dense alignment (SRL) in the place of SSync",
        {},
        kept=_WARMUP,
        callback="ssync_pl.DenseAlignmentCallback",
        hosts=("VideoSAUR", "SlotContrast", "DINOSAUR"),
    ),
    "no-contrast": _contrast(ssync=False, weight=0.0),
    "ssync-no-contrast": _contrast(ssync=True, weight=0.0),
    "slot-contrast": _contrast(ssync=False, weight=0.1),
    "ssync-slot-contrast": _contrast(ssync=True, weight=0.1),
}
_NUMBERED = {
    "threshold": ("merge_threshold", "slots are merged above an overlap of"),
    "weight": ("relative_weight", "SSync's share of the host's own loss is"),
    "share": ("gradient_share", "SSync's gradient at the maps, as a share of the host's own there, is"),
    "warmup": ("warmup_ratio", "share of the training before SSync switches on:"),
}
# What would contradict a setting, or win over it.
_INSTEAD_OF = {
    "warmup_ratio": "warmup_steps",
    "relative_weight": "gradient_share",
    "gradient_share": "relative_weight",
}


def known_variants() -> str:
    """Returns the names of the variants, for help and messages."""
    return ", ".join([*_FIXED, *(f"{name}-X" for name in _NUMBERED), "or a file.yaml of your own"])


def make_variant(name: str, config: Mapping[str, Any]) -> Variant:
    """Works out what a variant of `known_variants`, or a YAML file, lays over the merged configuration."""
    if name.endswith((".yaml", ".yml")):
        overlay = read_yaml(name, "--variants")
        # A misspelt key would else be found when its run begins, after the runs before it.
        unknown = sorted({str(key).split(".")[0].rstrip("+") for key in overlay} - _TOP_LEVEL)
        expected = f"{name} to hold keys of a configuration ({', '.join(sorted(_TOP_LEVEL))})"
        require(not unknown, expected, ", ".join(unknown), advice="Correct them.")
        stem = Path(name).stem  # names a folder, and a cell of results.csv, which must not begin a formula
        require(re.fullmatch(r"\w[\w .-]*", stem) is not None, "files of --variants to begin with a letter", repr(stem))
        return Variant(stem, f"with {Path(name).name} laid over the configuration", overlay)
    recipe = _FIXED.get(name) or _numbered(name)
    return Variant(name, recipe.description, _overlay(name, recipe, config))


@cache
def ssync_defaults(mode: str = "published") -> dict[str, Any]:
    """Returns what every setting of SSync is in a mode where nothing is given."""
    from ssync_pl.plugin.config import SSyncConfig  # imports torch, which --help can do without

    return asdict(SSyncConfig(mode=mode))  # type: ignore[arg-type]


def ssync_options(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the options of each SSyncCallback in a configuration."""
    return [options_of(one) for one in callbacks_of(config) if callback_name(one) == "SSyncCallback"]


def _numbered(name: str) -> _Recipe:
    kind, _, number = name.rpartition("-")
    known = kind in _NUMBERED and re.fullmatch(r"\d+(\.\d+)?", number) is not None
    require(known, f"--variants to be among {known_variants()}", repr(name))
    from ssync_pl.plugin.config import SSyncConfig

    setting, words = _NUMBERED[kind]
    changes: dict[str, Any] = {setting: float(number)}
    SSyncConfig(**changes)  # refuses what is out of range
    return _Recipe(f"{words} {number}", changes)


def _overlay(name: str, recipe: _Recipe, config: Mapping[str, Any]) -> dict[str, Any]:
    host, options = class_of(config, "model")
    fits = not recipe.hosts or host in recipe.hosts or (recipe.contrast is not None and "contrast_weight" in options)
    require(fits, f"a host among {', '.join(recipe.hosts)} for variant {name!r}", host)
    require(
        recipe.ssync is None or bool(ssync_options(config)),
        f"an SSyncCallback in trainer.callbacks of the configuration for variant {name!r}",
        "none",
        advice="Add it: --config with what `ssync-pl config ssync` prints.",
    )
    overlay: dict[str, Any] = {}
    if recipe.contrast is not None:
        contrast = {"contrast_weight": recipe.contrast}
        overlay["model"] = {"class_path": config["model"]["class_path"], "init_args": contrast}
    if recipe.ssync is None or recipe.ssync or recipe.kept:
        edited = [_edited(callback, recipe) for callback in callbacks_of(config)]
        overlay["trainer"] = {"callbacks": [callback for callback in edited if callback is not None]}
    return merge({}, overlay)


def _edited(callback: Any, recipe: _Recipe) -> Any:
    """A callback as the variant has it; None where it goes."""
    if callback_name(callback) != "SSyncCallback":
        return callback
    if recipe.ssync is None:
        return None
    options = {name: value for name, value in options_of(callback).items() if value is not None}
    # It has the schedule of SSync, also where that is the default.
    if (recipe.callback or "mode" in recipe.ssync) and "warmup_steps" not in options:
        ratio = ssync_defaults(str(options.get("mode", "published")))["warmup_ratio"]
        options = {"warmup_ratio": ratio, **options}
    gone = [other for name, other in _INSTEAD_OF.items() if name in recipe.ssync]
    stays = {
        key: value for key, value in options.items() if key not in gone and (recipe.kept is None or key in recipe.kept)
    }
    path = callback["class_path"] if isinstance(callback, Mapping) else callback
    return {"class_path": recipe.callback or path, "init_args": {**stays, **recipe.ssync}}


def read_yaml(path: str | Path, option: str = "--config") -> dict[str, Any]:
    """Reads a configuration file that `option` names, and refuses one without keys, with the file's name."""
    path = Path(path)
    require(path.is_file(), f"{option} to name a YAML file", f"{str(path)!r}, which is none")
    # YAML allows none of the characters that stand for other bytes.
    content = parse_yaml(path.read_text(encoding="utf-8", errors="surrogateescape"), f"{option} {path}")
    got = "nothing" if content is None else type(content).__name__
    require(isinstance(content, dict), f"{option} {path} to hold keys with values", got)
    trainer = content.get("trainer") or {}
    require(isinstance(trainer, dict), f"`trainer` in {path} to hold keys with values", type(trainer).__name__)
    return dict(content)


def parse_yaml(text: str, place: str) -> Any:
    """Parses YAML; refuses what holds itself or unfolds too far, keys of several kinds, and keys given twice."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
            for name in names:
                if names.count(name) > 1:
                    raise ValueError(f"the key {name!r} is given twice")
            return super().construct_mapping(node, deep)

    kinds = (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, RecursionError)
    with explained(f"{place} to hold YAML in UTF-8", *kinds, advice="Correct it.", kind=ConfigError):
        content = yaml.load(text, Loader)
        if _unfolded(content, {}) > _MOST_VALUES:
            raise ValueError(f"its references unfold to more than {_MOST_VALUES} values")
        json.dumps(content, sort_keys=True, default=str)
    return content


def _unfolded(value: Any, known: dict[int, int]) -> int:
    """Counts values, and hundreds of characters, with references followed."""
    if id(value) not in known:
        known[id(value)] = 1
        parts = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ()
        size = len(value) // 100 if isinstance(value, str) else 0
        known[id(value)] += size + sum(_unfolded(part, known) for part in parts)
    return known[id(value)]


def key_values(words: Sequence[str], option: str) -> dict[str, Any]:
    """Reads words like `num_slots=7`, whose values are literals of Python, such as `(1, 2)` and `None`, or YAML."""
    values = {}
    for word in words:
        name, equals, text = word.partition("=")
        valid = bool(equals) and name.isidentifier()
        require(valid, f"{option} NAME=VALUE, such as {option} num_slots=7", repr(word))
        try:
            values[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            values[name] = parse_yaml(text, f"{option} {name}=")
    return values


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Lays one configuration over another.

    Mappings are merged key by key, lists and values of the later one replace those before, a key with `+` appends to a
    list, and the options of a class go when the later configuration names another class.
    """
    merged = copy.deepcopy(dict(base))
    if "class_path" in over and merged.get("class_path") not in (None, over["class_path"]):
        merged.pop("init_args", None)
    for key, value in over.items():
        if isinstance(key, str) and key.endswith("+"):
            before = merged.get(key[:-1]) or []
            before = before if isinstance(before, list) else [before]
            merged[key[:-1]] = [*before, *copy.deepcopy(value if isinstance(value, list) else [value])]
        elif isinstance(value, Mapping):
            merged[key] = merge(merged[key] if isinstance(merged.get(key), Mapping) else {}, value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def callbacks_of(config: Mapping[str, Any]) -> list[Any]:
    """Returns the callbacks of a merged configuration, as they are written there."""
    trainer = config.get("trainer")
    found = trainer.get("callbacks") if isinstance(trainer, Mapping) else None
    if found is None:
        return []
    return list(found) if isinstance(found, Sequence) and not isinstance(found, str) else [found]


def callback_name(callback: Any) -> str:
    """Returns the class name of a callback without its module; empty when there is none."""
    path = callback.get("class_path") if isinstance(callback, Mapping) else callback
    return str(path or "").rsplit(".", 1)[-1]


def class_of(config: Mapping[str, Any], part: str) -> tuple[str, dict[str, Any]]:
    """Returns the class name of `model` or `data` without its module, and its `init_args`."""
    found = config.get(part)
    known = isinstance(found, str) or (isinstance(found, Mapping) and "class_path" in found)
    expected = f"the configuration to have `{part}` with a `class_path`"
    require(known, expected, repr(found)[:80], advice=f"Add a --config that names the {part}.")
    return callback_name(found), options_of(found)


def options_of(part: Any) -> dict[str, Any]:
    """Returns the `init_args` of a class in a configuration."""
    options = part.get("init_args") if isinstance(part, Mapping) else None
    return dict(options) if isinstance(options, Mapping) else {}
