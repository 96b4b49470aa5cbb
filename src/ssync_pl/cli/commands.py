"""`ssync-pl data`, `config`, `checkpoint`, `doctor`, `compare`: options, a call, and what is printed; and `zoo`."""

import argparse
import json
import shlex
import sys
from dataclasses import asdict, replace
from importlib import import_module, resources
from pathlib import Path
from typing import Any

from jsonargparse.typing import PositiveFloat, PositiveInt

from ssync_pl.cli import loading, size
from ssync_pl.compare.variants import key_values
from ssync_pl.errors import require
from ssync_pl.tools.zoo import zoo as zoo

_SHARDS = "shards: paths, globs, braces or URLs"
_PLACES = ("adapter", "attention", "masks", "attention_kind", "masks_kind", "grid")


def _generate(parser: argparse.ArgumentParser, words: list[str]) -> None:
    """Generate videos of rigid bodies that fall and collide, with exact masks. Equal seeds give equal videos."""
    add = parser.add_argument
    add("--preset", default="a", help="look of the scenes: a, a_zoom or c (default: %(default)s)")
    add("--out", required=True, type=Path, help="folder in which the data set gets its own folder")
    add("--train", type=int, default=440, help="number of training videos (default: %(default)s)")
    add("--validation", type=int, default=48, help="number of validation videos (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of all videos (default: %(default)s)")
    add("--workers", type=int, help="processes; 0 uses this one only")
    change = "change the preset, e.g. zoom=1.5"
    add("--set", action="append", default=[], metavar="KEY=VALUE", dest="changes", help=change)
    options = parser.parse_args(words)
    loading()
    from ssync_pl.data.synthetic import generate
    from ssync_pl.data.synthetic.config import preset

    counts = {"train": options.train, "validation": options.validation}
    valid = min(counts.values()) >= 0 and any(counts.values())
    require(valid, "--train or --validation to be above 0 and none below", counts)
    config = preset(options.preset, **key_values(options.changes, "--set"))
    splits = {name: count for name, count in counts.items() if count}
    folder = generate(options.out, config, splits=splits, seed=options.seed, num_workers=options.workers)
    for name, count in splits.items():
        sys.stdout.write(f"{name}: {folder / f'{config.name}-{name}-*.tar'} (videos: {count})\n")


def _check(parser: argparse.ArgumentParser, words: list[str]) -> int:
    """Report what shards hold and what is wrong with them: damage, duplicates, videos of training in validation.

    Exit status: 0 clean, 1 problems found, 2 wrong usage.
    """
    add = parser.add_argument
    add("patterns", nargs="+", metavar="PATTERN", help=f"{_SHARDS}; of training and validation, to compare them")
    add("--workers", type=int, metavar="N", help="processes; 0 uses this one only (default: by size)")
    add("--json", type=Path, metavar="FILE", help="write the report as JSON as well")
    options = parser.parse_args(words)
    loading()
    from ssync_pl.data.check import check_shards, group_shards, render_report
    from ssync_pl.data.files import refuse_foreign, write_owned_json

    if options.json is not None:
        refuse_foreign(options.json, '"ssync_pl check"')  # before work begins
    report = check_shards(group_shards(options.patterns), num_workers=options.workers)
    if options.json is not None:
        write_owned_json(options.json, "check", {"clean": report.clean, **asdict(report)})
    sys.stdout.write(render_report(report) + "\n")
    return 0 if report.clean else 1


def _preview(parser: argparse.ArgumentParser, words: list[str]) -> None:
    """Draw frames of videos in shards, and below them the same frames with their object masks, as one PNG."""
    add = parser.add_argument
    add("patterns", nargs="+", metavar="PATTERN", help=_SHARDS)
    add("--out", required=True, type=Path, metavar="FILE.png", help="a new picture, or an earlier one of this command")
    add("--videos", type=int, default=8, help="number of videos (default: %(default)s)")
    add("--frames", type=int, default=6, help="frames per video, evenly spaced (default: %(default)s)")
    options = parser.parse_args(words)
    loading()
    from ssync_pl.data.files import refuse_foreign, write_bytes
    from ssync_pl.tools.viz import PREVIEW, draw_preview

    require(options.out.suffix.lower() == ".png", "--out to end in .png", repr(str(options.out)))
    refuse_foreign(options.out, PREVIEW)
    sheet, videos, skipped = draw_preview(options.patterns, options.videos, options.frames)
    sys.stderr.write("".join(f"left out: {problem}\n" for problem in skipped))
    write_bytes(options.out, sheet)
    sys.stdout.write(f"{options.out} (videos: {videos})\n")


