"""Metrics of object-centric learning: ARI, FG-ARI, mBO, mIoU, borders, and what becomes of slots."""

from ssync_pl.metrics.classes import (
    BoundaryF,
    ImageARI,
    ImageMBO,
    ImageMIoU,
    ItemMean,
    MaskMetric,
    SegmentationMetrics,
    SlotIdentity,
    SlotsPerObject,
    UnusedSlots,
    VideoARI,
    VideoMBO,
    VideoMIoU,
)
from ssync_pl.metrics.table import MAPS, METRICS, MetricInfo, metric_names

__all__ = [
    "MAPS",
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
