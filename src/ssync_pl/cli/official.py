"""`ssync-pl config` and `ssync-pl checkpoint`: the packaged configuration, and public ones with their checkpoints."""

from __future__ import annotations

import argparse
import sys
from importlib import resources
from pathlib import Path

from ssync_pl.errors import require

__all__ = ["checkpoint", "config"]


def _ssync(parser: argparse.ArgumentParser, words: list[str]) -> int:
    """Print the configuration of SSync, which goes after your own: `… --config mine.yaml --config ssync.yaml`."""
    parser.parse_args(words)
    sys.stdout.write((resources.files("ssync_pl") / "configs" / "ssync.yaml").read_text(encoding="utf-8"))
    return 0


def _convert_config(parser: argparse.ArgumentParser, words: list[str]) -> int:
    """Translate a public configuration of VideoSAUR, SlotContrast or SSync into one for `ssync-pl fit --config`.

    What has no counterpart is listed, above the result and on the screen.
    """
    add = parser.add_argument
    change = "change a value first, in the file's own keys, e.g. globals.NUM_SLOTS=7, or leave it out (KEY=null)"
    add("file", type=Path, metavar="OFFICIAL.yaml", help="the public configuration")
    add("--out", type=Path, metavar="FILE.yaml", help="where the result goes, a new file (default: the screen)")
    add("--data-root", metavar="DIR", help="folder or URL that the shards lie below")
    add("--set", action="append", default=[], metavar="KEY=VALUE", dest="changes", help=change)
    options = parser.parse_args(words)
    from ssync_pl.data.files import write_bytes
    from ssync_pl.tools.official.convert import convert_config

    _refuse_existing(options.out)
    converted = convert_config(options.file, root=options.data_root, changes=options.changes)
    for key, reason in converted.left_out.items():
        sys.stderr.write(f"not converted: {key}: {reason}\n")
    if options.out is not None:
        write_bytes(options.out, converted.to_yaml().encode("utf-8"))
    sys.stdout.write(converted.to_yaml() if options.out is None else f"converted: {options.out}\n")
    return 0


def _convert_checkpoint(parser: argparse.ArgumentParser, words: list[str]) -> int:
    """Write the tensors of a public checkpoint as one for `ssync-pl validate|test|predict --ckpt_path`.

    It goes beside the configuration of `ssync-pl config convert`. Only tensors and plain values are read: nothing in
    the file can run.
    """
    parser.add_argument("file", type=Path, metavar="OFFICIAL.ckpt", help="file of Lightning, PyTorch or safetensors")
    parser.add_argument("out", type=Path, metavar="OUT.ckpt", help="where the result goes, a new file")
    options = parser.parse_args(words)
    from ssync_pl.tools.official.checkpoints import convert_checkpoint

    _refuse_existing(options.out)
    for name in convert_checkpoint(options.file, options.out):
        sys.stderr.write(f"left out: {name}: a part of another training that no host has\n")
    sys.stdout.write(f"converted: {options.out}\n")
    return 0


def _refuse_existing(path: Path | None) -> None:
    free = path is None or not path.exists()
    require(free, "the result to be a new file", f"{path}, which exists", advice="Remove it, or name another one.")


config = {"ssync": _ssync, "convert": _convert_config}
checkpoint = {"convert": _convert_checkpoint}
