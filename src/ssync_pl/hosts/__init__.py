"""Reference hosts: video object-centric models that run out of the box."""

from __future__ import annotations

from ssync_pl.hosts.savi import SAVi, SAViOutput

__all__ = ["SAVi", "SAViOutput"]
