"""xmodal_interp: how a vision-language model looks at an image."""

from xmodal_interp.attention import AttentionCall as AttentionCall
from xmodal_interp.capturing import Keep as Keep
from xmodal_interp.capturing import capture as capture
from xmodal_interp.capturing import capture_batch as capture_batch
from xmodal_interp.hooks import record as record
from xmodal_interp.models import VLM as VLM
from xmodal_interp.models import load as load
from xmodal_interp.sample import Sample as Sample
