"""The runs of a comparison: variants x seeds x slot counts x data sets, each with its command."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

from ssync_pl import __version__
from ssync_pl.compare.configs import callback_name, callbacks_of, class_of, merge, read_yaml
from ssync_pl.compare.sharing import Share, plan_sharing
from ssync_pl.compare.variants import Variant, explicit, make_variant
from ssync_pl.errors import ConfigError, require

__all__ = ["Asked", "Matrix", "Run", "RunKey", "build_matrix", "parse_numbers", "parse_seeds"]

_OWN_DATA = ("SyntheticDataModule", "ShardDataModule")


@dataclass(frozen=True)
class Asked:
    """What a comparison is asked for: the options of the command; empty ones take the configuration's."""

    configs: tuple[Path, ...]
    out: Path
    variants: tuple[str, ...] = ("with", "without")
    seeds: tuple[int, ...] = (0,)
    slots: tuple[int, ...] = ()
    sets: tuple[str, ...] = ()
    baseline: str = "without"
    extra: tuple[str, ...] = ()
    share: bool = True


class RunKey(NamedTuple):
    """Which run of a comparison."""

    set: str
    slots: int
    variant: str
    seed: int

    @property
    def label(self) -> str:
        """Name of the run in messages."""
        return f"{self.set}, {self.slots} slots, {self.variant}, seed {self.seed}"

    def folder(self, out: Path) -> Path:
        """Returns the folder of the run below that of the comparison."""
        return out / "runs" / self.set / f"slots_{self.slots}" / self.variant / f"seed_{self.seed}"


@dataclass(frozen=True)
class Run:
    """One training.

    `files` are configuration files that are written into its folder, `recipe` hashes everything in the configuration
    that decides the result but the seed, and `checkpoint` of the variant `source` is where it starts, if that is there.
    """

    key: RunKey
    folder: Path
    files: Mapping[str, Mapping[str, Any]]
    command: tuple[str, ...]
    recipe: str
    source: str | None = None
    checkpoint: Path | None = None


@dataclass(frozen=True)
class Matrix:
    """All runs of a comparison, the variants of a seed beside each other, and what `matrix.json` holds."""

    runs: tuple[Run, ...]
    facts: Mapping[str, Any]
    on_cpu: bool


def build_matrix(asked: Asked) -> Matrix:
    """Lays out all runs; nothing is written or started."""
    require(bool(asked.configs), "--config FILE, the configuration that is compared", "none")
    _refuse_doubles(asked.variants, "--variants")
    config: dict[str, Any] = reduce(merge, map(read_yaml, asked.configs), {})
    model, options = class_of(config, "model")
    class_of(config, "data")
    sets = [_data_set(name, config) for name in asked.sets or ("default",)]
    _refuse_doubles([name for name, _ in sets], "--sets")
    own: Any = options.get("num_slots")
    known = bool(asked.slots) or isinstance(own, int)
    require(known, f"`num_slots` among the options of {model}, or --slots", repr(own), advice="Write it there.")
    slots = asked.slots or (own,)
    texts = [path.read_text(encoding="utf-8") for path in asked.configs]
    runs: list[Run] = []
    variants: list[Variant] = []
    for set_name, changes in sets:
        of_set = merge(config, changes)
        variants = [make_variant(name, of_set) for name in asked.variants]
        _check_variants(variants, of_set, asked.baseline)
        plan = plan_sharing(variants, of_set, asked.extra) if asked.share else {}
        runs += [
            _run(asked, changes, RunKey(set_name, count, variant.name, seed), variant, of_set, texts, plan)
            for count in slots
            for seed in asked.seeds
            for variant in variants
        ]
    facts = {
        "config": texts,
        "variants": [{"name": one.name, "description": one.description} for one in variants],
        "seeds": list(asked.seeds),
        "slots": list(slots),
        "sets": [name for name, _ in sets],
        "baseline": asked.baseline,
        "extra": list(asked.extra),
        "version": __version__,
    }
    on_cpu = "--trainer.accelerator=cpu" in asked.extra or (config.get("trainer") or {}).get("accelerator") == "cpu"
    return Matrix(tuple(runs), facts, on_cpu)


def parse_seeds(text: str) -> tuple[int, ...]:
    """Reads `--seeds`: a number N for the seeds 0 to N-1, or a list like `3,4`; `3,` is the seed 3 alone."""
    if "," in text:
        return parse_numbers(text, "--seeds", least=0)
    valid = text.strip().isdecimal() and int(text) > 0
    require(valid, "--seeds to be a number of seeds from 1 on, or a list like 3,4", repr(text))
    return tuple(range(int(text)))