def _convert(parser: argparse.ArgumentParser, words: list[str]) -> int:
    """Convert a data set or own videos to shards. A run that was stopped goes on where it was."""
    from ssync_pl.data.convert.commands import add_sources

    add_sources(parser.add_subparsers(dest="source", required=True, metavar="SOURCE"))
    options = parser.parse_args(words)
    loading()
    return int(options.run(options))


def _cache(parser: argparse.ArgumentParser, words: list[str]) -> None:
    """Run a frozen backbone over every frame and store its features in shards of the same names.

    Give the folder as `features` to the data module. A run that was stopped goes on where it was. With --components,
    give the training shards first: the projection is fitted to them, and taken by later runs with the same --out.
    """
    add = parser.add_argument
    add("shards", nargs="+", help="local shards of videos: paths or patterns")
    add("--backbone", required=True, help="efficientnet_lite0, dinov2_small, or a model of timm")
    add("--image-size", required=True, type=size, help="size of the frames: 224, or HEIGHTxWIDTH")
    add("--out", required=True, type=Path, help="folder of the features")
    add("--layer", help="layer, or several joined by +; each backbone has a default")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--weights", choices=("pretrained", "none"), help="published or random weights")
    source.add_argument("--checkpoint", type=Path, help="file of weights (PyTorch or safetensors)")
    add("--flips", action="store_true", help="store features of mirrored frames too")
    add("--components", type=int, help="store this many principal components of standardised channels")
    add("--resize-mode", choices=("bicubic", "bilinear"), default="bicubic", help="how frames resize")
    add("--crop", choices=("none", "center"), default="none", help="how frames are cropped")
    add("--batch-size", type=int, default=32, help="frames per call of the backbone, on the GPU where there is one")
    add("--on-bad-sample", choices=("raise", "skip"), default="raise", help="unreadable videos")
    options = vars(parser.parse_args(words))
    loading()
    import torch

    from ssync_pl.data.features.cache import cache_features
    from ssync_pl.data.features.projection import describe_projection
    from ssync_pl.data.patterns import expand_shards
    from ssync_pl.hosts.nn.backbones import load_backbone

    shards = expand_shards(options.pop("shards"))
    backbone = load_backbone(*(options.pop(name) for name in ("backbone", "layer", "weights", "checkpoint")))
    report = cache_features(shards, backbone, device="cuda" if torch.cuda.is_available() else "cpu", **options)
    rows, columns = report.recipe.grid
    kind = f"{backbone.name} {backbone.layer} ({rows}x{columns} patches, {backbone.dim} channels)"
    kind += f"; {describe_projection(report.projection)}" if report.projection is not None else ""
    sys.stdout.write(f"features: {kind}\nshards:   {report.written} written, {report.kept} kept\n")
    sys.stdout.write("".join(f"skipped:  {message}\n" for message in report.skipped))


def _new_file(text: str) -> Path:
    if Path(text).exists() or Path(text).is_symlink():
        raise argparse.ArgumentTypeError(f"expected a new file, but got {text}, which exists; remove it first")
    return Path(text)


def _ssync(parser: argparse.ArgumentParser, words: list[str]) -> None:
    """Print the configuration of SSync, which goes after your own: `… --config mine.yaml --config ssync.yaml`."""
    parser.parse_args(words)
    sys.stdout.write((resources.files("ssync_pl") / "configs" / "ssync.yaml").read_text(encoding="utf-8"))


def _convert_config(parser: argparse.ArgumentParser, words: list[str]) -> None:
    """Translate a public configuration of VideoSAUR, SlotContrast or SSync into one for `ssync-pl fit --config`."""
    add = parser.add_argument
    change = "change a key of the file first, e.g. globals.NUM_SLOTS=7, or leave it out (KEY=null)"
    add("file", type=Path, metavar="OFFICIAL.yaml", help="the public configuration")
    add("--out", type=_new_file, metavar="FILE.yaml", help="where the result goes, a new file (default: the screen)")
    add("--data-root", metavar="DIR", help="folder or URL that the shards lie below")
    add("--set", action="append", default=[], metavar="KEY=VALUE", dest="changes", help=change)
    options = parser.parse_args(words)
    loading()
    from ssync_pl.data.files import write_bytes
    from ssync_pl.tools.official.convert import convert_config

    converted = convert_config(options.file, root=options.data_root, changes=options.changes)
    for key, reason in converted.left_out.items():
        sys.stderr.write(f"not converted: {key}: {reason}\n")
    if options.out is not None:
        write_bytes(options.out, converted.to_yaml().encode("utf-8"))
    sys.stdout.write(converted.to_yaml() if options.out is None else f"converted: {options.out}\n")


