"""The runs of a comparison: variants x seeds x slot counts, each with its command.

Until SSync switches on, a run with it is the run without it, to the bit. The run without SSync therefore keeps a
checkpoint from just before the switch, and the runs with SSync start there.
"""

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

from ssync_pl import __version__
from ssync_pl.compare.variants import (
    Variant,
    callback_name,
    callbacks_of,
    class_of,
    make_variant,
    merge,
    read_yaml,
    ssync_defaults,
    ssync_options,
)
from ssync_pl.errors import require

_OWN_DATA = ("SyntheticDataModule", "ShardDataModule")
# Words for `ssync-pl fit` that may change callbacks or data in ways that are not looked into here.
_UNSURE = ("-c", "--config", "--trainer", "--ckpt_path", "--data", "--data.class_path", "--data.init_args.backend")


@dataclass(frozen=True)
class Switch:
    """When a run begins to differ from the one without SSync: `watch` steps before its warm-up ends."""

    ratio: float
    steps: int | None
    watch: int

    @property
    def name(self) -> str:
        """Name of the checkpoint, without its suffix."""
        return f"warmup_{f'{self.ratio:g}' if self.steps is None else f'{self.steps}_steps'}_{self.watch}"


@dataclass(frozen=True)
class Share:
    """What a variant shares: the variant it starts from and when, and the switches it keeps a checkpoint for."""

    source: str | None = None
    switch: Switch | None = None
    keeps: tuple[Switch, ...] = ()


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
    """One training; `checkpoint` of the variant `source` is where it starts, if that is there.

    `recipe` hashes everything in the configuration that decides the result but the seed.
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


def build_matrix(
    configs: Sequence[Path],
    out: Path,
    variants: str = "with,without",
    seeds: str = "3",
    slots: str = "",
    baseline: str = "without",
    share: bool = True,
    extra: Sequence[str] = (),
) -> Matrix:
    """Lays out all runs, as the options of the command say; nothing is written or started."""
    require(bool(configs), "--config FILE, the configuration that is compared", "none")
    config: dict[str, Any] = reduce(merge, map(read_yaml, configs), {})
    model, options = class_of(config, "model")
    class_of(config, "data")
    own: Any = options.get("num_slots")
    known = bool(slots) or isinstance(own, int)
    require(known, f"`num_slots` among the options of {model}, or --slots", repr(own), advice="Write it there.")
    found = [make_variant(name.strip(), config) for name in variants.split(",") if name.strip()]
    _check_variants(found, config, baseline)
    facts: dict[str, Any] = {
        "config": [path.read_text(encoding="utf-8") for path in configs],
        "variants": [{"name": one.name, "description": one.description} for one in found],
        "seeds": _numbers(seeds, "--seeds", 0) if "," in seeds else [*range(_numbers(seeds, "--seeds", 1)[0])],
        "slots": _numbers(slots, "--slots", 1) if slots else [own],
        "baseline": baseline,
        "extra": list(extra),
        "version": __version__,
    }
    plan = plan_sharing(found, config, extra) if share else {}
    runs = [
        _run(configs, out, facts, RunKey(count, variant.name, seed), variant, config, plan.get(variant.name, Share()))
        for count in facts["slots"]
        for seed in facts["seeds"]
        for variant in found
    ]
    return Matrix(tuple(runs), facts)


def _numbers(text: str, option: str, least: int) -> list[int]:
    """Reads whole numbers from `least` on with commas between them, each once."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    valid = bool(parts) and all(part.isdecimal() and int(part) >= least for part in parts)
    require(valid, f"{option} to be whole numbers from {least} on, as in 7,11", repr(text))
    _refuse_doubles(parts, option)
    return [int(part) for part in parts]


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
        training = merge(config, variant.overlay)
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
    configs: Sequence[Path],
    out: Path,
    facts: Mapping[str, Any],
    key: RunKey,
    variant: Variant,
    config: Mapping[str, Any],
    share: Share,
) -> Run:
    folder, merged = key.folder(out), merge(config, variant.overlay)
    data, options = class_of(merged, "data")
    files = {"overlay.yaml": variant.overlay, "settings.yaml": _settings(folder, merged, share)}
    command = [sys.executable, "-m", "ssync_pl", "fit"]
    command += [word for path in configs for word in ("--config", str(path))]
    if "callbacks" in (variant.overlay.get("trainer") or {}):
        # Else a callback of the overlay would keep what the one in its place had, and the overlay leaves out.
        command.append("--trainer.callbacks=null")
    command += [word for name in files for word in ("--config", str(folder / name))]
    command.append(f"--seed_everything={key.seed}")
    if data in _OWN_DATA or "seed" in options:
        command.append(f"--data.init_args.seed={key.seed}")
    if key.slots != class_of(merged, "model")[1].get("num_slots"):
        command.append(f"--model.init_args.num_slots={key.slots}")
    command += ["--trainer.enable_progress_bar=false", *facts["extra"]]
    # With the slots, so that a folder can hold several; without the seed, which the folder names.
    parts = [*(facts[name] for name in ("version", "config", "extra")), variant.overlay, key.slots]
    recipe = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:12]
    checkpoint = None
    if share.source is not None and share.switch is not None:
        source = key._replace(variant=share.source).folder(out)
        checkpoint = source / "checkpoints" / f"{share.switch.name}.ckpt"
    return Run(key, folder, files, tuple(command), recipe, share.source, checkpoint)


