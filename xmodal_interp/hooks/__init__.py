"""Record and edit attention calls: the tap, the recorder, interventions, and the doctor."""

from xmodal_interp.hooks.ablation import ablate_heads
from xmodal_interp.hooks.calibration import mean_head_outputs
from xmodal_interp.hooks.checkup import Checkup, doctor
from xmodal_interp.hooks.interventions import active_interventions, intervene
from xmodal_interp.hooks.knockout import knock_out_attention
from xmodal_interp.hooks.modules import Identity, attention_modules
from xmodal_interp.hooks.recorder import record
from xmodal_interp.hooks.recording import Recording
from xmodal_interp.hooks.tapping import registered_function

__all__ = [
    "Checkup",
    "Identity",
    "Recording",
    "ablate_heads",
    "active_interventions",
    "attention_modules",
    "doctor",
    "intervene",
    "knock_out_attention",
    "mean_head_outputs",
    "record",
    "registered_function",
]
