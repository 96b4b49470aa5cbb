"""The runs of a comparison: variants x seeds x slot counts x data sets, each with its command."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

from ssync_pl import __version__
from ssync_pl.compare.configs import callback_name, callbacks_of, class_of, merge, read_yaml
from ssync_pl.compare.sharing import Share, plan_sharing
from ssync_pl.compare.variants import Variant, make_variant
from ssync_pl.errors import ConfigError

__all__ = ["Asked", "DataSet", "Matrix", "Run", "build_matrix", "parse_numbers", "parse_seeds", "run_folder"]

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
    steps: int | None = None
    device: str = "auto"
    data: Path | None = None
    extra: tuple[str, ...] = ()
    share: bool = True


@dataclass(frozen=True)
class DataSet:
    """A data set: its name, files and words for `ssync-pl fit`, and what they change as a dict."""

    name: str
    files: tuple[Path, ...] = ()
    words: tuple[str, ...] = ()
    changes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One training.

    `files` are configuration files that are written into its folder, `recipe` hashes everything in the configuration
    that decides the result but the seed, and `checkpoint` of the variant `source` is where it starts, if that is there.
    """

    set: str
    slots: int
    variant: str
    seed: int
    folder: Path
    files: Mapping[str, Mapping[str, Any]]
    command: tuple[str, ...]
    recipe: str
    source: str | None = None
    checkpoint: Path | None = None

    @property
    def label(self) -> str:
        """Name of the run in messages."""
        return f"{self.set}, {self.slots} slots, {self.variant}, seed {self.seed}"


@dataclass(frozen=True)
class Matrix:
    """All runs of a comparison, the variants of a seed beside each other, and the words that make each data set."""

    asked: Asked
    sets: tuple[DataSet, ...]
    slots: tuple[int, ...]
    variants: tuple[Variant, ...]
    runs: tuple[Run, ...]
    prepare: Mapping[str, tuple[str, ...]]
    texts: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns what `matrix.json` holds."""
        return {
            "config": list(self.texts),
            "config_files": [str(path) for path in self.asked.configs],
            "variants": [{"name": one.name, "description": one.description} for one in self.variants],
            "seeds": list(self.asked.seeds),
            "slots": list(self.slots),
            "sets": [one.name for one in self.sets],
            "baseline": self.asked.baseline,
            "steps": self.asked.steps,
            "extra": list(self.asked.extra),
            "version": __version__,
        }


def build_matrix(asked: Asked) -> Matrix:
    """Lays out all runs; nothing is written or started."""
    if not asked.configs:
        raise ConfigError("Expected --config FILE, the configuration that is compared, but got none.")
    _refuse_doubles(asked.variants, "--variants")
    config: dict[str, Any] = reduce(merge, map(read_yaml, asked.configs), {})
    class_of(config, "model")
    class_of(config, "data")
    sets = tuple(_data_set(name, config) for name in asked.sets) or (DataSet("default"),)
    _refuse_doubles([one.name for one in sets], "--sets")
    slots = asked.slots or (_slots_of(config),)
    texts = tuple(path.read_text(encoding="utf-8") for path in asked.configs)
    runs: list[Run] = []
    prepare: dict[str, tuple[str, ...]] = {}
    variants: tuple[Variant, ...] = ()
    for data_set in sets:
        of_set = merge(config, data_set.changes)
        made = tuple(make_variant(name, of_set) for name in asked.variants)
        _check_variants(made, asked.baseline)
        variants = variants or made
        plan = plan_sharing(made, of_set, asked.extra) if asked.share else {}
        files = _config_words((*asked.configs, *data_set.files))
        prepare[data_set.name] = (*files, *data_set.words, *_data_words(asked, of_set), *asked.extra)
        runs += [
            _run(asked, data_set, count, variant, seed, of_set, texts, plan.get(variant.name, Share()))
            for count in slots
            for seed in asked.seeds
            for variant in made
        ]
    return Matrix(asked, sets, slots, variants, tuple(runs), prepare, texts)


def run_folder(out: Path, set_name: str, slots: int, variant: str, seed: int) -> Path:
    """Returns the folder of a run."""
    return out / "runs" / set_name / f"slots_{slots}" / variant / f"seed_{seed}"


def parse_seeds(text: str) -> tuple[int, ...]:
    """Reads `--seeds`: a number N for the seeds 0 to N-1, or a list like `3,4`; `3,` is the seed 3 alone."""
    if "," in text:
        return parse_numbers(text, "--seeds", least=0)
    if not text.strip().isdecimal() or int(text) < 1:
        raise ConfigError(f"Expected --seeds to be a number of seeds from 1 on, or a list like 3,4, but got {text!r}.")
    return tuple(range(int(text)))


def parse_numbers(text: str, option: str, least: int = 1) -> tuple[int, ...]:
    """Reads whole numbers from `least` on with commas between them, each once."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or any(not part.isdecimal() or int(part) < least for part in parts):
        raise ConfigError(f"Expected {option} to be whole numbers from {least} on, as in 7,11, but got {text!r}.")
    _refuse_doubles(parts, option)
    return tuple(int(part) for part in parts)


