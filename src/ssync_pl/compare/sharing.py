"""Warm-ups that runs have in common: trained once, by the run without SSync.

Until SSync switches on, a run with it is the run without it, to the bit. So the run without it keeps a checkpoint from
just before that, and the runs with it go on from there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ssync_pl.compare.merging import callback_name, callbacks_of, class_of, merge
from ssync_pl.compare.variants import DEFAULTS, Variant
from ssync_pl.data.files import write_bytes
from ssync_pl.errors import ConfigError

__all__ = ["Share", "Switch", "plan_sharing", "refuse_late", "shared_steps", "take_over"]


_UNSURE = ("-c", "--config", "--trainer", "--ckpt_path", "--data", "--data.class_path")
# What can go on in the middle of a pass. Another module may draw other batches there.
_RESUMABLE = ("SyntheticDataModule", "ShardDataModule")


@dataclass(frozen=True)
class Switch:
    """When a run begins to differ from the one without SSync.

    Args:
        ratio: Its `warmup_ratio`.
        steps: Its `warmup_steps`, which takes the ratio's place.
        watch: Steps before the end of the warm-up in which slots are counted.

    Example:
        >>> Switch(0.5, None, 50).name, Switch(0.3, 200, 50).name
        ('warmup_0.5_50', 'warmup_200_steps_50')
    """

    ratio: float
    steps: int | None
    watch: int

    @property
    def name(self) -> str:
        """Name of the checkpoint, without its suffix."""
        return f"warmup_{f'{self.ratio:g}' if self.steps is None else f'{self.steps}_steps'}_{self.watch}"

    def to_settings(self) -> dict[str, Any]:
        """What `KeepRun` is told.

        Returns:
            Values of YAML.

        Example:
            >>> Switch(0.5, None, 50).to_settings()
            {'ratio': 0.5, 'steps': None, 'watch': 50, 'name': 'warmup_0.5_50'}
        """
        return {**asdict(self), "name": self.name}


@dataclass(frozen=True)
class Share:
    """What a variant shares with another one.

    Args:
        source: Name of the variant whose warm-up it takes over; None for none.
        switch: When it begins to differ from that one.
        keeps: When others go on from this one.

    Example:
        >>> Share().source is None
        True
    """

    source: str | None = None
    switch: Switch | None = None
    keeps: tuple[Switch, ...] = ()


def plan_sharing(variants: Sequence[Variant], config: Mapping[str, Any], extra: Sequence[str] = ()) -> dict[str, Share]:
    """Find the variants that are the same training until SSync switches on.

    Args:
        variants: The variants.
        config: The configuration that they are laid over.
        extra: Words for `ssync-pl fit`. Where they may change callbacks, nothing is shared; nor where the data module
            is one that may not go on in the middle of a pass.

    Returns:
        For each name what it shares. Variants without SSync also keep what the configuration itself would take over,
        so that a comparison that grows finds it.

    Example:
        >>> callback = {"class_path": "SSyncCallback", "init_args": {"warmup_ratio": 0.5}}
        >>> config = {"trainer": {"callbacks": [callback]}, "data": {"class_path": "ShardDataModule"}}
        >>> plain = Variant("without", "", {"trainer": {"callbacks": []}})
        >>> plan = plan_sharing([Variant("with", "", {}), plain], config)
        >>> plan["with"].source, plan["with"].switch.name, len(plan["without"].keeps)
        ('without', 'warmup_0.5_50', 1)
    """
    data, _ = class_of(config, "data")
    unsure = any("callbacks" in word or word.split("=")[0] in _UNSURE for word in extra)
    if unsure or data not in _RESUMABLE:
        return {variant.name: Share() for variant in variants}
    merged = {variant.name: merge(config, variant.overlay) for variant in variants}
    switches = {name: _switch(one) for name, one in merged.items()}
    sources: dict[str, str] = {}
    for name, one in merged.items():
        if not _ssync(one):
            sources.setdefault(_trunk(one), name)
    plan = {}
    for name, one in merged.items():
        key, switch = _trunk(one), switches[name]
        keeps: list[Switch] = []
        if sources.get(key) == name:
            own = _switch(config) if _trunk(config) == key else None
            found = [own, *(switches[other] for other, its in merged.items() if _trunk(its) == key)]
            keeps = list(dict.fromkeys(entry for entry in found if entry is not None))
        source = sources.get(key) if switch is not None else None
        plan[name] = Share(source, switch if source else None, tuple(keeps))
    return plan


def shared_steps(checkpoint: Path | None) -> tuple[int, int] | None:
    """Say how much of a training a kept checkpoint saves.

    Args:
        checkpoint: Its path, or None.

    Returns:
        Steps that were trained, and all steps; None when it is not there (yet).

    Example:
        >>> shared_steps(None) is None
        True
    """
    if checkpoint is None or not checkpoint.is_file():
        return None
    source = checkpoint.parent.parent
    # Else that run will begin anew, and take its checkpoints away.
    if not (checkpoint.parent / "last.ckpt").is_file() or not (
        (source / "run.json").is_file() or (source / "started.json").is_file()
    ):
        return None
    try:
        facts = json.loads(checkpoint.with_suffix(".json").read_text(encoding="utf-8"))
        return int(facts["step"]), int(facts["total"])
    except (FileNotFoundError, json.JSONDecodeError, KeyError, TypeError):
        return None


def take_over(checkpoint: Path, folder: Path) -> None:
    """Put the learning curve of the warm-up where the curve of a run that goes on is kept.

    Args:
        checkpoint: The checkpoint, with its curve beside it.
        folder: Folder of the run that goes on from it.
    """
    curve = checkpoint.with_suffix(".csv")
    if curve.is_file():
        write_bytes(folder / "metrics_before.csv", curve.read_bytes())


def refuse_late(start: int, step: int, here: Mapping[str, Any], there: Mapping[str, Any]) -> None:
    """Refuse a warm-up that is not what this run would have trained itself.

    Args:
        start: First step in which this run would have differed.
        step: Steps that the warm-up holds.
        here: Length of the training, device and version of this run.
        there: The same of the run that trained the warm-up.

    Raises:
        ConfigError: The warm-up is too long, or was made in another way.

    Example:
        >>> refuse_late(100, 95, {"total": 200}, {"total": 200})
        >>> refuse_late(90, 95, {"total": 200}, {"total": 200})
        Traceback (most recent call last):
            ...
        ssync_pl.errors.ConfigError: Expected SSync to be off in the 95 steps that this run takes over from the run \
