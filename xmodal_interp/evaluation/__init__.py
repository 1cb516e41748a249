"""How good is a map, or a ranking of heads, against what is known?"""

from xmodal_interp.evaluation.choosing import best_head as best_head
from xmodal_interp.evaluation.faithfulness import curve_areas as curve_areas
from xmodal_interp.evaluation.faithfulness import deletion_curve as deletion_curve
from xmodal_interp.evaluation.faithfulness import insertion_curve as insertion_curve
from xmodal_interp.evaluation.intervals import Interval as Interval
from xmodal_interp.evaluation.intervals import bootstrap_interval as bootstrap_interval
from xmodal_interp.evaluation.intervals import holm_adjusted as holm_adjusted
from xmodal_interp.evaluation.pointing import pointing_game as pointing_game
from xmodal_interp.evaluation.pointing import pointing_hits as pointing_hits
