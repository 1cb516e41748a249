"""The tap on the attention interface, the recorder, and interventions."""

from xmodal_interp.hooks.modules import Identity as Identity
from xmodal_interp.hooks.modules import attention_modules as attention_modules
from xmodal_interp.hooks.recorder import Recording as Recording
from xmodal_interp.hooks.recorder import record as record
