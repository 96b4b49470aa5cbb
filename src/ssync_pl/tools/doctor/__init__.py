"""`ssync-pl doctor`: whether SSync can be used with a model, and what to write."""

from ssync_pl.tools.doctor.examine import diagnose, examine
from ssync_pl.tools.doctor.report import DoctorReport, render_report

__all__ = ["DoctorReport", "diagnose", "examine", "render_report"]
