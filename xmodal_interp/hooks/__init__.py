"""The tap on the attention interface, the recorder, interventions, and the doctor."""

from xmodal_interp.hooks.ablation import ablate_heads as ablate_heads
from xmodal_interp.hooks.calibration import mean_head_outputs as mean_head_outputs
from xmodal_interp.hooks.checkup import Checkup as Checkup
from xmodal_interp.hooks.checkup import doctor as doctor
from xmodal_interp.hooks.interventions import intervene as intervene
from xmodal_interp.hooks.knockout import knock_out_attention as knock_out_attention
from xmodal_interp.hooks.modules import Identity as Identity
from xmodal_interp.hooks.modules import attention_modules as attention_modules
from xmodal_interp.hooks.recorder import record as record
from xmodal_interp.hooks.recording import Recording as Recording
