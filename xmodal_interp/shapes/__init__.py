"""Synthetic scenes with known answers, and the tiny models trained on them."""

from xmodal_interp.shapes.questions import KINDS, Question, ask, ask_all
from xmodal_interp.shapes.scenes import Scene, Thing, sample_scene

__all__ = [
    "KINDS",
    "Question",
    "Scene",
    "Thing",
    "ask",
    "ask_all",
    "sample_scene",
]
