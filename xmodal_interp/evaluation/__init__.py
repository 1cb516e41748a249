"""Evaluate maps and head rankings against ground truth."""

from xmodal_interp.evaluation.choosing import best_head
from xmodal_interp.evaluation.faithfulness import curve_areas, deletion_curve, insertion_curve
from xmodal_interp.evaluation.intervals import Interval, bootstrap_interval, holm_adjusted
from xmodal_interp.evaluation.pointing import pointing_game, pointing_hits

__all__ = [
    "Interval",
    "best_head",
    "bootstrap_interval",
    "curve_areas",
    "deletion_curve",
    "holm_adjusted",
    "insertion_curve",
    "pointing_game",
    "pointing_hits",
]
