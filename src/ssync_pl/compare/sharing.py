"""Warm-ups that runs have in common, trained once.

Until SSync switches on, a run with it is the run without it, to the bit. The run without SSync therefore keeps a
checkpoint from just before the switch, and the runs with SSync start there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ssync_pl.compare.configs import callback_name, callbacks_of, class_of, merge
from ssync_pl.compare.variants import Variant, ssync_defaults, ssync_options

__all__ = ["Share", "Switch", "plan_sharing"]

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


def plan_sharing(variants: Sequence[Variant], config: Mapping[str, Any], extra: Sequence[str] = ()) -> dict[str, Share]:
    """Finds for each variant, by name, what it shares until SSync switches on.

    Nothing is shared where `extra` (words for `ssync-pl fit`) may change callbacks, nor where the data cannot resume
    exactly in the middle of an epoch. Variants without SSync also keep the checkpoint that the configuration itself
    would start from, so that a comparison that grows finds it.
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
    options = {**ssync_defaults(), **callbacks[0]}
    ratio, steps, watch = options["warmup_ratio"], options["warmup_steps"], options["guard_window"]
    if not isinstance(ratio, int | float) or not isinstance(watch, int) or not isinstance(steps, int | None):
        return None
    return Switch(float(ratio), steps, watch) if (steps or (steps is None and ratio > 0)) else None


def _without_ssync(config: Mapping[str, Any]) -> str:
    trainer = dict(config.get("trainer") or {})
    trainer["callbacks"] = [one for one in callbacks_of(config) if callback_name(one) != "SSyncCallback"]
    return json.dumps({**config, "trainer": trainer}, sort_keys=True, default=str)
