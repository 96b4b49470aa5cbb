"""Metrics of object-centric learning: ARI, FG-ARI, mBO, mIoU, borders, and what becomes of slots."""

from ssync_pl.metrics.ari import ImageARI, VideoARI
from ssync_pl.metrics.base import ItemMean, MaskMetric
from ssync_pl.metrics.boundary import BoundaryF
from ssync_pl.metrics.collection import SegmentationMetrics
from ssync_pl.metrics.overlap import ImageMBO, ImageMIoU, VideoMBO, VideoMIoU
from ssync_pl.metrics.slots import SlotIdentity, SlotsPerObject, UnusedSlots
from ssync_pl.metrics.table import METRICS, MetricInfo, metric_names

__all__ = [
    "METRICS",
    "BoundaryF",
    "ImageARI",
    "ImageMBO",
    "ImageMIoU",
    "ItemMean",
    "MaskMetric",
    "MetricInfo",
    "SegmentationMetrics",
    "SlotIdentity",
    "SlotsPerObject",
    "UnusedSlots",
    "VideoARI",
    "VideoMBO",
    "VideoMIoU",
    "metric_names",
]
