"""Which model, and what stands at each position of its input."""

from xmodal_interp.models.family import Family as Family
from xmodal_interp.models.geometry import ImageGrid as ImageGrid
from xmodal_interp.models.geometry import Thumbnail as Thumbnail
from xmodal_interp.models.geometry import VideoGrid as VideoGrid
from xmodal_interp.models.geometry import place_on_grid as place_on_grid
from xmodal_interp.models.labelling import Prompt as Prompt
from xmodal_interp.models.loading import SHIPPED as SHIPPED
from xmodal_interp.models.loading import load as load
from xmodal_interp.models.opening import ImageLike as ImageLike
from xmodal_interp.models.opening import Video as Video
from xmodal_interp.models.opening import open_image as open_image
from xmodal_interp.models.opening import open_video as open_video
from xmodal_interp.models.records import FAMILIES as FAMILIES
from xmodal_interp.models.sequences import check_whole as check_whole
from xmodal_interp.models.sequences import prompt_ids as prompt_ids
from xmodal_interp.models.tokens import generated_table as generated_table
from xmodal_interp.models.vlm import VLM as VLM
from xmodal_interp.models.vlm import check_vlm as check_vlm
from xmodal_interp.models.windows import square_windows as square_windows
from xmodal_interp.models.windows import tiles_behind as tiles_behind
from xmodal_interp.models.windows import window_orders as window_orders
