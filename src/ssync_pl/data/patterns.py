"""From what a user writes (`movi_c-train-{000000..000304}.tar`, lists, globs, URLs) to a list of shards."""

import glob
import itertools
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from urllib.parse import urlparse, urlsplit, urlunsplit
from urllib.request import url2pathname

from ssync_pl.errors import MissingShardError, printable, require

Patterns = str | list[str]
_REMOTE_SCHEMES = ("http", "https", "s3", "gs", "gcs", "hf", "az", "abfs", "sftp", "ftp")
_MOST = 1_000_000


def expand_shards(pattern: str | Iterable[str], argument: str = "shards") -> list[str]:
    """Expands braces (`{000000..000304}`, `{train,validation}`), then globs of local paths, in the patterns' order.

    URLs are not looked up. `argument` is the name of the user's argument, for messages.
    """
    patterns = [pattern] if isinstance(pattern, str) else list(pattern)
    named = bool(patterns) and all(isinstance(item, str) and item for item in patterns)
    advice = "Give a path such as `data/train-{000000..000009}.tar` or `data/train-*.tar`."
    require(named, f"argument `{argument}` to name at least one shard", repr(pattern), advice=advice)
    pairs = [(item, expanded) for item in patterns for expanded in expand_braces(item, argument)]
    shards = [shard for item, expanded in pairs for shard in _resolve(expanded, item, argument)]
    counts = Counter(shard if is_remote(shard) else os.path.abspath(shard) for shard in shards)
    (most, times), *_ = counts.most_common(1)
    require(times == 1, f"argument `{argument}` to name each shard once", f"{most}, which comes twice")
    one_kind = len(set(map(is_remote, shards))) == 1
    require(one_kind, f"argument `{argument}` to be all local or all remote", f"both in {pattern!r}")
    return shards


def expand_braces(pattern: str, argument: str = "shards") -> list[str]:
    """Expands `{first..last}` with equal zero padding, and `{a,b,c}`; several braces give the product."""
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices = [_alternatives(text) if number % 2 else [text] for number, text in enumerate(parts)]
    fits = 0 < math.prod(map(len, choices)) <= _MOST and not re.search("[{}]", "".join(parts[::2]))
    expected = f"argument `{argument}` to hold braces such as {{000000..000304}} or {{train,validation}}"
    advice = f"Ranges must rise, braces cannot be nested, and a pattern may name {_MOST} shards at most."
    require(fits, expected, repr(pattern), advice=advice)
    return ["".join(choice) for choice in itertools.product(*choices)]


def is_remote(shard: str) -> bool:
    """Whether a shard is a URL rather than a local path."""
    return re.match(r"^[a-z][a-z0-9+]+://", shard) is not None


def is_compressed(shard: str) -> bool:
    """Whether a shard is a packed tar (`.tar.gz`, `.tgz`, …), by its name."""
    return shard_name(shard).lower().endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz"))


def shard_name(shard: str) -> str:
    """Returns the file name of a shard, without folder or query."""
    return PurePosixPath(urlparse(shard).path).name if is_remote(shard) else os.path.basename(shard)


def masked_url(url: str) -> str:
    """Returns an address that may be printed: without passwords, and without the values of its query."""
    if not is_remote(url):
        return printable(url)
    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    user = f"{user.partition(':')[0]}:…" if ":" in user else ("…" if user else "")
    names = [item.partition("=") for item in parts.query.split("&")] if parts.query else []
    query = "&".join(f"{name}=…" if equals else "…" for name, equals, _ in names)
    return printable(urlunsplit(parts._replace(netloc=f"{user}{at}{host}", query=query, fragment="")))


def _resolve(shard: str, pattern: str, argument: str) -> list[str]:
    """Returns the shards that a pattern without braces names."""
    scheme = re.match(r"^([A-Za-z][A-Za-z0-9+]+):", shard)
    kind = scheme.group(1) if scheme is not None else ""
    if kind.lower() == "file":
        shard = url2pathname(urlparse(shard).path)
    elif kind and not os.path.exists(shard):
        known = f"argument `{argument}` to be local paths or URLs of {', '.join(_REMOTE_SCHEMES)}"
        got = f"{'the shell command ' if kind.lower() == 'pipe' else ''}{pattern!r}"
        readable = kind in _REMOTE_SCHEMES and is_remote(shard)
        require(readable, known, got, advice="Download the shards, or give another address.")
        advice, plain = "Write `{000000..000009}`, not `*`.", not glob.has_magic(urlparse(shard).path)
        require(plain, f"argument `{argument}` to name remote shards by braces", f"the glob {pattern!r}", advice=advice)
        return [shard]
    shard = os.path.expanduser(shard)
    if os.path.isfile(shard):
        return [shard]
    advice = f"Add a file pattern, for example `{os.path.join(shard, 'train-*.tar')}`."
    require(not os.path.isdir(shard), f"argument `{argument}` to name shards", f"folder {pattern!r}", advice=advice)
    if not glob.has_magic(shard):
        raise MissingShardError(
            f"Expected argument `{argument}` to name shards that exist, but {shard!r} (from {pattern!r}) does not. "
            "Check the path and the range of numbers."
        )
    matched = sorted(glob.glob(shard))
    dangling = [path for path in matched if not os.path.exists(path)]
    require(not dangling, f"argument `{argument}` to match files", f"{dangling[:1]}, a link to nothing")
    found = [*filter(os.path.isfile, matched)]
    require(bool(found), f"argument `{argument}` to match at least one shard", f"{pattern!r}, which matches none")
    return found


def _alternatives(text: str) -> Sequence[str]:
    """What one pair of braces stands for; nothing where it is neither a range nor a list."""
    span = re.fullmatch(r"([0-9]+)\.\.([0-9]+)", text)
    if span is None:
        return text.split(",") if "," in text and ".." not in text else []
    first, last = span.groups()
    width = len(first) if first.startswith("0") or len(first) == len(last) else 0
    return [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)[: _MOST + 1]]
