"""Reports: what was captured, every analysis that applies, and provenance, in one HTML file."""

from xmodal_interp.reporting.writing import Report, report

__all__ = [
    "Report",
    "report",
]
