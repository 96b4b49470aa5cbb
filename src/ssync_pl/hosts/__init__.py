"""Reference hosts: object-centric models that run out of the box."""

from ssync_pl.hosts.savi import SAVi, SAViOutput
from ssync_pl.hosts.solv import SOLV, SOLVOutput
from ssync_pl.hosts.videosaur import DINOSAUR, FeatureHostOutput, SlotContrast, VideoSAUR

__all__ = ["DINOSAUR", "SOLV", "FeatureHostOutput", "SAVi", "SAViOutput", "SOLVOutput", "SlotContrast", "VideoSAUR"]
