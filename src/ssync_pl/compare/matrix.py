"""The runs of a comparison: variants x seeds x slot counts x data sets, each with its command."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssync_pl import __version__
from ssync_pl.compare.merging import class_of, merge, merge_all, read_yaml
from ssync_pl.compare.sets import DataSet, data_set_of, refuse_doubles
from ssync_pl.compare.settings import run_settings, step_words
from ssync_pl.compare.sharing import Share, plan_sharing
from ssync_pl.compare.variants import Variant, make_variant
from ssync_pl.errors import ConfigError

__all__ = ["Asked", "Matrix", "Run", "build_matrix"]

_OWN_DATA = ("SyntheticDataModule", "ShardDataModule")
RECORDER = "ssync_pl.compare.recorder.RunRecorder"


@dataclass(frozen=True)
class Asked:
    """What a comparison is asked for; one field an option of the command.

    Args:
        configs: Configuration files, the later ones over the earlier ones.
        out: Folder of the comparison.
        variants: Names of variants.
        seeds: Seeds.
        slots: Slot counts; empty takes the configuration's.
        sets: Names of presets or paths of YAML files; empty takes the configuration's data.
        baseline: Variant that the differences are against.
        steps: Optimizer steps, or None for the configuration's.
        device: `auto` (the configuration's), `cpu` or `cuda`.
        data: Root of generated data, or None for the configuration's.
        extra: Words for `ssync-pl fit`.
        recorder: Class path of the callback that writes `evaluation.json`.
        keep_steps: Steps between checkpoints, beside those that are taken about every minute.
        share: Runs that are the same until SSync switches on have that part trained once.

    Example:
        >>> Asked((Path("a.yaml"),), Path("out")).variants
        ('with', 'without')
    """

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
    recorder: str = RECORDER
    keep_steps: int | None = None
    share: bool = True


@dataclass(frozen=True)
class Run:
    """One training.

    Args:
        set: Name of its data set.
        slots: Its slots.
        variant: Name of its variant.
        seed: Its seed.
        folder: Where its files go.
        overlay: What the variant lays over the configuration.
        settings: Logger and callbacks that every run gets.
        command: Words of its process.
        recipe: Hash of everything in the configuration that decides the result, but the seed. Device and root of the
            data are left out: the rows name the device, and a set is the same under every root.
        shared: Checkpoint of another run from which this one may go on, once it is there.

    Example:
        >>> Run("default", 7, "with", 0, Path("x"), {}, {}, ("a",), "hash").label
        'default, 7 slots, with, seed 0'
    """

    set: str
    slots: int
    variant: str
    seed: int
    folder: Path
    overlay: Mapping[str, Any]
    settings: Mapping[str, Any]
    command: tuple[str, ...]
    recipe: str
    shared: Path | None = None

    @property
    def label(self) -> str:
        """Name of the run in messages."""
        return f"{self.set}, {self.slots} slots, {self.variant}, seed {self.seed}"


@dataclass(frozen=True)
class Matrix:
    """All runs of a comparison.

    Args:
        asked: What was asked.
        sets: The data sets.
        slots: The slot counts.
        variants: The variants of the first set and slot count, by which they are described.
        runs: The runs, all variants of a seed beside each other.
        prepare: For each set, the command that renders its videos and stores its features.
        texts: Content of the configuration files.

    Example:
        >>> Matrix(Asked((), Path("out")), (), (), (), (), {}, ()).runs
        ()
    """

    asked: Asked
    sets: tuple[DataSet, ...]
    slots: tuple[int, ...]
    variants: tuple[Variant, ...]
    runs: tuple[Run, ...]
    prepare: Mapping[str, tuple[str, ...]]
    texts: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """What `matrix.json` holds.

        Returns:
            Values of JSON.
        """
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
    """Lay out all runs; nothing is written or started.

    Args:
        asked: What was asked.

    Returns:
        The runs.

    Raises:
        ConfigError: A configuration file, variant, set or baseline is not there or does not fit.

    Example:
        >>> build_matrix(Asked((), Path("out")))
        Traceback (most recent call last):
            ...
        ssync_pl.errors.ConfigError: Expected --config FILE, the configuration that is compared, but got none.
    """
    if not asked.configs:
        raise ConfigError("Expected --config FILE, the configuration that is compared, but got none.")
    refuse_doubles(asked.variants, "--variants")
    refuse_doubles(asked.sets, "--sets")
    config = merge_all(read_yaml(path) for path in asked.configs)
    class_of(config, "model")
    class_of(config, "data")
    sets = tuple(data_set_of(name, config) for name in asked.sets) or (DataSet("default"),)
    refuse_doubles([one.name for one in sets], "--sets")
    slots = asked.slots or (_slots_of(config),)
    texts = tuple(path.read_text(encoding="utf-8") for path in asked.configs)
    runs: list[Run] = []
    variants: tuple[Variant, ...] = ()
    for data_set in sets:
        of_set = merge(config, data_set.changes)
        made = tuple(make_variant(name, of_set) for name in asked.variants)
        _check_names(made, asked.baseline)
        variants = variants or made
        plan = plan_sharing(made, of_set, asked.extra) if asked.share else {}
        for count in slots:
            for seed in asked.seeds:
                for variant in made:
                    share = plan.get(variant.name, Share())
                    runs.append(_run(asked, data_set, count, variant, seed, of_set, texts, share))
    prepare = {one.name: tuple(_prepare_command(asked, one)) for one in sets}
    return Matrix(asked, sets, slots, variants, tuple(runs), prepare, texts)


def _check_names(variants: Sequence[Variant], baseline: str) -> None:
    names = [variant.name for variant in variants]
    refuse_doubles(names, "--variants")
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


def _data_words(asked: Asked, config: Mapping[str, Any]) -> list[str]:
    if asked.data is None:
        return []
    data, options = class_of(config, "data")
    if data != "SyntheticDataModule" and "root" not in options:
        raise ConfigError(
            f"Expected generated data for --data, but the configuration has {data}, which has no `root`. Leave it out."
        )
    return [f"--data.init_args.root={asked.data}"]


def _config_words(asked: Asked, data_set: DataSet) -> list[str]:
    return [word for path in (*asked.configs, *data_set.files) for word in ("--config", str(path))]


def _prepare_command(asked: Asked, data_set: DataSet) -> list[str]:
    config = merge(merge_all(read_yaml(path) for path in asked.configs), data_set.changes)
    command = [sys.executable, "-m", "ssync_pl.compare.prepare", *_config_words(asked, data_set)]
    return [*command, *data_set.words, *_data_words(asked, config), *asked.extra]


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
    folders = asked.out / "runs" / data_set.name / f"slots_{slots}"
    folder = folders / variant.name / f"seed_{seed}"
    merged = merge(config, variant.overlay)
    data, options = class_of(merged, "data")
    command = [sys.executable, "-m", "ssync_pl", "fit", *_config_words(asked, data_set)]
    if "callbacks" in variant.overlay.get("trainer", {}):
        # Else a callback of the overlay would keep what the one in its place had, and the overlay leaves out.
        command.append("--trainer.callbacks=null")
    command += ["--config", str(folder / "overlay.yaml"), "--config", str(folder / "settings.yaml")]
    command += [*data_set.words, f"--seed_everything={seed}"]
    if data in _OWN_DATA or "seed" in options:
        command.append(f"--data.init_args.seed={seed}")
    command += _data_words(asked, merged)
    if slots != class_of(merged, "model")[1].get("num_slots"):
        command.append(f"--model.init_args.num_slots={slots}")
    command += [*step_words(asked.steps, merged), "--trainer.enable_progress_bar=false"]
    if asked.device != "auto":
        command.append(f"--trainer.accelerator={'gpu' if asked.device == 'cuda' else 'cpu'}")
    command += asked.extra
    # With the slots and the set, so that a folder can hold several; without the seed, which the folder names.
    parts = [__version__, list(texts), data_set.changes, variant.overlay, slots, asked.steps, list(asked.extra)]
    recipe = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:12]
    switches = [switch.to_settings() for switch in share.keeps]
    settings = run_settings(folder, merged, asked.recorder, asked.keep_steps, switches)
    shared = None
    if share.source is not None and share.switch is not None:
        shared = folders / share.source / f"seed_{seed}" / "checkpoints" / f"{share.switch.name}.ckpt"
    words = tuple(command)
    return Run(data_set.name, slots, variant.name, seed, folder, variant.overlay, settings, words, recipe, shared)
