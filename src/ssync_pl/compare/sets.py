"""The words of `--seeds`, `--slots` and `--sets`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ssync_pl.compare.merging import class_of, read_yaml
from ssync_pl.errors import ConfigError

__all__ = ["DataSet", "data_set_of", "parse_numbers", "parse_seeds", "refuse_doubles"]


@dataclass(frozen=True)
class DataSet:
    """One of the data sets that runs are made on.

    Args:
        name: Names the folder and the rows of the tables.
        files: Configuration files to lay over.
        words: Words for `ssync-pl fit`.
        changes: The same as a dict of YAML values.

    Example:
        >>> DataSet("default").words
        ()
    """

    name: str
    files: tuple[Path, ...] = ()
    words: tuple[str, ...] = ()
    changes: Mapping[str, Any] = field(default_factory=dict)


def parse_seeds(text: str) -> tuple[int, ...]:
    """Read `--seeds`: a number N for the seeds 0 to N-1, or a list.

    Args:
        text: For example `5` or `3,4`; `3,` is the seed 3 alone.

    Returns:
        The seeds.

    Raises:
        ConfigError: No seeds.

    Example:
        >>> parse_seeds("3"), parse_seeds("3,4"), parse_seeds("3,")
        ((0, 1, 2), (3, 4), (3,))
    """
    if "," in text:
        return parse_numbers(text, "--seeds", least=0)
    if not text.strip().isdecimal() or int(text) < 1:
        raise ConfigError(f"Expected --seeds to be a number of seeds from 1 on, or a list like 3,4, but got {text!r}.")
    return tuple(range(int(text)))


def parse_numbers(text: str, option: str, least: int = 1) -> tuple[int, ...]:
    """Read a list of numbers with commas between them.

    Args:
        text: For example `7,11`.
        option: Name of the option, for the message.
        least: Smallest number allowed.

    Returns:
        The numbers.

    Raises:
        ConfigError: One is no number, too small, or there twice.

    Example:
        >>> parse_numbers("7,11", "--slots")
        (7, 11)
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or any(not part.isdecimal() or int(part) < least for part in parts):
        raise ConfigError(f"Expected {option} to be whole numbers from {least} on, as in 7,11, but got {text!r}.")
    refuse_doubles(parts, option)
    return tuple(int(part) for part in parts)


def refuse_doubles(names: Sequence[str], option: str) -> None:
    """Refuse a list that names something twice.

    Args:
        names: The list.
        option: Name of the option, for the message.

    Raises:
        ConfigError: A name is there twice.

    Example:
        >>> refuse_doubles(["a", "b"], "--variants")
    """
    doubles = sorted({name for name in names if list(names).count(name) > 1})
    if doubles:
        raise ConfigError(f"Expected {option} to name each once, but got {', '.join(doubles)} twice.")


def data_set_of(name: str, config: Mapping[str, Any]) -> DataSet:
    """Work out what a name of `--sets` lays over a configuration.

    Args:
        name: `default`, a preset of the synthetic data, or the path of a YAML file.
        config: The merged configuration.

    Returns:
        The data set.

    Raises:
        ConfigError: There is no such preset or file, or the configuration's data has no presets.

    Example:
        >>> config = {"data": {"class_path": "SyntheticDataModule", "init_args": {"preset": "a"}}}
        >>> data_set_of("c", config).words
        ('--data.init_args.preset=c',)
    """
    if name == "default":
        return DataSet("default")
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        return DataSet(path.stem, files=(path,), changes=read_yaml(path, "--sets"))
    from ssync_pl.data.synthetic import PRESETS

    if name not in PRESETS:
        known = ", ".join(PRESETS)
        raise ConfigError(f"Expected --sets to be among {known}, or paths of YAML files, but got {name!r}.")
    data, options = class_of(config, "data")
    if data != "SyntheticDataModule":
        raise ConfigError(
            f"Expected data of SyntheticDataModule for the preset {name!r} of --sets, but the configuration has "
            f"{data}. Name a YAML file with the other data."
        )
    if options.get("preset", "a") == name:
        return DataSet(name)
    changes: dict[str, Any] = {"preset": name}
    if options.get("scene") is not None:
        changes["scene"] = None  # it was made for the configuration's own preset, and would undo this one
    words = tuple(f"--data.init_args.{key}={'null' if value is None else value}" for key, value in changes.items())
    return DataSet(name, words=words, changes={"data": {"init_args": changes}})
