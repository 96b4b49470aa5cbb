"""`ssync-pl doctor`: whether SSync can be used with a model, and what to write."""

from ssync_pl.tools.doctor.examine import examine
from ssync_pl.tools.doctor.render import render_report
from ssync_pl.tools.doctor.report import CostReport, DoctorReport, MapReport

__all__ = ["CostReport", "DoctorReport", "MapReport", "examine", "render_report"]
