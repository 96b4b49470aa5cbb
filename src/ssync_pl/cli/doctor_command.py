"""`ssync-pl doctor`: the command."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from ssync_pl.errors import ConfigError

__all__ = ["run_doctor"]

_EXAMPLES = """examples:
  ssync-pl doctor --config mine.yaml
  ssync-pl doctor --config mine.yaml --batch 2,4,3,64,64
  ssync-pl doctor my_package.model:build_model --batch 2,4,3,64,64
  ssync-pl doctor my_package.model:Net --init slots=7 --batch img=2,4,3,64,64 --call loss_function
  ssync-pl doctor train:Net --batch 2,4,3,64,64 --attention softmax:slot_attention --masks decoder:masks

exit status: 0 SSync can be used, 1 it cannot as it is, 2 wrong usage or a model that fails."""


def run_doctor(args: list[str]) -> int:
    """Examine a model and print what to write."""
    named = bool(args) and not args[0].startswith("-")
    # A positional argument would swallow the values of options that are meant for the configuration.
    options, rest = _parser().parse_known_args(args[1:] if named else args)
    options.model = args[0] if named else None
    if (options.model is None) == (not options.config):
        raise ConfigError(
            "Expected either a model as package.module:name or --config FILE. See ssync-pl doctor --help."
        )
    if rest and not options.config:
        raise ConfigError(f"Expected options of ssync-pl doctor, but got {' '.join(rest)}. See ssync-pl doctor --help.")
    report = _report(options, rest)
    text = json.dumps(report.to_json(), indent=1) if options.json else _render(report)
    sys.stdout.write(text + "\n")
    return 0 if report.ready else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ssync-pl doctor",
        usage="ssync-pl doctor (MODULE:NAME | --config FILE) [OPTIONS]",
        description="Runs one training step of a model, without training it, and says whether SSync can be\n"
        "used with it, where its two maps are, what SSync costs, and which lines to add. It imports what\n"
        "you name, and runs nothing else. MODULE:NAME is a class, a function that builds a model, or a model.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="FILE",
        help="of `ssync-pl fit`; other options go to it as well",
    )
    parser.add_argument("--init", action="extend", nargs="+", default=[], metavar="NAME=VALUE", help="of the class")
    parser.add_argument(
        "--batch",
        action="extend",
        nargs="+",
        default=[],
        metavar="[NAME=]B,T,3,H,W",
        help="shapes of an example batch; with names it is a dict. Default with --config: the first batch of its data",
    )
    parser.add_argument("--call", default="", metavar="METHOD", help="method of a plain model that gives the loss")
    parser.add_argument("--ckpt_path", type=Path, metavar="FILE", help="weights, so that slots in use mean something")
    parser.add_argument("--adapter", default="auto", help="name of the adapter (default: the one that knows the model)")
    parser.add_argument(
        "--attention", metavar="PLACE", help="'path', 'path:key' or 'softmax:path' of the slot attention"
    )
    parser.add_argument("--masks", metavar="PLACE", help="the same for the decoder's masks")
    for side in ("attention", "masks"):
        parser.add_argument(f"--{side}-kind", choices=("probs", "logits"), default="probs", help=f"what {side} gives")
    parser.add_argument("--grid", type=_grid, metavar="H,W", help="patches, where nothing else tells")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _grid(text: str) -> tuple[int, int]:
    sizes = text.replace("x", ",").split(",")
    if len(sizes) != 2 or not all(size.strip().isdecimal() for size in sizes):
        raise argparse.ArgumentTypeError(f"Expected H,W, but got {text!r}.")
    return int(sizes[0]), int(sizes[1])


def _render(report: Any) -> str:
    from ssync_pl.tools.doctor.render import render_report

    return render_report(report)


def _report(options: argparse.Namespace, rest: list[str]) -> Any:
    from ssync_pl.tools.doctor.advice import Wanted
    from ssync_pl.tools.doctor.load import build_model, load_weights, parse_batch, parse_settings, working_folder_first
    from ssync_pl.tools.doctor.steps import is_lightning

    wanted = Wanted(
        options.adapter, options.attention, options.masks, options.attention_kind, options.masks_kind, options.grid
    )
    with working_folder_first():
        host: Any
        data: Any = None
        notes: tuple[str, ...] = ()
        if options.config:
            from ssync_pl.cli.configured import from_configuration

            configured = from_configuration([word for file in options.config for word in ("--config", file)] + rest)
            host, data = configured.host, configured.data
            wanted, notes = _of_callbacks(configured.callbacks, wanted)
        else:
            host = build_model(options.model, parse_settings(options.init))
        if options.ckpt_path is not None:
            load_weights(host, options.ckpt_path)
        lightning = is_lightning(host) and not options.call
        if options.batch:
            data = parse_batch(options.batch, as_dict=lightning)
        elif data is None:
            raise ConfigError(
                "Expected the shape of a batch, but got none. Add e.g. --batch 2,4,3,64,64 (B, T, 3, H, W)."
            )
        report = _lightning(host, data, wanted) if lightning else _plain(host, data, wanted, options.call)
    return replace(report, hints=(*notes, *report.hints), lines=() if notes and report.ready else report.lines)


def _plain(host: Any, batch: Any, wanted: Any, method: str) -> Any:
    from ssync_pl.tools.doctor.examine import examine
    from ssync_pl.tools.doctor.steps import describe_batch, plain_step

    return examine(
        host, plain_step(host, batch, method), batch, wanted=wanted, kind="plain", batch_text=describe_batch(batch)
    )


def _lightning(host: Any, data: Any, wanted: Any) -> Any:
    from ssync_pl.plugin.regularizer import SSyncRegularizer
    from ssync_pl.tools.doctor.advice import manual_lines
    from ssync_pl.tools.doctor.examine import examine
    from ssync_pl.tools.doctor.report import DoctorReport
    from ssync_pl.tools.doctor.steps import describe_batch, in_trainer

    name = type(host).__name__
    if isinstance(host, SSyncRegularizer):
        hint = f"{name} is an SSyncRegularizer and adds SSync itself: leave the callback out."
        return DoctorReport(host=name, kind="lightning", adapter="its own", hints=(hint,))
    if not host.automatic_optimization:
        problem = (
            f"{name} sets automatic_optimization=False and calls backward itself, so a loss that a callback adds would "
            "have no effect. Use the SSyncRegularizer mixin, or attach(self) around the forward pass, in its "
            "training_step."
        )
        return DoctorReport(host=name, kind="lightning", problems=(problem,), lines=manual_lines(wanted))
    found: list[Any] = []

    def look(run: Any, batch: Any) -> None:
        text = describe_batch(batch)
        found.append(examine(host, run, batch, wanted=wanted, kind="lightning", batch_text=text))

    in_trainer(host, data if hasattr(data, "train_dataloader") else [data], look)
    return found[0]


def _of_callbacks(callbacks: list[Any], wanted: Any) -> tuple[Any, tuple[str, ...]]:
    """How the configuration's own `SSyncCallback` reads the host, where it has one."""
    from ssync_pl.adapters import HostAdapter, PathAdapter
    from ssync_pl.plugin.callback import SSyncCallback
    from ssync_pl.tools.doctor.advice import Wanted

    own = [callback for callback in callbacks if isinstance(callback, SSyncCallback)]
    if not own:
        return wanted, ()
    note = ("The configuration has an SSyncCallback already; it was examined with its settings.",)
    if wanted != Wanted():
        return wanted, note
    adapter, grid = own[0].adapter, own[0].grid
    if isinstance(adapter, PathAdapter):
        kinds = (adapter.attention_kind, adapter.masks_kind)
        return Wanted("auto", adapter.attention, adapter.masks, *kinds, adapter.grid), note
    name = adapter.name if isinstance(adapter, HostAdapter) else adapter
    return Wanted(name, grid=grid), note
