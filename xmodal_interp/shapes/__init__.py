"""Synthetic scenes with known answers, and the tiny models trained on them."""

from xmodal_interp.shapes.scenes import KINDS, Question, Scene, Thing, ask, ask_all, sample_scene

__all__ = [
    "KINDS",
    "Question",
    "Scene",
    "Thing",
    "ask",
    "ask_all",
    "sample_scene",
]
