"""What a conversion is going to write, kept beside the shards so that a killed run can go on."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ssync_pl.data.files import write_bytes
from ssync_pl.errors import ConfigError, ShardError

__all__ = ["Plan", "forget_skips", "read_plan", "read_skips", "refuse_foreign_shards", "write_plan", "write_skips"]

_FORMAT = "ssync_pl.conversion"
_VERSION = 1


@dataclass(frozen=True)
class Plan:
    """All that decides the bytes of the shards of one prefix, and how far the work is.

    Args:
        prefix: Start of the shards' names.
        videos: Number of items.
        items: Hash of all keys and sources, in order.
        samples_per_shard: Items a shard.
        recipe: The settings of the conversion, JSON values.
        complete: All shards were written and read back.
        skipped: Key → reason of the items that were left out; filled when complete.
        frames: Frames of all videos; filled when complete.

    Example:
        >>> Plan.make("train", [("0", "a.mp4")], 32, {"format": "videos"}).shards
        ['train-000000.tar']
    """

    prefix: str
    videos: int
    items: str
    samples_per_shard: int
    recipe: dict[str, Any]
    complete: bool = False
    skipped: dict[str, str] = field(default_factory=dict)
    frames: int = 0

    @staticmethod
    def make(prefix: str, items: Sequence[tuple[str, Any]], samples_per_shard: int, recipe: Mapping[str, Any]) -> Plan:
        """Plan the conversion of some items.

        Args:
            prefix: Start of the shards' names.
            items: Key and source of each.
            samples_per_shard: Items a shard.
            recipe: Settings.

        Returns:
            The plan of a conversion that has not begun.

        Raises:
            ConfigError: A source or the recipe cannot be written as JSON.

        Example:
            >>> Plan.make("train", [("0", 1), ("1", 2)], 1, {}).videos
            2
        """
        digest = hashlib.sha256(_canonical("argument `items`", items)).hexdigest()
        plain = json.loads(_canonical("argument `recipe`", recipe))
        return Plan(prefix, len(items), digest, samples_per_shard, plain)

    @property
    def shards(self) -> list[str]:
        """Names of the shards, of which one without any good sample is left out."""
        return [shard_name(self.prefix, i) for i in range(-(-self.videos // self.samples_per_shard))]

    def differences(self, other: Plan) -> list[str]:
        """Say in words how another plan for the same prefix differs.

        Args:
            other: The plan that was found.

        Returns:
            One text a difference; empty when both give the same shards.

        Example:
            >>> Plan.make("train", [("0", 1)], 1, {}).differences(Plan.make("train", [("0", 1)], 2, {}))
            ['samples_per_shard 2, not 1']
        """
        found = []
        if self.samples_per_shard != other.samples_per_shard:
            found.append(f"samples_per_shard {other.samples_per_shard}, not {self.samples_per_shard}")
        for key in sorted({*self.recipe, *other.recipe}):
            if self.recipe.get(key) != other.recipe.get(key):
                found.append(f"{key} {_short(other.recipe.get(key))}, not {_short(self.recipe.get(key))}")
        if self.videos != other.videos:
            found.append(f"{other.videos} videos, not {self.videos}")
        elif self.items != other.items:
            found.append("other source files, or the same ones in another order")
        return found

    def finished(self, skipped: Mapping[str, str], frames: int) -> Plan:
        """Return the plan of the completed conversion.

        Args:
            skipped: Key → reason.
            frames: Frames of all videos.

        Returns:
            The plan to be written at the end.

        Example:
            >>> Plan.make("train", [("0", 1)], 1, {}).finished({}, 24).complete
            True
        """
        return replace(self, complete=True, skipped=dict(skipped), frames=frames)


def shard_name(prefix: str, number: int) -> str:
    """Name a shard.

    Args:
        prefix: Start of the name.
        number: Its position.

    Returns:
        The file name.

    Example:
        >>> shard_name("train", 3)
        'train-000003.tar'
    """
    return f"{prefix}-{number:06d}.tar"


def read_plan(out: Path, prefix: str) -> Plan | None:
    """Read the plan that lies beside the shards.

    Args:
        out: Folder of the shards.
        prefix: Start of their names.

    Returns:
        The plan, or None when there is none.

    Raises:
        ShardError: The file is damaged or of another version.

    Example:
        >>> read_plan(Path("/nowhere"), "train") is None
        True
    """
    path = _plan_path(out, prefix)
    try:
        raw = json.loads(path.read_bytes())
        if raw.pop("format") != _FORMAT or raw.pop("version") != _VERSION:
            raise ValueError("another format or version")
        return Plan(**raw)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ShardError(
            f"Expected {path} to be the plan of a conversion, version {_VERSION}, but got {error!r}. Delete it "
            f"together with the shards `{prefix}-*.tar`, or choose another folder."
        ) from error


def write_plan(out: Path, plan: Plan) -> None:
    """Write the plan beside the shards in one step.

    Args:
        out: Folder of the shards.
        plan: The plan.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_plan(Path(folder), Plan.make("train", [("0", 1)], 1, {}))
        ...     read_plan(Path(folder), "train").videos
        1
    """
    content = {"format": _FORMAT, "version": _VERSION, **asdict(plan)}
    write_bytes(_plan_path(out, plan.prefix), json.dumps(content, sort_keys=True).encode())


def refuse_foreign_shards(out: Path, plan: Plan, before: Plan | None) -> None:
    """Refuse a folder that holds shards which this plan did not make.

    Args:
        out: Folder of the shards.
        plan: The plan.
        before: The plan that lies in the folder.

    Raises:
        ShardError: There are such shards.

    Example:
        >>> refuse_foreign_shards(Path("/nowhere"), Plan.make("train", [("0", 1)], 1, {}), None)
    """
    pattern = re.compile(re.escape(plan.prefix) + r"-\d{6,}\.tar")
    found = sorted(path.name for path in out.glob("*.tar") if pattern.fullmatch(path.name))
    why = ["no plan of a conversion lies beside them"] if before is None else plan.differences(before)
    if why:
        why = why[:4]
    elif set(found) - set(plan.shards):
        why = [f"{sorted(set(found) - set(plan.shards))[0]} is none of this conversion"]
    if found and why:
        raise ShardError(
            f"Expected the {len(found)} shards `{plan.prefix}-*.tar` in {out} to be of this conversion, but they are "
            f"not: {'; '.join(why)}. Run with the earlier settings to go on, delete the shards, or choose another "
            "folder with --out."
        )


def read_skips(out: Path, plan: Plan) -> dict[str, str]:
    """Read which items earlier runs of this plan left out.

    Args:
        out: Folder of the shards.
        plan: The plan as found in the folder.

    Returns:
        Key → reason.

    Example:
        >>> read_skips(Path("/nowhere"), Plan.make("train", [("0", 1)], 1, {}))
        {}
    """
    skipped = dict(plan.skipped)
    for path in _skip_paths(out, plan.prefix):
        try:
            found = json.loads(path.read_bytes())
            skipped.update((str(key), str(reason)) for key, reason in found.items())
        except (OSError, ValueError, AttributeError):
            continue  # its shard then does not hold what it should, and is made again
    return skipped


def write_skips(out: Path, prefix: str, number: int, skipped: Mapping[str, str]) -> None:
    """Note which items of one shard were left out, before the shard gets its name.

    Args:
        out: Folder of the shards.
        prefix: Start of their names.
        number: Position of the shard.
        skipped: Key → reason; when empty, an earlier note is removed.

    Example:
        >>> import tempfile
        >>> plan = Plan.make("train", [("0", 1)], 1, {})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_skips(Path(folder), "train", 0, {"0": "no frames"})
        ...     read_skips(Path(folder), plan)
        {'0': 'no frames'}
    """
    path = out / f".{shard_name(prefix, number)}.skipped.json"
    if skipped:
        write_bytes(path, json.dumps(dict(skipped), sort_keys=True).encode())
    else:
        path.unlink(missing_ok=True)


def forget_skips(out: Path, prefix: str) -> None:
    """Remove the notes of all shards, once the plan lists what was left out.

    Args:
        out: Folder of the shards.
        prefix: Start of their names.

    Example:
        >>> forget_skips(Path("/nowhere"), "train")
    """
    for path in _skip_paths(out, prefix):
        path.unlink(missing_ok=True)


def _plan_path(out: Path, prefix: str) -> Path:
    return out / f".{prefix}.plan.json"


def _skip_paths(out: Path, prefix: str) -> list[Path]:
    pattern = re.compile(re.escape(f".{prefix}-") + r"\d{6,}\.tar\.skipped\.json")
    return sorted(path for path in out.glob(".*.skipped.json") if pattern.fullmatch(path.name))


def _canonical(name: str, value: Any) -> bytes:
    try:
        return json.dumps(value, sort_keys=True, default=_plain).encode()
    except (TypeError, ValueError) as error:
        raise ConfigError(f"Expected {name} to hold JSON values and paths only, but got {error}.") from error


def _plain(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"a {type(value).__name__}")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
