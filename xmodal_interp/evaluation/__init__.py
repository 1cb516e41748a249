"""How good is a map, or a ranking of heads, against what is known?"""

from xmodal_interp.evaluation.pointing import best_head as best_head
from xmodal_interp.evaluation.pointing import pointing_game as pointing_game
from xmodal_interp.evaluation.pointing import pointing_hits as pointing_hits
