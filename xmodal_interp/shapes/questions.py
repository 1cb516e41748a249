"""Questions about a scene, with their answers and the object that each is about.

The six question kinds are ``color``, ``shape``, ``place``, ``count``, ``existence`` and
``description``. All except ``count`` and ``description`` require the model to find one object among
several, and so to attend to the right place; mean pooling cannot solve them. Half of the existence
questions are about an object that does not exist. Most of these are "hard": the colour and the
shape both occur, on different objects.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from xmodal_interp.shapes.scenes import COLORS, SHAPES, Scene

KINDS: tuple[str, ...] = ("color", "shape", "place", "count", "existence", "description")
NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}
_HARD = 0.6  # share of negative existence questions whose colour and shape both occur


@dataclass(frozen=True)
class Question:
    """A question with its answer.

    Attributes:
        kind: Question kind, one of ``KINDS``.
        text: The question.
        answer: The right answer.
        subject: The words in the question for the object; None for the whole scene.
        thing: Index of the object in the scene; None if the question is not about one object, or
            the object does not exist.
    """

    kind: str
    text: str
    answer: str
    subject: str | None
    thing: int | None


def ask(scene: Scene, kind: str, rng: np.random.Generator) -> Question | None:
    """Return a random question of a kind, or None if the scene allows no unambiguous one.

    A colour question names a shape that occurs once, a shape question a colour that occurs once.
    """
    if kind == "count":
        return Question(kind, "how many shapes ?", NUMBERS[len(scene.things)], None, None)
    if kind == "description":
        ordered = sorted(scene.things, key=lambda thing: thing.x)
        return Question(
            kind, "describe the image .", " , ".join(f"a {t.name}" for t in ordered), None, None
        )
    if kind == "existence" and rng.random() < 0.5:
        name = _absent(scene, rng)
        return Question(kind, f"is there a {name} ?", "no", name, None)
    index = _subject(scene, kind, rng)
    if index is None:
        return None
    thing = scene.things[index]
    if kind == "color":
        return Question(kind, f"what color is the {thing.shape} ?", thing.color, thing.shape, index)
    if kind == "shape":
        return Question(kind, f"what shape is {thing.color} ?", thing.shape, thing.color, index)
    if kind == "place":
        return Question(
            kind, f"where is the {thing.name} ?", place(scene, index), thing.name, index
        )
    if kind == "existence":
        return Question(kind, f"is there a {thing.name} ?", "yes", thing.name, index)
    raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}.")


def ask_all(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Return one question of every kind that the scene allows, in the order of ``KINDS``."""
    return [question for kind in KINDS if (question := ask(scene, kind, rng)) is not None]


def place(scene: Scene, index: int) -> str:
    """Return the quadrant of an object.

    It is ``"top left"``, ``"top right"``, ``"bottom left"`` or ``"bottom right"``.
    """
    thing = scene.things[index]
    vertical = "top" if thing.y < scene.height / 2 else "bottom"
    return f"{vertical} {'left' if thing.x < scene.width / 2 else 'right'}"


def _subject(scene: Scene, kind: str, rng: np.random.Generator) -> int | None:
    attribute = {"color": "shape", "shape": "color"}.get(kind)
    if attribute is None:
        return int(rng.integers(len(scene.things)))
    values = [getattr(thing, attribute) for thing in scene.things]
    once = [i for i, value in enumerate(values) if Counter(values)[value] == 1]
    return once[rng.integers(len(once))] if once else None


def _absent(scene: Scene, rng: np.random.Generator) -> str:
    present = {thing.name for thing in scene.things}
    colors = sorted({thing.color for thing in scene.things})
    shapes = sorted({thing.shape for thing in scene.things})
    hard = [f"{c} {s}" for c in colors for s in shapes if f"{c} {s}" not in present]
    every = [f"{c} {s}" for c in COLORS for s in SHAPES if f"{c} {s}" not in present]
    pool = hard if hard and rng.random() < _HARD else every
    return pool[rng.integers(len(pool))]
