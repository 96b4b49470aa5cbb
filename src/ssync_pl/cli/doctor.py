"""`ssync-pl doctor`: whether SSync can be used with a model, and what to write."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from typing import Any

from ssync_pl.cli import key_values, loading, size
from ssync_pl.errors import require

__all__ = ["doctor"]

_SETTINGS = ("adapter", "attention", "masks", "attention_kind", "masks_kind", "grid")


def doctor(parser: argparse.ArgumentParser, words: list[str]) -> int:
    """Say whether SSync can be used with a model, where its two maps are, and which lines to add.

    It runs one training step of the model, without training it. It imports what you name, and runs nothing else.
    MODULE:NAME is a class, a function that builds a model, or a model.

    examples:
      ssync-pl doctor --config mine.yaml --batch 2,4,3,64,64
      ssync-pl doctor my_package.model:Net --init slots=7 --batch img=2,4,3,64,64 --call loss_function
      ssync-pl doctor train:Net --batch 2,4,3,64,64 --attention softmax:slot_attention --masks decoder:masks

    exit status: 0 SSync can be used, 1 it cannot as it is, 2 wrong usage or a model that fails.
    """
    parser.usage = "ssync-pl doctor (MODULE:NAME | --config FILE) [OPTIONS]"
    add = parser.add_argument
    batch = "shapes of an example batch; with names it is a dict. Default with --config: the first batch of its data"
    add("--config", action="append", default=[], metavar="FILE", help="of `ssync-pl fit`, as other options are then")
    add("--init", action="extend", nargs="+", default=[], metavar="NAME=VALUE", help="arguments of the class")
    add("--batch", action="extend", nargs="+", default=[], metavar="[NAME=]B,T,3,H,W", help=batch)
    add("--call", default="", metavar="METHOD", help="method of a plain model that gives the loss")
    add("--adapter", help="name of the adapter (default: the one that knows the model)")
    add("--attention", metavar="PLACE", help="'path', 'path:key' or 'softmax:path' of the slot attention")
    add("--masks", metavar="PLACE", help="the same for the decoder's masks")
    add("--attention-kind", choices=("probs", "logits"), help="what attention gives (default: probs)")
    add("--masks-kind", choices=("probs", "logits"), help="what masks gives (default: probs)")
    add("--grid", type=size, metavar="H,W", help="patches, where nothing else tells")
    add("--json", action="store_true", help="print JSON")
    named = words[:1] if words and not words[0].startswith("-") else []
    # A positional argument would swallow the values of options that are meant for the configuration.
    options, rest = parser.parse_known_args(words[len(named) :])
    expected, got = "either a model as package.module:name or --config FILE", "both" if named else "neither"
    require(bool(named) != bool(options.config), expected, got, advice="See ssync-pl doctor --help.")
    require(not (rest and named), "options of ssync-pl doctor", " ".join(rest), advice="See ssync-pl doctor --help.")
    loading()
    from ssync_pl.tools.doctor.examine import render_report

    sys.path.insert(0, "")  # the user's own modules are found as `python train.py` finds them
    report = _examine(options, named, rest)
    content = {"ready": report.ready, **asdict(report)}
    sys.stdout.write((json.dumps(content, indent=1) if options.json else render_report(report)) + "\n")
    return 0 if report.ready else 1


def _examine(options: argparse.Namespace, named: list[str], rest: list[str]) -> Any:
    from ssync_pl.tools.doctor.examine import diagnose
    from ssync_pl.tools.doctor.steps import build_model, parse_batch

    settings = {name: value for name in _SETTINGS if (value := getattr(options, name)) is not None}
    own, data = None, None
    if named:
        host = build_model(named[0], key_values(options.init, "--init"))
    else:
        from ssync_pl.cli.trainer import from_configuration
        from ssync_pl.plugin.callback import SSyncCallback

        parts = from_configuration([f"--config={file}" for file in options.config] + rest)
        host, data = parts.model, parts.datamodule
        own = next((one for one in parts.callbacks if isinstance(one, SSyncCallback)), None)
    data = parse_batch(options.batch) if options.batch else data
    require(data is not None, "the shape of a batch", "none", advice="Add e.g. --batch 2,4,3,64,64 (B, T, 3, H, W).")
    configured = {"adapter": own.adapter, "grid": own.grid} if own else {}
    report = diagnose(host, data, settings or configured, options.call)
    note = "The configuration has an SSyncCallback already; it was examined with its settings."
    return replace(report, hints=(note, *report.hints), lines=()) if own else report
