"""Files that carry our mark: tables and pictures replace no others."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssync_pl.data.files import write_bytes
from ssync_pl.errors import require

PNG_MARK = ("Software", "ssync_pl")  # a text chunk, which `viz.encode_png` writes
_STARTS = (b'{\n  "written_by": "ssync_pl"', b"Software\0ssync_pl")


def refuse_foreign(path: Path) -> None:
    """Raises ConfigError where there is a file that neither `write_owned_json` nor `viz.encode_png` made."""
    if path.exists():
        head = path.read_bytes()[:100] if path.is_file() else b""
        ours = any(start in head for start in _STARTS)
        require(ours, f"{path} to be absent or written by ssync_pl", "another file", advice="Move it away.")


def write_owned_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file with our mark; raises ConfigError where there is a file that is not ours."""
    refuse_foreign(path)
    write_bytes(path, f"{json.dumps({'written_by': 'ssync_pl', **content}, indent=2)}\n".encode())
