"""Makes the helper modules of this folder importable, in spawned processes too: they inherit `sys.path`."""

from __future__ import annotations

import sys
from pathlib import Path

_FOLDER = str(Path(__file__).parent)
if _FOLDER not in sys.path:
    sys.path.append(_FOLDER)