def plan_sharing(variants: Sequence[Variant], config: Mapping[str, Any], extra: Sequence[str] = ()) -> dict[str, Share]:
    """Finds for each variant, by name, what it shares until SSync switches on.

    Nothing where `extra` words may change callbacks, or data cannot resume exactly. Variants without SSync also keep
    the checkpoint that the configuration itself would start from, so that a comparison that grows finds it.
    """
    unsure = any("callbacks" in word or word.split("=")[0] in _UNSURE for word in extra)
    if unsure or not _resumes_exactly(config):
        return {variant.name: Share() for variant in variants}
    merged = {variant.name: merge(config, variant.overlay) for variant in variants}
    trunks = {name: _without_ssync(one) for name, one in merged.items()}
    sources = {trunks[name]: name for name in reversed(merged) if not ssync_options(merged[name])}
    plan = {}
    for name, trunk in trunks.items():
        source, switch = sources.get(trunk), _switch(merged[name])
        if source == name:
            alike = [config] * (_without_ssync(config) == trunk)
            alike += [merged[other] for other in trunks if trunks[other] == trunk]
            plan[name] = Share(keeps=tuple(dict.fromkeys(one for one in map(_switch, alike) if one is not None)))
        else:
            plan[name] = Share(source, switch) if source and switch else Share()
    return plan


def _resumes_exactly(config: Mapping[str, Any]) -> bool:
    """Whether the training videos are surely mapped shards; streams resume at the border of a shard."""
    data, options = class_of(config, "data")
    backend, train = options.get("backend", "auto"), options.get("train")
    names = train if isinstance(train, list) else [train]
    plain = all(isinstance(name, str) and name.endswith(".tar") and ":" not in name for name in names)
    mapped = data == "SyntheticDataModule" or (data == "ShardDataModule" and (plain or backend == "mmap"))
    return mapped and backend != "webdataset"


def _switch(config: Mapping[str, Any]) -> Switch | None:
    callbacks = ssync_options(config)
    if len(callbacks) != 1:
        return None
    given = {name: value for name, value in callbacks[0].items() if value is not None}
    options = {"warmup_steps": None, **ssync_defaults(str(given.get("mode", "published"))), **given}
    ratio, steps, watch = options["warmup_ratio"], options["warmup_steps"], options["guard_window"]
    if not isinstance(ratio, int | float) or not isinstance(watch, int) or not isinstance(steps, int | None):
        return None
    return Switch(float(ratio), steps, watch) if (steps or (steps is None and ratio > 0)) else None


def _without_ssync(config: Mapping[str, Any]) -> str:
    trainer = dict(config.get("trainer") or {})
    trainer["callbacks"] = [one for one in callbacks_of(config) if callback_name(one) != "SSyncCallback"]
    return json.dumps({**config, "trainer": trainer}, sort_keys=True, default=str)