def _convert_checkpoint(parser: argparse.ArgumentParser, words: list[str]) -> None:
    """Write the tensors of a public checkpoint as one for `ssync-pl validate|test|predict --ckpt_path`.

    Nothing in the file can run.
    """
    parser.add_argument("--config", type=Path, metavar="FILE.yaml", help="of `config convert`, to lie beside OUT.ckpt")
    parser.add_argument("file", type=Path, metavar="OFFICIAL.ckpt", help="file of Lightning, PyTorch or safetensors")
    parser.add_argument("out", type=_new_file, metavar="OUT.ckpt", help="where the result goes, a new file")
    options = parser.parse_args(words)
    loading()
    from ssync_pl.compare.variants import read_yaml
    from ssync_pl.tools.official.checkpoints import convert_checkpoint

    config = None if options.config is None else read_yaml(options.config)
    for name in convert_checkpoint(options.file, options.out, config):
        sys.stderr.write(f"left out: {name}: a part of another training that no host has\n")
    sys.stdout.write(f"converted: {options.out}\n")


def doctor(parser: argparse.ArgumentParser, words: list[str]) -> int:
    """Say whether SSync can be used with a model, where its two maps are, and which lines to add.

    It runs one training step of the model, without training it. It imports what you name, and runs nothing else.
    MODULE:NAME is a class, a function that builds a model, or a model.

    examples:
      ssync-pl doctor --config mine.yaml --batch 2,4,3,64,64
      ssync-pl doctor train:Net --init slots=7 --batch img=2,4,3,64,64 --attention softmax:binder --masks decoder:masks

    exit status: 0 SSync can be used, 1 it cannot as it is, 2 wrong usage or a model that fails.
    """
    parser.usage = "ssync-pl doctor (MODULE:NAME | --config FILE) [OPTIONS]"
    add = parser.add_argument
    batch = "shapes of an example batch; with names it is a dict (default: the first batch of --config)"
    add("--config", action="append", default=[], metavar="FILE", help="of `ssync-pl fit`, as other options are then")
    add("--init", action="extend", nargs="+", default=[], metavar="NAME=VALUE", help="arguments of the class")
    add("--batch", action="extend", nargs="+", default=[], metavar="[NAME=]B,T,3,H,W", help=batch)
    add("--call", default="", metavar="METHOD", help="method of a plain model that gives the loss")
    add("--adapter", help="name of the adapter (default: the one that knows the model)")
    for name, whose in (("attention", "slot attention"), ("masks", "the decoder's masks")):
        add(f"--{name}", metavar="PLACE", help=f"'path', 'path:key' or 'softmax:path' of {whose}")
        add(f"--{name}-kind", choices=("probs", "logits"), help=f"what {whose} gives there (default: probs)")
    add("--grid", type=size, metavar="H,W", help="patches, where nothing else tells")
    add("--json", action="store_true", help="print JSON")
    named = words[:1] if words and not words[0].startswith("-") else []
    # A positional argument would swallow the values of options that are meant for the configuration.
    options, rest = parser.parse_known_args(words[len(named) :])
    advice, got = "See ssync-pl doctor --help.", "both" if named else "neither"
    expected = "either a model as package.module:name or --config FILE"
    require(bool(named) != bool(options.config), expected, got, advice=advice)
    require(not (rest and named), "options of ssync-pl doctor", " ".join(rest), advice=advice)
    loading()
    from ssync_pl.tools.doctor.examine import diagnose, render_report
    from ssync_pl.tools.doctor.steps import build_model, parse_batch

    sys.path.insert(0, "")  # the user's own modules are found as `python train.py` finds them
    settings = {name: value for name in _PLACES if (value := getattr(options, name)) is not None}
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
    report = diagnose(host, data, settings or ({"adapter": own.adapter, "grid": own.grid} if own else {}), options.call)
    if own:
        note = "The configuration has an SSyncCallback already; it was examined with its settings."
        report = replace(report, hints=(note, *report.hints), lines=())
    content = {"ready": report.ready, **asdict(report)}
    sys.stdout.write((json.dumps(content, indent=1) if options.json else render_report(report)) + "\n")
    return 0 if report.ready else 1


