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

__all__ = ["MAPS", "METRICS", "BoundaryF", "ImageARI", "ImageMBO", "ImageMIoU", "ItemMean", "MaskMetric"]
__all__ += ["MetricInfo", "SegmentationMetrics", "SlotIdentity", "SlotsPerObject", "UnusedSlots", "VideoARI"]
__all__ += ["VideoMBO", "VideoMIoU", "metric_names"]
