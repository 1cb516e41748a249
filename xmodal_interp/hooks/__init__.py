"""Record and edit attention calls: the tap, the recorder and interventions."""

from xmodal_interp.hooks.ablation import ablate_heads
from xmodal_interp.hooks.attention_interface import registered_function
from xmodal_interp.hooks.attention_modules import Identity, attention_modules
from xmodal_interp.hooks.head_means import mean_head_outputs
from xmodal_interp.hooks.interventions import active_interventions, intervene
from xmodal_interp.hooks.knockout import knock_out_attention
from xmodal_interp.hooks.recorder import Recording, record

__all__ = [
    "Identity",
    "Recording",
    "ablate_heads",
    "active_interventions",
    "attention_modules",
    "intervene",
    "knock_out_attention",
    "mean_head_outputs",
    "record",
    "registered_function",
]
