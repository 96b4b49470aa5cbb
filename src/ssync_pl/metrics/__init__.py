"""Segmentation metrics of object-centric learning: ARI, FG-ARI, mBO and mIoU, of videos and of frames."""

from ssync_pl.metrics.ari import ImageARI, VideoARI
from ssync_pl.metrics.base import MaskMetric
from ssync_pl.metrics.collection import SegmentationMetrics
from ssync_pl.metrics.overlap import ImageMBO, ImageMIoU, VideoMBO, VideoMIoU

__all__ = [
    "ImageARI",
    "ImageMBO",
    "ImageMIoU",
    "MaskMetric",
    "SegmentationMetrics",
    "VideoARI",
    "VideoMBO",
    "VideoMIoU",
]
