"""The mathematics of one attention call, exact and memory-bounded."""

from xmodal_interp.attention.call import AttentionCall as AttentionCall
from xmodal_interp.attention.positions import Positions as Positions
from xmodal_interp.attention.positions import number as number
from xmodal_interp.attention.positions import numbers as numbers
from xmodal_interp.attention.positions import resolve as resolve
from xmodal_interp.attention.segmenting import joined as joined
from xmodal_interp.attention.segmenting import part_of as part_of
from xmodal_interp.attention.segmenting import pieces_of as pieces_of
from xmodal_interp.attention.segmenting import reordered as reordered
from xmodal_interp.attention.stitching import reread as reread
from xmodal_interp.attention.stitching import stitch as stitch
from xmodal_interp.attention.two_stacks import decoder_layer as decoder_layer
from xmodal_interp.attention.two_stacks import encoder_layer as encoder_layer
from xmodal_interp.attention.two_stacks import with_keys as with_keys
