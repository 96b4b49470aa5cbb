"""The report of a comparison, for people who would rather look: one HTML file, Markdown, figures and numbers."""

from __future__ import annotations

from ssync_pl.compare.report.write import write_report

__all__ = ["write_report"]
