"""`ssync-pl zoo`: public checkpoints and this package's recipes, with their scores and what to type."""

import argparse
import hashlib
import io
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ssync_pl.errors import choose, explained, require, require_shard

_CHUNK = 1 << 20


def zoo(parser: argparse.ArgumentParser, words: list[str]) -> None:
    """List public checkpoints and this package's recipes with their scores, show one, or fetch a public one.

    Nothing is fetched without --fetch.
    """
    import yaml

    parser.add_argument("name", nargs="?", metavar="NAME", help="show this one, with what to type (default: list all)")
    parser.add_argument("--fetch", type=Path, metavar="FOLDER", help="fetch its files, and replace none")
    options = parser.parse_args(words)
    entries = yaml.safe_load((resources.files("ssync_pl") / "configs" / "zoo.yaml").read_text(encoding="utf-8"))
    if options.name is not None:
        choose("NAME", options.name, *entries)
    entry = entries.get(options.name, {})
    if options.fetch is None:
        sys.stdout.write(_lay_out(options.name, entry) if entry else _tabulate(entries))
        return
    require("files" in entry, "the name of a public checkpoint before --fetch", options.name or "none")
    for suffix, file in entry["files"].items():
        sys.stdout.write(f"{fetch(options.fetch / f'{options.name}{suffix}', **file)}\n")


def _tabulate(entries: Mapping[str, Any]) -> str:
    rows = [("NAME", "MODEL", "DATA", "FG-ARI", "mBO")]
    rows += [(name, one["model"], one["data"], *map(str, one["scores"].values())) for name, one in entries.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    note = "Scores in percent, as their sources state them; `ssync-pl zoo NAME` says which, and what to type."
    return "\n".join([*lines, "", note, ""])


def _lay_out(name: str, entry: Mapping[str, Any]) -> str:
    scores = ", ".join(f"{metric} {value} %" for metric, value in entry["scores"].items())
    shown = {key: entry[key] for key in ("model", "data", "licence", "source", "note") if key in entry}
    lines = [name, f"  scores   {scores}", *(f"  {key:<8} {value}" for key, value in shown.items())]
    lines += [f"  file     {file['address']}" for file in entry.get("files", {}).values()]
    changes = "".join(f" --set {change}" for change in entry.get("changes", ()))
    commands = entry.get("commands") or [
        f"ssync-pl zoo {name} --fetch zoo",
        f"ssync-pl config convert zoo/{name}.official.yaml --data-root SHARDS --out zoo/{name}.yaml{changes}",
        f"ssync-pl checkpoint convert zoo/{name}.official.ckpt zoo/{name}/host.ckpt --config zoo/{name}.yaml",
        f"ssync-pl validate --ckpt_path zoo/{name}/host.ckpt",
    ]
    heading = "What to type" + " (SHARDS: folder of the data set)" * ("files" in entry)
    return "\n".join([*lines, "", f"{heading}:", *(f"  {command}" for command in commands), ""])


def fetch(path: Path, address: str, sha256: str = "") -> str:
    """Fetches a file whole or not at all, leaves one that is there alone, and returns what to print about it."""
    from ssync_pl.data.files import write_bytes

    if os.path.lexists(path):
        return f"left alone: {path}, which was there"
    seen = hashlib.sha256()
    with explained(f"to write to {path.parent}", OSError, advice="Choose another folder."):
        write_bytes(path, _download(address, path, sha256, seen))
    return f"fetched: {path} ({path.stat().st_size} bytes, SHA-256 {seen.hexdigest()})"


def _download(address: str, path: Path, sha256: str, seen: Any) -> Iterator[bytes]:
    from tqdm import tqdm

    from ssync_pl.data.remote import RemoteFile

    parts, got = urlsplit(address), f"another file from {address}"
    port = parts.port or (443 if parts.scheme == "https" else 80)
    advice = f"Connect to the internet, or fetch {address} elsewhere and put it at {path}."
    with explained(f"to reach {parts.hostname}", OSError, advice=advice):
        socket.create_connection((parts.hostname or "", port), timeout=10).close()
    with RemoteFile(address) as source:
        stream = io.BufferedReader(source, _CHUNK)
        if path.suffix == ".ckpt":
            advice = "Open the address in a browser: it may ask for a login, or its quota may be used up."
            require_shard(stream.peek(2)[:2] == b"PK", "a checkpoint of PyTorch", got, advice=advice)
        for piece in tqdm(iter(lambda: stream.read(_CHUNK), b""), path.name, unit="MiB", disable=None):
            seen.update(piece)
            yield piece
    fits = sha256 in ("", seen.hexdigest())
    require_shard(fits, f"a file with sha256 {sha256}", got, advice="Report it: what is published has changed.")
