"""`ssync-pl doctor`: whether SSync can be used with a model, and what to write."""

from ssync_pl.doctor.examine import examine
from ssync_pl.doctor.render import render_report
from ssync_pl.doctor.report import CostReport, DoctorReport, MapReport

__all__ = ["CostReport", "DoctorReport", "MapReport", "examine", "render_report"]
