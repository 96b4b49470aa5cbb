"""Public configurations of the VideoSAUR family as configurations of `ssync-pl fit`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from ssync_pl.errors import ConfigError
from ssync_pl.tools.official.data import translate_data
from ssync_pl.tools.official.interpolation import read_config
from ssync_pl.tools.official.model import translate_model
from ssync_pl.tools.official.sections import Findings, Section
from ssync_pl.tools.official.training import published_ssync, translate_optimizer, translate_trainer

__all__ = ["ConvertedConfig", "convert_config"]


@dataclass(frozen=True)
class ConvertedConfig:
    """A configuration for `ssync-pl fit`, and what did not go into it.

    Attributes:
        config: The configuration.
        left_out: Key of the official file → why it has no counterpart.
        source: Name of the official file.

    Example:
        >>> print(ConvertedConfig({"seed_everything": 3}, {"model.visualize": "no pictures"}, "a.yaml").to_yaml())
        # Converted from a.yaml.
        # Not converted:
        #   model.visualize: no pictures
        seed_everything: 3
        <BLANKLINE>
    """

    config: dict[str, Any]
    left_out: dict[str, str]
    source: str

    def to_yaml(self) -> str:
        """Write the configuration down.

        Returns:
            YAML; what was left out stands above it as comments.
        """
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
    """Translate an official configuration of VideoSAUR, SlotContrast, SRL or SSync.

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

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp(prefix="ssync-doctest-")) / "a.yaml"
        >>> _ = file.write_text("model: {input_type: sound}\\noptimizer: {name: Adam, lr: 1e-4}\\ndataset: {}")
        >>> convert_config(file)
        Traceback (most recent call last):
            ...
        ssync_pl.errors.ConfigError: Expected model.input_type to be 'image' or 'video', but got 'sound'. Hosts of \
this package take images or videos.
    """
    path = Path(path)
    findings = Findings()
    root_section = Section(read_config(path, changes), "", findings)
    for needed in ("model", "optimizer", "dataset"):
        if root_section.values.get(needed) is None:
            raise ConfigError(
                f"Expected {path} to have the sections model, optimizer and dataset, but {needed} is missing."
            )
    name = str(root_section.take("experiment_name", ""))
    root_section.take("experiment_group", None)  # a folder above the run's
    root_section.take("globals", None)  # only there to be referred to
    trainer = root_section.section("trainer")
    max_steps = trainer.integer("max_steps", 100_000)
    data = translate_data(root_section.section("dataset"), root_section.section("val_metrics"), root)
    model_section = root_section.section("model")
    size = data["image_size"] if isinstance(data["image_size"], int) else None
    model = translate_model(model_section, max_steps, size)
    if model.losses.single_frames:
        _need_single_frames(data)
        model.options.update(contrast_weight=0.0)
        findings.leave("model.losses.loss_ss", "for clips of one frame it is 0 and has no gradient")
    optimizer = translate_optimizer(root_section.section("optimizer"), max_steps)
    has_ssync = model.losses.ssync is not None
    is_srl = any("projector" in key for key in findings.left_out)
    options = translate_trainer(trainer, half_precision=has_ssync or is_srl)
    root_section.section("train_metrics").leave(
        "metrics are of evaluation only", *root_section.take("train_metrics", {})
    )
    callbacks: list[dict[str, Any]] = [
        {
            "class_path": "ModelCheckpoint",
            "init_args": {
                "every_n_train_steps": root_section.integer("checkpoint_every_n_steps", 1_000),
                "filename": "{step}",
                "save_last": True,
            },
        }
    ]
    if has_ssync if ssync is None else ssync:
        settings = model.losses.ssync or published_ssync(f"{name} {data.get('train', '')}")
        if settings is None:
            settings = {"merge_threshold": 0.7, "warmup_ratio": 0.3}
            findings.leave("SSync's merge_threshold", "none is published for this set, so it is MOVi-C's; tune it")
        callbacks.insert(0, {"class_path": "SSyncCallback", "init_args": settings})
    elif has_ssync:
        findings.leave("SSync's losses", "left out as asked")
    options["callbacks"] = callbacks
    seed = root_section.integer("seed", None)
    if seed is not None:
        data["seed"] = seed
    root_section.close()
    _refuse_unknown(findings, list(ignore))
    init_args = {**model.options, **optimizer, "has_background": data.get("has_background", True)}
    config: dict[str, Any] = {"seed_everything": True if seed is None else seed}
    if name:
        config["name"] = name
    config |= {
        "trainer": options,
        "model": {"class_path": model.host, "init_args": init_args},
        "data": {"class_path": "ShardDataModule", "init_args": data},
    }
    return ConvertedConfig(config, dict(findings.left_out), path.name)


def _need_single_frames(data: dict[str, Any]) -> None:
    if data.get("clip_length", 1) != 1:
        raise ConfigError(
            "Expected Img_Slot_Slot_Contrastive_Loss only with clips of one frame, where it is 0, but got clips of "
            f"{data['clip_length']} frames. Take Slot_Slot_Contrastive_Loss."
        )


def _refuse_unknown(findings: Findings, ignore: list[str]) -> None:
    refused = []
    for key in findings.unknown:
        if any(fnmatchcase(key, pattern) for pattern in ignore):
            findings.leave(key, "ignored as asked")
        elif key.startswith(("model.", "optimizer.", "dataset.")):
            refused.append(key)
        else:
            findings.leave(key, "nothing is known about it")
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