def _refuse_doubles(names: Sequence[str], option: str) -> None:
    doubles = sorted({name for name in names if list(names).count(name) > 1})
    if doubles:
        raise ConfigError(f"Expected {option} to name each once, but got {', '.join(doubles)} twice.")


def _data_set(name: str, config: Mapping[str, Any]) -> DataSet:
    """`default`, a preset of the synthetic data, or a YAML file."""
    if name == "default":
        return DataSet("default")
    if name.endswith((".yaml", ".yml")):
        return DataSet(Path(name).stem, files=(Path(name),), changes=read_yaml(name, "--sets"))
    from ssync_pl.data.synthetic import PRESETS

    if name not in PRESETS:
        known = ", ".join(PRESETS)
        raise ConfigError(f"Expected --sets to be among {known}, or paths of YAML files, but got {name!r}.")
    data, options = class_of(config, "data")
    if data != "SyntheticDataModule":
        raise ConfigError(
            f"Expected data of SyntheticDataModule for the preset {name!r} of --sets, but the configuration has "
            f"{data}. Name a YAML file with the other data."
        )
    if options.get("preset", "a") == name:
        return DataSet(name)
    changes: dict[str, Any] = {"preset": name}
    if options.get("scene") is not None:
        changes["scene"] = None  # it was made for the configuration's own preset, and would undo this one
    words = tuple(f"--data.init_args.{key}={'null' if value is None else value}" for key, value in changes.items())
    return DataSet(name, words=words, changes={"data": {"init_args": changes}})


def _check_variants(variants: Sequence[Variant], baseline: str) -> None:
    names = [variant.name for variant in variants]
    _refuse_doubles(names, "--variants")
    if baseline not in names:
        raise ConfigError(
            f"Expected the variant {baseline!r} that the others are compared with to be among --variants "
            f"{','.join(names)}. Add it, or name another one by --baseline."
        )
    for place, variant in enumerate(variants):
        for other in variants[:place]:
            if variant.overlay == other.overlay:
                raise ConfigError(
                    f"Expected variants that differ, but {other.name!r} and {variant.name!r} are the same training "
                    "with this configuration. Leave one out."
                )


def _slots_of(config: Mapping[str, Any]) -> int:
    model, options = class_of(config, "model")
    count = options.get("num_slots")
    if not isinstance(count, int):
        raise ConfigError(
            f"Expected `num_slots` among the options of {model} in the configuration, but got {count!r}. Write it "
            "there."
        )
    return count


def _config_words(paths: Sequence[Path]) -> list[str]:
    return [word for path in paths for word in ("--config", str(path))]


def _data_words(asked: Asked, config: Mapping[str, Any]) -> list[str]:
    if asked.data is None:
        return []
    data, options = class_of(config, "data")
    if data != "SyntheticDataModule" and "root" not in options:
        raise ConfigError(
            f"Expected generated data for --data, but the configuration has {data}, which has no `root`. Leave it out."
        )
    return [f"--data.init_args.root={asked.data}"]


