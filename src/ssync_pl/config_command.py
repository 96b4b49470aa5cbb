"""`ssync-pl config`: the packaged configurations."""

from __future__ import annotations

import argparse
import sys
from importlib import resources
from pathlib import Path

from ssync_pl.errors import ConfigError

__all__ = ["packaged_config", "packaged_configs", "run_config"]


def packaged_configs() -> dict[str, Path]:
    """List the configurations that come with the package.

    Returns:
        Paths of the YAML files by name.

    Example:
        >>> "ssync" in packaged_configs()
        True
    """
    folder = Path(str(resources.files("ssync_pl") / "configs"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def packaged_config(name: str) -> Path:
    """Find a configuration that comes with the package.

    Args:
        name: Its name, e.g. `ssync`: the overlay that appends `SSyncCallback` to a LightningCLI configuration.

    Returns:
        Path of the YAML file.

    Raises:
        ConfigError: There is none of that name.

    Example:
        >>> packaged_config("ssync").name
        'ssync.yaml'
    """
    configs = packaged_configs()
    if name not in configs:
        raise ConfigError(f"Expected the name of a packaged configuration ({', '.join(configs)}), but got {name!r}.")
    return configs[name]


def run_config(args: list[str]) -> int:
    """Print a packaged configuration, its path, or the names there are.

    Args:
        args: Words after `ssync-pl config`.

    Returns:
        The exit status.

    Example:
        >>> run_config([])
        ssync
        0
    """
    parser = argparse.ArgumentParser(
        prog="ssync-pl config",
        description="Print a packaged configuration, e.g. `ssync-pl config ssync > ssync.yaml`. "
        "It goes after your own: `python train.py fit --config mine.yaml --config ssync.yaml`.",
    )
    parser.add_argument("name", nargs="?", help="name of the configuration; without it, the names are listed")
    parser.add_argument("--path", action="store_true", help="print the path of the file instead of its text")
    options = parser.parse_args(args)
    if options.name is None:
        sys.stdout.write("\n".join(packaged_configs()) + "\n")
        return 0
    path = packaged_config(options.name)
    sys.stdout.write(f"{path}\n" if options.path else path.read_text(encoding="utf-8"))
    return 0
