"""Public configurations of the VideoSAUR family as configurations of `ssync-pl fit`."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from ssync_pl.errors import ConfigError
from ssync_pl.tools.official.data import translate_data
from ssync_pl.tools.official.model import translate_model
from ssync_pl.tools.official.references import read_config
from ssync_pl.tools.official.sections import Findings, Section

__all__ = ["ConvertedConfig", "convert_config", "host_options"]

# Published merging thresholds by data set (project page of SSync)
_THRESHOLDS = {"movi_c": 0.7, "movi_e": 0.65, "ytvis": 0.6, "coco": 0.9}
# Set by the official script itself, whatever the file says
_OWN = ("max_epochs", "check_val_every_n_epoch")


@dataclass(frozen=True)
class ConvertedConfig:
    """A configuration for `ssync-pl fit`, the reasons why parts are left out, and the name of the official file."""

    config: dict[str, Any]
    left_out: dict[str, str]
    source: str

    def to_yaml(self) -> str:
        """Returns YAML; what was left out stands above it as comments."""
        lines = [f"# Converted from {self.source}."]
        if self.left_out:
            lines += ["# Not converted:", *(f"#   {key}: {reason}" for key, reason in self.left_out.items())]
        body = yaml.dump(self.config, Dumper=_Dumper, sort_keys=False, default_flow_style=False, width=120)
        return "\n".join(lines) + "\n" + body


def convert_config(
    path: str | Path,
    *,
    ssync: bool | None = None,
    root: str | None = None,
    changes: Iterable[str] = (),
    ignore: Iterable[str] = (),
) -> ConvertedConfig:
    """Translates an official configuration of VideoSAUR, SlotContrast, SRL or SSync.

    Args:
        path: The official YAML file.
        ssync: Add `SSyncCallback`, with the file's settings or else the published ones; `None` does as the file does.
        root: Folder or URL that the shards lie below; `None` leaves their names as they are.
        changes: `KEY=VALUE` in the official file's own keys, put in before.
        ignore: Keys of the official file (`*` for any part) to leave out although nothing is known about them.

    Returns:
        The configuration, and what was left out.

    Raises:
        ConfigError: There is no such file; a part has no counterpart; unknown keys of model, optimizer or data.
    """
    path, findings = Path(path), Findings()
    file = Section(read_config(path, changes), "", findings)
    missing = [name for name in ("model", "optimizer", "dataset") if file.values.get(name) is None]
    if missing:
        raise ConfigError(
            f"Expected {path} to have the sections model, optimizer and dataset, but {missing[0]} is missing."
        )
    name = str(file.take("experiment_name", ""))
    file.skip("experiment_group", "globals")  # a folder above the run's, and values that are only referred to
    trainer = file.section("trainer")
    max_steps = trainer.integer("max_steps", 100_000)
    data = translate_data(file.section("dataset"), file.section("val_metrics"), root)
    size = data["image_size"] if isinstance(data["image_size"], int) else None
    model = translate_model(file.section("model"), max_steps, size)
    if model.losses.single_frames:
        if data.get("clip_length", 1) != 1:
            raise ConfigError(
                "Expected Img_Slot_Slot_Contrastive_Loss only with clips of one frame, where it is 0, but got clips of "
                f"{data['clip_length']} frames. Take Slot_Slot_Contrastive_Loss."
            )
        model.options.update(contrast_weight=0.0)
        findings.left_out["model.losses.loss_ss"] = "for clips of one frame it is 0 and has no gradient"
    optimizer = _optimizer(file.section("optimizer"), max_steps)
    file.section("train_metrics").leave("metrics are of evaluation only", *file.take("train_metrics", {}))
    # The scripts of SSync and SRL train in mixed half precision, whatever the file says.
    half_precision = model.losses.ssync is not None or any("projector" in key for key in findings.left_out)
    options = _trainer(trainer, max_steps, half_precision)
    checkpoints = {
        "every_n_train_steps": file.integer("checkpoint_every_n_steps", 1_000),
        "filename": "{step}",
        "save_last": True,
    }
    options["callbacks"] = [{"class_path": "ModelCheckpoint", "init_args": checkpoints}]
    if ssync or (ssync is None and model.losses.ssync is not None):
        settings = model.losses.ssync or _published(f"{name} {data.get('train', '')}", findings)
        options["callbacks"].insert(0, {"class_path": "SSyncCallback", "init_args": settings})
    elif model.losses.ssync is not None:
        findings.left_out["SSync's losses"] = "left out as asked"
    seed = file.integer("seed", None)
    if seed is not None:
        data["seed"] = seed
    file.close()
    _refuse_unknown(findings, list(ignore))
    init_args = {**model.options, **optimizer, "has_background": data.get("has_background", True)}
    config = {
        "seed_everything": True if seed is None else seed,
        **({"name": name} if name else {}),
        "trainer": options,
        "model": {"class_path": model.host, "init_args": init_args},
        "data": {"class_path": "ShardDataModule", "init_args": data},
    }
    return ConvertedConfig(config, dict(findings.left_out), path.name)


def host_options(path: str | Path) -> tuple[str, dict[str, Any]]:
    """Reads which host an official configuration describes: its class name and its arguments."""
    tree, findings = read_config(path), Findings()
    steps = Section(tree.get("trainer"), "trainer", findings).integer("max_steps", 100_000)
    model = translate_model(Section(tree.get("model"), "model", findings), steps)
    return model.host, model.options


def _trainer(trainer: Section, max_steps: int, half_precision: bool) -> dict[str, Any]:
    """Arguments of Lightning's Trainer, with the official script's own defaults."""
    import lightning.pytorch as L

    options: dict[str, Any] = {
        "max_steps": max_steps,
        "max_epochs": -1,
        "val_check_interval": trainer.take("val_check_interval", 5_000),
        "check_val_every_n_epoch": None,
        "log_every_n_steps": trainer.integer("log_every_n_steps", 100),
    }
    trainer.leave("training ends by steps, as in the official script", *_OWN)
    trainer.leave("name a strategy, for example ddp_find_unused_parameters_true", "find_unused_parameters")
    trainer.leave("the data module shares out videos itself", "replace_sampler_ddp")
    if half_precision and trainer.values.get("precision") is None:
        options["precision"] = "16-mixed"
    known = inspect.signature(L.Trainer.__init__).parameters
    for name in trainer.values:
        if name in known and name not in options and name not in _OWN:
            options[name] = trainer.take(name, None)
    return options


def _optimizer(optimizer: Section, max_steps: int) -> dict[str, Any]:
    """Arguments of a host: learning rate, warm-up and decay."""
    optimizer.need("name", "Adam", "adam", why="Hosts of this package train with Adam.")
    optimizer.fixed("Hosts of this package have one learning rate.", param_groups=None)
    rate = optimizer.number("lr")
    schedule = optimizer.section("lr_scheduler")
    if not schedule.present:
        return {"learning_rate": rate, "warmup_steps": 0, "decay_rate": 1.0}
    schedule.need("name", "exp_decay_with_warmup", why="Hosts of this family warm up and decay exponentially.")
    steps = schedule.integer("decay_steps", 100_000)
    return {
        "learning_rate": rate,
        "warmup_steps": schedule.integer("warmup_steps", 1_000),
        # Tied to the length of the training in the public files, so that it follows when a user changes that.
        "decay_steps": None if steps == max_steps else steps,
        "decay_rate": schedule.number("decay_rate", 0.5),
    }


def _published(experiment: str, findings: Findings) -> dict[str, Any]:
    """Settings of SSync that were published for a data set."""
    threshold = next((value for name, value in _THRESHOLDS.items() if name in experiment.lower()), None)
    if threshold is None:
        findings.left_out["SSync's merge_threshold"] = "none is published for this set, so it is MOVi-C's; tune it"
    return {"merge_threshold": threshold or 0.7, "warmup_ratio": 0.3}


def _refuse_unknown(findings: Findings, ignore: list[str]) -> None:
    refused = []
    for key in findings.unknown:
        if any(fnmatchcase(key, pattern) for pattern in ignore):
            findings.left_out[key] = "ignored as asked"
        elif key.startswith(("model.", "optimizer.", "dataset.")):
            refused.append(key)
        else:
            findings.left_out[key] = "nothing is known about it"
    if refused:
        raise ConfigError(
            f"Expected keys that have a counterpart in this package, but got {', '.join(refused)}. Remove them, or add "
            f"--ignore {refused[0]} to leave them out."
        )


class _Dumper(yaml.SafeDumper):
    """Lists of single values on one line, as people write them."""


def _list(dumper: _Dumper, values: list[Any]) -> yaml.Node:
    plain = all(isinstance(value, (int, float)) for value in values)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=plain)


_Dumper.add_representer(list, _list)