def _step_words(steps: int | None, config: Mapping[str, Any]) -> list[str]:
    """Another number of steps, with a validation at the end."""
    if steps is None:
        return []
    trainer = config.get("trainer") or {}
    # The interval counts batches, several of which make a step when gradients are accumulated.
    batches = steps * int(trainer.get("accumulate_grad_batches") or 1)
    parts = next((parts for parts in (4, 3, 5, 2) if batches % parts == 0), 1)
    return [
        f"--trainer.max_steps={steps}",
        "--trainer.max_epochs=-1",
        "--trainer.check_val_every_n_epoch=null",
        f"--trainer.val_check_interval={batches // parts}",
    ]


def _settings(folder: Path, config: Mapping[str, Any], share: Share) -> dict[str, Any]:
    """Logger and callbacks that every run gets; `callbacks+` appends."""
    callbacks: list[dict[str, Any]] = []
    if not any(callback_name(callback) == "ValidationSummary" for callback in callbacks_of(config)):
        callbacks.append({"class_path": "ssync_pl.tools.summary.ValidationSummary", "init_args": {"untrained": True}})
    callbacks.append({"class_path": "ssync_pl.compare.recorder.RunRecorder"})
    switches = [{**asdict(switch), "name": switch.name} for switch in share.keeps]
    keeps = {"folder": str(folder / "checkpoints"), "switches": switches}
    callbacks.append({"class_path": "ssync_pl.compare.checkpoints.KeepCheckpoints", "init_args": keeps})
    # A version of "" puts metrics.csv into the folder itself.
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": str(folder), "name": "", "version": ""}}
    return {"trainer": {"logger": logger, "enable_checkpointing": True, "callbacks+": callbacks}}


def _run(
    asked: Asked,
    data_set: DataSet,
    slots: int,
    variant: Variant,
    seed: int,
    config: Mapping[str, Any],
    texts: Sequence[str],
    share: Share,
) -> Run:
    folder = run_folder(asked.out, data_set.name, slots, variant.name, seed)
    merged = merge(config, variant.overlay)
    data, options = class_of(merged, "data")
    overlays = (folder / "overlay.yaml", folder / "settings.yaml")
    command = [sys.executable, "-m", "ssync_pl", "fit", *_config_words((*asked.configs, *data_set.files))]
    if "callbacks" in variant.overlay.get("trainer", {}):
        # Else a callback of the overlay would keep what the one in its place had, and the overlay leaves out.
        command.append("--trainer.callbacks=null")
    command += [*_config_words(overlays), *data_set.words, f"--seed_everything={seed}"]
    if data in _OWN_DATA or "seed" in options:
        command.append(f"--data.init_args.seed={seed}")
    command += _data_words(asked, merged)
    if slots != class_of(merged, "model")[1].get("num_slots"):
        command.append(f"--model.init_args.num_slots={slots}")
    command += [*_step_words(asked.steps, merged), "--trainer.enable_progress_bar=false"]
    if asked.device != "auto":
        command.append(f"--trainer.accelerator={'gpu' if asked.device == 'cuda' else 'cpu'}")
    command += asked.extra
    # With the slots and the set, so that a folder can hold several; without the seed, which the folder names, and
    # without device and root of the data: the rows name the device, and a set is the same under every root.
    parts = [__version__, list(texts), data_set.changes, variant.overlay, slots, asked.steps, list(asked.extra)]
    recipe = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:12]
    checkpoint = None
    if share.source is not None and share.switch is not None:
        source = run_folder(asked.out, data_set.name, slots, share.source, seed)
        checkpoint = source / "checkpoints" / f"{share.switch.name}.ckpt"
    files = {"overlay.yaml": variant.overlay, "settings.yaml": _settings(folder, merged, share)}
    name = data_set.name
    return Run(name, slots, variant.name, seed, folder, files, tuple(command), recipe, share.source, checkpoint)
