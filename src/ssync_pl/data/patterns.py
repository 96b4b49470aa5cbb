"""From what a user writes (`movi_c-train-{000000..000304}.tar`, lists, globs, URLs) to a list of shards."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from urllib.parse import urlparse, urlsplit, urlunsplit
from urllib.request import url2pathname

from ssync_pl.data.sampling import shares_by_weight
from ssync_pl.errors import ConfigError, MissingShardError

__all__ = [
    "Patterns",
    "expand_braces",
    "expand_shards",
    "find_shards",
    "is_compressed",
    "is_remote",
    "masked_url",
    "shard_name",
]

Patterns = str | list[str] | dict[str, float]
"""One pattern, several, or several with weights, which mixes them."""

_REMOTE_SCHEMES = ("http", "https", "s3", "gs", "gcs", "hf", "az", "abfs", "sftp", "ftp")
_MOST = 1_000_000


def expand_shards(pattern: str | Sequence[str], argument: str = "shards", *, allow_pipe: bool = False) -> list[str]:
    """Expand one pattern or a list of patterns to shards that exist.

    Braces are expanded first (`{000000..000304}`, `{train,validation}`), then, for local paths, `*`, `?` and `[…]`.
    URLs are not looked up.

    Args:
        pattern: A path, URL or pattern, or several.
        argument: Name of the user's argument, for messages.
        allow_pipe: Accept `pipe:` commands, which run in a shell.

    Returns:
        Local paths or URLs, in the order of the patterns, globs sorted.

    Raises:
        ConfigError: The pattern is malformed, matches nothing, names a shard twice, mixes local and remote shards, or
            is a `pipe:` command or another scheme that cannot be read.
        MissingShardError: A named shard does not exist.
    """
    patterns = [pattern] if isinstance(pattern, str) else list(pattern)
    if not patterns or not all(isinstance(item, str) and item for item in patterns):
        raise ConfigError(
            f"Expected argument `{argument}` to name at least one shard, but got {pattern!r}. Give a path such as "
            "`data/train-{000000..000009}.tar` or `data/train-*.tar`."
        )
    shards = [
        shard
        for item in patterns
        for expanded in expand_braces(item, argument)
        for shard in _resolve(expanded, item, argument, allow_pipe)
    ]
    names = [shard if is_remote(shard) else os.path.abspath(shard) for shard in shards]
    if len(set(names)) < len(names):
        repeated = next(name for name in sorted(names) if names.count(name) > 1)
        raise ConfigError(f"Expected argument `{argument}` to name each shard once, but {repeated} comes twice.")
    if len({is_remote(shard) for shard in shards}) > 1:
        raise ConfigError(
            f"Expected argument `{argument}` to be all local or all remote, but got both in {pattern!r}. Copy the "
            "remote shards, or give only one kind."
        )
    return shards


def find_shards(
    patterns: Patterns, argument: str, *, allow_pipe: bool = False
) -> tuple[list[str], tuple[int, ...], tuple[float, ...]]:
    """Expand what the user wrote."""
    if not isinstance(patterns, Mapping):
        shards = expand_shards(patterns, argument, allow_pipe=allow_pipe)
        return shards, (len(shards),), ()
    if not patterns:
        raise ConfigError(f"Expected argument `{argument}` to name at least one set, but got none.")
    weights = tuple(float(weight) for weight in patterns.values())
    shares_by_weight(1, weights)
    sizes = tuple(len(expand_shards(pattern, argument, allow_pipe=allow_pipe)) for pattern in patterns)
    # Expanded once more as a whole: a shard of two sets, or local beside remote shards, is refused there.
    return expand_shards(list(patterns), argument, allow_pipe=allow_pipe), sizes, weights


def expand_braces(pattern: str, argument: str = "shards") -> list[str]:
    """Expand `{first..last}` with equal zero padding, and `{a,b,c}`; several braces give the product."""
    parts = re.split(r"\{([^{}]*)\}", pattern)
    if any(brace in text for text in parts[::2] for brace in "{}"):
        raise _bad_brace(pattern, argument, "the braces are unbalanced or nested")
    choices: list[list[str]] = []
    count = 1
    for number, text in enumerate(parts):
        choices.append([text] if number % 2 == 0 else _alternatives(text, pattern, argument))
        count *= len(choices[-1])
    if count > _MOST:
        raise _bad_brace(pattern, argument, f"it expands to {count} names, more than {_MOST}")
    return ["".join(choice) for choice in itertools.product(*choices)]


def is_remote(shard: str) -> bool:
    """Say whether a shard is a URL or a command rather than a local path."""
    return re.match(r"^([a-z][a-z0-9+]+://|pipe:)", shard) is not None


def is_compressed(shard: str) -> bool:
    """Say whether a shard is a packed tar (`.tar.gz`, `.tgz`, …), by its name."""
    return shard_name(shard).lower().endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz"))


def shard_name(shard: str) -> str:
    """Return the file name of a shard, without folder or query."""
    return PurePosixPath(urlparse(shard).path).name if is_remote(shard) else os.path.basename(shard)


def masked_url(url: str) -> str:
    """Return an address that may be printed: without passwords, and without the values of its query."""
    if not is_remote(url) or url.startswith("pipe:"):
        return url
    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    user = f"{user.partition(':')[0]}:…" if ":" in user else ("…" if user else "")
    names = [item.partition("=") for item in parts.query.split("&")] if parts.query else []
    query = "&".join(f"{name}=…" if equals else "…" for name, equals, _ in names)
    return urlunsplit(parts._replace(netloc=f"{user}{at}{host}", query=query, fragment=""))


def _resolve(shard: str, pattern: str, argument: str, allow_pipe: bool) -> list[str]:
    scheme = re.match(r"^([A-Za-z][A-Za-z0-9+]+):", shard)
    if scheme is not None and scheme.group(1).lower() == "file":
        shard = url2pathname(urlparse(shard).path)
    elif scheme is not None and not os.path.exists(shard):
        if scheme.group(1) == "pipe" and allow_pipe:
            return [shard]
        if scheme.group(1).lower() == "pipe":
            raise ConfigError(
                f"Expected argument `{argument}` to be paths or URLs, but got the shell command {pattern!r}. `pipe:` "
                "runs any command: give the URL itself, or set `allow_pipe` if you trust it."
            )
        if scheme.group(1) not in _REMOTE_SCHEMES or not is_remote(shard):
            raise ConfigError(
                f"Expected argument `{argument}` to be local paths or URLs of {', '.join(_REMOTE_SCHEMES)}, but got "
                f"{pattern!r}. Download the shards, or give another address."
            )
        if glob.has_magic(urlparse(shard).path):
            raise ConfigError(
                f"Expected argument `{argument}` to name remote shards by braces, but got the glob {pattern!r}. Write "
                "`{000000..000009}` instead of `*`."
            )
        return [shard]
    shard = os.path.expanduser(shard)
    if os.path.isfile(shard):
        return [shard]
    if os.path.isdir(shard):
        raise ConfigError(
            f"Expected argument `{argument}` to name shards, but {pattern!r} is a folder. Add a file pattern, for "
            f"example `{os.path.join(shard, 'train-*.tar')}`."
        )
    if not glob.has_magic(shard):
        raise MissingShardError(
            f"Expected argument `{argument}` to name shards that exist, but {shard!r} (from {pattern!r}) does not. "
            "Check the path and the range of numbers."
        )
    found = sorted(path for path in glob.glob(shard) if os.path.isfile(path))
    if not found:
        raise ConfigError(
            f"Expected argument `{argument}` to match at least one shard, but {pattern!r} matches none. Check the path."
        )
    return found


def _alternatives(text: str, pattern: str, argument: str) -> list[str]:
    span = re.fullmatch(r"([0-9]+)\.\.([0-9]+)", text)
    if span is not None:
        first, last = span.groups()
        if int(first) > int(last):
            raise _bad_brace(pattern, argument, f"the range `{{{text}}}` runs backwards")
        if int(last) - int(first) >= _MOST:
            raise _bad_brace(pattern, argument, f"the range `{{{text}}}` has more than {_MOST} numbers")
        width = len(first) if first.startswith("0") or len(first) == len(last) else 0
        return [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]
    if "," in text and ".." not in text:
        return text.split(",")
    raise _bad_brace(pattern, argument, f"`{{{text}}}` is neither a range nor a list")


def _bad_brace(pattern: str, argument: str, what: str) -> ConfigError:
    return ConfigError(
        f"Expected argument `{argument}` to hold braces such as {{000000..000304}} or {{train,validation}}, but got "
        f"{pattern!r}: {what}."
    )