without it, but it counts slots from step 90 on. Pass --no-sharing.
    """
    for name, value in here.items():
        if there.get(name) != value:
            raise ConfigError(
                f"Expected the warm-up that this run takes over to have been trained with {name} {value}, but it was "
                f"with {there.get(name)}. Pass --no-sharing."
            )
    if start < step:
        raise ConfigError(
            f"Expected SSync to be off in the {step} steps that this run takes over from the run without it, but it "
            f"counts slots from step {start} on. Pass --no-sharing."
        )


def _ssync(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    found = [callback for callback in callbacks_of(config) if callback_name(callback) == "SSyncCallback"]
    return [(one.get("init_args") or {}) if isinstance(one, Mapping) else {} for one in found]


def _switch(config: Mapping[str, Any]) -> Switch | None:
    callbacks = _ssync(config)
    if len(callbacks) != 1:
        return None
    options = {**DEFAULTS, **callbacks[0]}
    ratio, steps, watch = options["warmup_ratio"], options["warmup_steps"], options["guard_window"]
    # One that waits for the host watches from the end of its warm-up on: until then it is the same, too.
    if not isinstance(ratio, int | float) or not isinstance(watch, int) or not isinstance(steps, int | None):
        return None
    return Switch(float(ratio), steps, watch) if (steps or (steps is None and ratio > 0)) else None


def _trunk(config: Mapping[str, Any]) -> str:
    trainer = dict(config.get("trainer") or {})
    trainer["callbacks"] = [one for one in callbacks_of(config) if callback_name(one) != "SSyncCallback"]
    return json.dumps({**config, "trainer": trainer}, sort_keys=True, default=str)