def compare(parser: argparse.ArgumentParser, words: list[str]) -> int:
    """Train a configuration under several variants, seeds and slot counts, and say what differs.

    All variants of a seed have the same initial weights, data order and number of steps; what they have in common until
    SSync switches on is trained once. The same command continues a comparison that was stopped: finished runs are kept.

    example:
      ssync-pl compare --config mine.yaml --variants without,with,other.yaml --out runs/compare/mine --slots 7,11

    exit status: 0 all runs are finished, 1 some failed or are damaged, 2 wrong usage.
    """
    from ssync_pl.compare.variants import known_variants

    parser.usage = "ssync-pl compare --config FILE --out FOLDER [OPTIONS] [-- OPTIONS OF ssync-pl fit]"
    add: Any = parser.add_argument
    add("--config", action="append", default=[], type=Path, metavar="FILE", help="of `ssync-pl fit`; may be repeated")
    add("--out", required=True, type=Path, metavar="FOLDER", help="folder of the comparison, e.g. runs/compare/NAME")
    add("--variants", default="with,without", metavar="A,B", help=f"{known_variants()} (default: %(default)s)")
    add("--baseline", default="without", metavar="A", help="variant to compare with (default: %(default)s)")
    add("--seeds", default="3", metavar="N", help="seeds 0 to N-1, or a list like 3,4 (default: %(default)s)")
    add("--slots", default="", metavar="A,B", help="numbers of slots (default: the configuration's)")
    add("--processes", type=PositiveInt, metavar="N", help="runs at a time (default: as they fit; Slurm: all)")
    add("--threads", type=PositiveInt, default=1, metavar="N", help="CPU threads per run (default: %(default)s)")
    add("--launcher", choices=("local", "slurm"), default="local", help="where runs are started (default: %(default)s)")
    add("--gpus", type=PositiveInt, metavar="N", help="GPUs per run (default: on this machine all, for each run)")
    add("--hours", type=PositiveFloat, metavar="H", help="time limit of a run (default: none; 24 on Slurm)")
    add("--partition", metavar="NAME", help="Slurm partition")
    add("--slurm", action="append", default=[], metavar="KEY=VALUE", help="another option of sbatch; may be repeated")
    add("--no-sharing", action="store_false", dest="share", help="train the same warm-up in every run")
    add("--dry-run", action="store_true", help="print the runs with their commands, and start none")
    place = words.index("--") if "--" in words else len(words)
    options = parser.parse_args(words[:place])
    loading()
    from ssync_pl.compare.matrix import build_matrix

    slurm = key_values(options.slurm, "--slurm") | ({"partition": options.partition} if options.partition else {})
    given = {name: getattr(options, name) for name in ("variants", "seeds", "slots", "baseline", "share")}
    matrix = build_matrix(options.config, options.out, **given, extra=words[place + 1 :])
    if options.dry_run:
        lines = [f"# {run.key.label}\n{shlex.join(run.command)}\n" for run in matrix.runs]
        sys.stdout.write("".join([*lines, f"# {len(lines)} runs\n"]))
        return 0
    for name in ("submitit", "pandas", "jinja2", "matplotlib"):
        import_module(name)  # what is missing is said now rather than after the training
    from ssync_pl.compare.report import write_report
    from ssync_pl.compare.results import load_comparison
    from ssync_pl.compare.runs import Launcher, run_matrix
    from ssync_pl.compare.tables import printed_tables

    remote, kinds = options.launcher == "slurm", (options.processes, options.threads, options.gpus, options.hours)
    launcher = Launcher(options.out / "jobs", remote, *kinds, slurm)
    run_matrix(matrix, launcher, options.out, ["ssync-pl", "compare", *words])
    report, comparison = write_report(options.out), load_comparison(options.out)
    sys.stdout.write(f"{printed_tables(comparison.frame, options.baseline)}\n\nreport: {report}\n")
    for key, why in comparison.absent.items():
        sys.stderr.write(f"\nnot finished: {key.label} ({key.folder(options.out)}): {why}\n")
    if comparison.absent:
        sys.stderr.write(f"\n{len(comparison.absent)} runs are not finished. The same command tries them again.\n")
    return int(bool(comparison.absent))


data = {"generate": _generate, "check": _check, "preview": _preview, "convert": _convert, "cache-features": _cache}
config = {"ssync": _ssync, "convert": _convert_config}
checkpoint = {"convert": _convert_checkpoint}
