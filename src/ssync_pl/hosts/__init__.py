"""Reference hosts: object-centric models that run out of the box."""

from __future__ import annotations

from ssync_pl.hosts.dinosaur import DINOSAUR
from ssync_pl.hosts.feature_host import FeatureHostOutput
from ssync_pl.hosts.savi import SAVi, SAViOutput
from ssync_pl.hosts.slotcontrast import SlotContrast
from ssync_pl.hosts.solv import SOLV, SOLVOutput
from ssync_pl.hosts.videosaur import VideoSAUR

__all__ = ["DINOSAUR", "SOLV", "FeatureHostOutput", "SAVi", "SAViOutput", "SOLVOutput", "SlotContrast", "VideoSAUR"]