def parse_numbers(text: str, option: str, least: int = 1) -> tuple[int, ...]:
    """Reads whole numbers from `least` on with commas between them, each once."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    valid = bool(parts) and all(part.isdecimal() and int(part) >= least for part in parts)
    require(valid, f"{option} to be whole numbers from {least} on, as in 7,11", repr(text))
    _refuse_doubles(parts, option)
    return tuple(int(part) for part in parts)


def _refuse_doubles(names: Sequence[str], option: str) -> None:
    doubles = sorted({name for name in names if list(names).count(name) > 1})
    require(not doubles, f"{option} to name each once", f"{', '.join(doubles)} twice")


def _data_set(name: str, config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Name and changes of `default`, a preset of the synthetic data, or a YAML file."""
    if name == "default":
        return name, {}
    if name.endswith((".yaml", ".yml")):
        return Path(name).stem, read_yaml(name, "--sets")
    from ssync_pl.data.synthetic import PRESETS

    require(name in PRESETS, f"--sets to be among {', '.join(PRESETS)}, or paths of YAML files", repr(name))
    data, options = class_of(config, "data")
    expected = f"data of SyntheticDataModule for the preset {name!r} of --sets"
    advice = "Name a YAML file with the other data."
    require(data == "SyntheticDataModule", expected, f"{data} in the configuration", advice=advice)
    if options.get("preset", "a") == name:
        return name, {}
    # A scene was made for the configuration's own preset, and would undo this one.
    scene = {} if options.get("scene") is None else {"scene": None}
    return name, {"data": {"init_args": {"preset": name, **scene}}}


def _check_variants(variants: Sequence[Variant], config: Mapping[str, Any], baseline: str) -> None:
    names = [variant.name for variant in variants]
    _refuse_doubles(names, "--variants")
    expected = f"the variant {baseline!r} that the others are compared with to be among --variants"
    require(baseline in names, expected, ",".join(names), advice="Add it, or name another one by --baseline.")
    trainings: list[Any] = []
    for variant in variants:
        training = explicit(merge(config, variant.overlay))
        if training in trainings:
            raise ConfigError(
                f"Expected variants that differ, but {names[trainings.index(training)]!r} and {variant.name!r} are the "
                "same training with this configuration. Leave one out."
            )
        trainings.append(training)


def _config_words(paths: Sequence[Path]) -> list[str]:
    return [word for path in paths for word in ("--config", str(path))]


def _settings(folder: Path, config: Mapping[str, Any], share: Share) -> dict[str, Any]:
    """Logger and callbacks that every run gets; `callbacks+` appends."""
    switches = [{**asdict(switch), "name": switch.name} for switch in share.keeps]
    callbacks: dict[str, Any] = {
        "ssync_pl.ValidationSummary": {"untrained": True},
        "ssync_pl.SSyncPictures": {"max_videos": 3, "max_frames": 4},
        "ssync_pl.compare.callbacks.RunRecorder": {},
        "ssync_pl.compare.callbacks.KeepCheckpoints": {"folder": str(folder / "checkpoints"), "switches": switches},
    }
    there = {callback_name(callback) for callback in callbacks_of(config)}
    added = [
        {"class_path": path, "init_args": options}
        for path, options in callbacks.items()
        if callback_name(path) not in there
    ]
    # A version of "" puts metrics.csv into the folder itself.
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": str(folder), "name": "", "version": ""}}
    return {"trainer": {"logger": logger, "enable_checkpointing": True, "callbacks+": added}}


def _run(
    asked: Asked,
    changes: Mapping[str, Any],
    key: RunKey,
    variant: Variant,
    config: Mapping[str, Any],
    texts: Sequence[str],
    plan: Mapping[str, Share],
) -> Run:
    folder, share = key.folder(asked.out), plan.get(variant.name, Share())
    merged = merge(config, variant.overlay)
    data, options = class_of(merged, "data")
    files: dict[str, Any] = {"overlay.yaml": variant.overlay, "settings.yaml": _settings(folder, merged, share)}
    paths = [*asked.configs, *([folder / "set.yaml"] if changes else [])]
    command = [sys.executable, "-m", "ssync_pl", "fit", *_config_words(paths)]
    if "callbacks" in variant.overlay.get("trainer", {}):
        # Else a callback of the overlay would keep what the one in its place had, and the overlay leaves out.
        command.append("--trainer.callbacks=null")
    command += [*_config_words([folder / name for name in files]), f"--seed_everything={key.seed}"]
    if data in _OWN_DATA or "seed" in options:
        command.append(f"--data.init_args.seed={key.seed}")
    if key.slots != class_of(merged, "model")[1].get("num_slots"):
        command.append(f"--model.init_args.num_slots={key.slots}")
    command += ["--trainer.enable_progress_bar=false", *asked.extra]
    # With the slots and the set, so that a folder can hold several; without the seed, which the folder names.
    parts = [__version__, list(texts), changes, variant.overlay, key.slots, list(asked.extra)]
    recipe = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:12]
    checkpoint = None
    if share.source is not None and share.switch is not None:
        source = key._replace(variant=share.source).folder(asked.out)
        checkpoint = source / "checkpoints" / f"{share.switch.name}.ckpt"
    files |= {"set.yaml": changes} if changes else {}
    return Run(key, folder, files, tuple(command), recipe, share.source, checkpoint)
