"""Files that carry our mark: tables, caches and pictures replace no others."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from ssync_pl.data.files import write_bytes
from ssync_pl.errors import ConfigError

__all__ = ["MARK", "read_owned_json", "refuse_foreign_png", "write_owned_json"]

MARK = "ssync_pl"


def read_owned_json(path: Path) -> dict[str, Any]:
    """Returns what `write_owned_json` wrote, nothing without a file; raises ConfigError where it is not ours."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError):
        content = None
    _refuse_foreign(path, isinstance(content, dict) and content.get("written_by") == MARK)
    return {name: value for name, value in content.items() if name != "written_by"}


def write_owned_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file with our mark; raises ConfigError where there is a file that is not ours."""
    read_owned_json(path)
    write_bytes(path, f"{json.dumps({'written_by': MARK, **content}, indent=2)}\n".encode())


def refuse_foreign_png(path: Path) -> None:
    """Raises ConfigError where there is a file that `viz.encode_png` did not make."""
    if path.exists():
        try:
            with Image.open(path) as image:
                _refuse_foreign(path, image.info.get("Software") == MARK)
        except OSError:
            _refuse_foreign(path, False)


def _refuse_foreign(path: Path, ours: bool) -> None:
    if not ours:
        raise ConfigError(f"Expected {path} to be absent or written by ssync_pl, but it is not. Move it away.")
