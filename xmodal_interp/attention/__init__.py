"""The mathematics of one attention call, exact and memory-bounded."""

from xmodal_interp.attention.call import AttentionCall as AttentionCall
from xmodal_interp.attention.call import Positions as Positions
from xmodal_interp.attention.call import resolve as resolve
