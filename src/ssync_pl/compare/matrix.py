"""The runs of a comparison: variants x seeds x slot counts, each with its command."""

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
from ssync_pl.errors import require

__all__ = ["Asked", "Matrix", "Run", "RunKey", "build_matrix", "parse_numbers", "parse_seeds"]

_OWN_DATA = ("SyntheticDataModule", "ShardDataModule")


@dataclass(frozen=True)
class Asked:
    """What a comparison is asked for: the options of the command; without `slots`, the configuration's."""

    configs: tuple[Path, ...]
    out: Path
    variants: tuple[str, ...] = ("with", "without")
    seeds: tuple[int, ...] = (0,)
    slots: tuple[int, ...] = ()
    baseline: str = "without"
    extra: tuple[str, ...] = ()
    share: bool = True


class RunKey(NamedTuple):
    """Which run of a comparison."""

    slots: int
    variant: str
    seed: int

    @property
    def label(self) -> str:
        """Name of the run in messages."""
        return f"{self.slots} slots, {self.variant}, seed {self.seed}"

    def folder(self, out: Path) -> Path:
        """Returns the folder of the run below that of the comparison."""
        return out / "runs" / f"slots_{self.slots}" / self.variant / f"seed_{self.seed}"


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
    config: dict[str, Any] = reduce(merge, map(read_yaml, asked.configs), {})
    model, options = class_of(config, "model")
    class_of(config, "data")
    own: Any = options.get("num_slots")
    known = bool(asked.slots) or isinstance(own, int)
    require(known, f"`num_slots` among the options of {model}, or --slots", repr(own), advice="Write it there.")
    slots = asked.slots or (own,)
    texts = [path.read_text(encoding="utf-8") for path in asked.configs]
    variants = [make_variant(name, config) for name in asked.variants]
    _check_variants(variants, config, asked.baseline)
    plan = plan_sharing(variants, config, asked.extra) if asked.share else {}
    runs = [
        _run(asked, RunKey(count, variant.name, seed), variant, config, texts, plan.get(variant.name, Share()))
        for count in slots
        for seed in asked.seeds
        for variant in variants
    ]
    facts = {
        "config": texts,
        "variants": [{"name": one.name, "description": one.description} for one in variants],
        "seeds": list(asked.seeds),
        "slots": list(slots),
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
    doubles = sorted({name for name in names if names.count(name) > 1})
    require(not doubles, f"{option} to name each once", f"{', '.join(doubles)} twice")


def _check_variants(variants: Sequence[Variant], config: Mapping[str, Any], baseline: str) -> None:
    names = [variant.name for variant in variants]
    _refuse_doubles(names, "--variants")
    expected = f"the variant {baseline!r} that the others are compared with to be among --variants"
    require(baseline in names, expected, ",".join(names), advice="Add it, or name another one by --baseline.")
    trainings: list[Any] = []
    for variant in variants:
        training = explicit(merge(config, variant.overlay))
        alike = [repr(name) for name, other in zip(names, trainings, strict=False) if other == training]
        got = f"{''.join(alike)} and {variant.name!r}, which are the same with this configuration"
        require(not alike, "variants that differ", got, advice="Leave one out.")
        trainings.append(training)
        both = [str(one) for one in _shards(training, "train") if one in _shards(training, "validation")]
        require(not both, f"validation shards of {variant.name!r} that it is not trained on", ", ".join(both))


def _shards(config: Mapping[str, Any], split: str) -> list[Any]:
    named = class_of(config, "data")[1].get(split)
    return list(named) if isinstance(named, list | dict) else [named] * (named is not None)


def _settings(folder: Path, config: Mapping[str, Any], share: Share) -> dict[str, Any]:
    """Logger and callbacks that every run gets; `callbacks+` appends."""
    switches = [{**asdict(switch), "name": switch.name} for switch in share.keeps]
    callbacks: dict[str, Any] = {
        "ssync_pl.ValidationSummary": {},
        "ssync_pl.SSyncPictures": {"max_videos": 3, "max_frames": 4},
        "ssync_pl.compare.callbacks.RunRecorder": {},
        "ssync_pl.compare.callbacks.KeepCheckpoints": {"folder": str(folder / "checkpoints"), "switches": switches},
    }
    there = {callback_name(callback) for callback in callbacks_of(config)}
    items = [(path, options) for path, options in callbacks.items() if callback_name(path) not in there]
    added = [{"class_path": path, "init_args": options} for path, options in items]
    # A version of "" puts metrics.csv into the folder itself.
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": str(folder), "name": "", "version": ""}}
    return {"trainer": {"logger": logger, "enable_checkpointing": True, "callbacks+": added}}


def _run(
    asked: Asked, key: RunKey, variant: Variant, config: Mapping[str, Any], texts: Sequence[str], share: Share
) -> Run:
    folder, merged = key.folder(asked.out), merge(config, variant.overlay)
    data, options = class_of(merged, "data")
    files = {"overlay.yaml": variant.overlay, "settings.yaml": _settings(folder, merged, share)}
    command = [sys.executable, "-m", "ssync_pl", "fit"]
    command += [word for path in asked.configs for word in ("--config", str(path))]
    if "callbacks" in variant.overlay.get("trainer", {}):
        # Else a callback of the overlay would keep what the one in its place had, and the overlay leaves out.
        command.append("--trainer.callbacks=null")
    command += [word for name in files for word in ("--config", str(folder / name))]
    command.append(f"--seed_everything={key.seed}")
    if data in _OWN_DATA or "seed" in options:
        command.append(f"--data.init_args.seed={key.seed}")
    if key.slots != class_of(merged, "model")[1].get("num_slots"):
        command.append(f"--model.init_args.num_slots={key.slots}")
    command += ["--trainer.enable_progress_bar=false", *asked.extra]
    # With the slots, so that a folder can hold several; without the seed, which the folder names.
    parts = [__version__, texts, variant.overlay, key.slots, asked.extra]
    recipe = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:12]
    checkpoint = None
    if share.source is not None and share.switch is not None:
        source = key._replace(variant=share.source).folder(asked.out)
        checkpoint = source / "checkpoints" / f"{share.switch.name}.ckpt"
    return Run(key, folder, files, tuple(command), recipe, share.source, checkpoint)
