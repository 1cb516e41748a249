"""Intervals over samples; :mod:`xmodal_interp.analysis.resampling` computes them."""

from xmodal_interp.analysis.resampling import Interval, bootstrap_interval, holm_adjusted

__all__ = ["Interval", "bootstrap_interval", "holm_adjusted"]
