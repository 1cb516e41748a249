from .faithfulness import curve_areas, deletion_curve, insertion_curve
from .head_selection import best_head
from .intervals import Interval, bootstrap_interval, holm_adjusted
from .known_heads import known_heads
from .pointing import pointing_game, pointing_hits

__all__ = [
    "Interval",
    "best_head",
    "bootstrap_interval",
    "curve_areas",
    "deletion_curve",
    "holm_adjusted",
    "insertion_curve",
    "known_heads",
    "pointing_game",
    "pointing_hits",
]
