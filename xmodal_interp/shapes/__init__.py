"""Synthetic scenes with known answers, and the two tiny models trained on them."""

from xmodal_interp.shapes.questions import KINDS as KINDS
from xmodal_interp.shapes.questions import Question as Question
from xmodal_interp.shapes.questions import ask as ask
from xmodal_interp.shapes.questions import ask_all as ask_all
from xmodal_interp.shapes.scenes import Scene as Scene
from xmodal_interp.shapes.scenes import Thing as Thing
from xmodal_interp.shapes.scenes import sample_scene as sample_scene
