"""Finding the record files of a MOVi data set as TensorFlow Datasets lays them out."""

from __future__ import annotations

import json
import logging
import os
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ssync_pl.data.convert.tfrecord import Record, index_records
from ssync_pl.errors import ConfigError, ShardError

__all__ = ["MoviSet", "find_movi"]

_NAME = re.compile(r"((?:\w+_)?movi_[a-f])-(\w+)\.tfrecord-(\d{5})-of-(\d{5})")
_DEPTH = 3  # <root>/movi_c/128x128/1.0.0

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MoviSet:
    """The record files of one version of one data set.

    Args:
        folder: Where they lie.
        name: `movi_a` to `movi_f`.
        files: Split → number of the file → path, and the `NNNNN` of `-of-NNNNN`.

    Example:
        >>> MoviSet(Path("tfds"), "movi_c").splits
        []
    """

    folder: Path
    name: str
    files: dict[str, dict[int, tuple[Path, int]]] = field(default_factory=dict)

    @property
    def splits(self) -> list[str]:
        """Names of the splits that have files, in the usual order."""
        usual = ["train", "validation", "test"]
        return sorted(self.files, key=lambda split: (usual.index(split) if split in usual else len(usual), split))

    def paths(self, split: str) -> list[Path]:
        """List the files of a split, all of which have to be there.

        Args:
            split: Its name.

        Returns:
            The paths, by number.

        Raises:
            ConfigError: There is no such split.
            ShardError: Numbers are missing, or two sets are mixed.

        Example:
            >>> MoviSet(Path("tfds"), "movi_c", {"test": {0: (Path("a"), 1)}}).paths("test")
            [PosixPath('a')]
        """
        if split not in self.files:
            raise ConfigError(
                f"Expected a split of {self.name} in {self.folder}, but got {split!r}; there are: "
                f"{', '.join(self.splits)}. Download it, or name another one with --splits."
            )
        found = self.files[split]
        totals = sorted({total for _, total in found.values()})
        if len(totals) > 1:
            raise ShardError(
                f"Expected the files of {self.name}-{split} in {self.folder} to be of one set, but got names that end "
                f"in {', '.join(f'-of-{total:05d}' for total in totals)}. Remove those of the other set."
            )
        missing = sorted(set(range(totals[0])) - set(found))
        extra = sorted(set(found) - set(range(totals[0])))
        if missing or extra:
            problem = f"{len(missing)} are missing" if missing else f"{len(extra)} have a number above that"
            raise ShardError(
                f"Expected {totals[0]} files {self.name}-{split}.tfrecord-…-of-{totals[0]:05d} in {self.folder}, but "
                f"{problem}: {', '.join(f'{number:05d}' for number in (missing or extra)[:10])}"
                f"{', …' if len(missing or extra) > 10 else ''}. Download the split again."
            )
        return [found[number][0] for number in sorted(found)]

    def records(self, split: str, limit: int | None = None) -> list[tuple[str, Record]]:
        """List the records of a split.

        Args:
            split: Its name.
            limit: Most records; None for all.

        Returns:
            File name and place of each record, in order.

        Raises:
            ConfigError: There is no such split.
            ShardError: A file is missing, truncated or damaged, or `dataset_info.json` counts other records.

        Example:
            >>> MoviSet(Path("tfds"), "movi_c", {"test": {}}).records("validation")
            Traceback (most recent call last):
            ssync_pl.errors.ConfigError: Expected a split of movi_c in tfds, but got 'validation'; there are: test...
        """
        paths = self.paths(split)
        lengths = self._lengths(split)
        if lengths is not None and len(lengths) != len(paths):
            raise ShardError(
                f"Expected {len(lengths)} files of {self.name}-{split} as `dataset_info.json` in {self.folder} says, "
                f"but got {len(paths)}. Download the split again."
            )
        found: list[tuple[str, Record]] = []
        for number, path in enumerate(paths):
            room = None if limit is None else limit - len(found)
            if room is not None and room <= 0:
                break
            records = index_records(path)
            if lengths is not None and len(records) != lengths[number]:
                raise ShardError(
                    f"Expected {path} to hold {lengths[number]} records as `dataset_info.json` says, but got "
                    f"{len(records)}. The file is cut short or of another version: download it again."
                )
            found.extend((path.name, record) for record in records[:room])
        return found

    def info(self) -> dict[str, Any]:
        """Read `dataset_info.json`.

        Returns:
            Its content; empty when there is none.

        Example:
            >>> MoviSet(Path("/nowhere"), "movi_c").info()
            {}
        """
        path = self.folder / "dataset_info.json"
        try:
            content = json.loads(path.read_bytes())
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise ShardError(
                f"Expected {path} to be JSON, but got {error}. Download it again, or delete it: the records are then "
                "not counted against it."
            ) from error
        return content if isinstance(content, dict) else {}

    def _lengths(self, split: str) -> list[int] | None:
        try:
            entry = next(entry for entry in self.info()["splits"] if entry["name"] == split)
            return [int(length) for length in entry["shardLengths"]]
        except (KeyError, TypeError, ValueError, StopIteration):
            _logger.debug("No counts of %s-%s in %s", self.name, split, self.folder)
            return None


def find_movi(root: str | os.PathLike[str]) -> MoviSet:
    """Find the one MOVi data set in a folder: in itself, or as `<name>/<size>/<version>` below it.

    Args:
        root: The folder.

    Returns:
        Its files.

    Raises:
        ConfigError: There is no such folder, no record file in it, or more than one data set or version.

    Example:
        >>> find_movi("/nowhere")
        Traceback (most recent call last):
        ssync_pl.errors.ConfigError: Expected --root to be a folder, but there is no /nowhere...
    """
    root = Path(root)
    if not root.is_dir():
        raise ConfigError(f"Expected --root to be a folder, but there is no {root}. Name the folder of the records.")
    sets: dict[tuple[Path, str], MoviSet] = {}
    for path in _files(root):
        match = _NAME.fullmatch(path.name)
        # TFDS downloads into folders of this name, and renames them when they are complete.
        if match is None or "incomplete" in path.parent.name:
            continue
        name, split = match.group(1), match.group(2)
        found = sets.setdefault((path.parent, name), MoviSet(path.parent, name, defaultdict(dict)))
        number, total = int(match.group(3)), int(match.group(4))
        if number in found.files[split]:
            totals = sorted({total, found.files[split][number][1]})
            raise ShardError(
                f"Expected the files of {name}-{split} in {path.parent} to be of one set, but got names that end in "
                f"{', '.join(f'-of-{count:05d}' for count in totals)}. Remove those of the other set."
            )
        found.files[split][number] = (path, total)
    if not sets:
        raise ConfigError(
            f"Expected files such as movi_c-train.tfrecord-00000-of-00256 in {root}, or in "
            f"{root}/movi_c/128x128/1.0.0, but got none. Name the folder that holds them with --root."
        )
    if len(sets) > 1:
        listed = ", ".join(f"{name} in {folder}" for folder, name in sorted(sets))
        raise ConfigError(
            f"Expected one data set in {root}, but got {len(sets)}: {listed}. Name the folder of one with --root, or "
            "move those of one folder apart."
        )
    return next(iter(sets.values()))


def _files(root: Path) -> list[Path]:
    patterns = ["/".join(["*"] * depth + ["*.tfrecord-*"]) for depth in range(_DEPTH + 1)]
    return sorted(path for pattern in patterns for path in root.glob(pattern))
