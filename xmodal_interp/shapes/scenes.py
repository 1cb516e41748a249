"""Synthetic scenes of coloured objects, with exact ground truth.

A :class:`Scene` has a canvas and a tuple of objects (:class:`Thing`), each with a colour, a shape
and a box in pixels. ``render`` draws the objects anti-aliased from signed distances, so that their
boxes are exact. ``Scene.recolored`` returns a counterfactual scene: the same pixels, noise
included, except for the colour of one object.

:func:`ask` returns a :class:`Question` about a scene, with its answer and the object that it is
about. Objects do not overlap, no two have the same colour and shape, and none has its centre near a
mid-line of the canvas, so every question has exactly one right answer.

The six question kinds are ``color``, ``shape``, ``place``, ``count``, ``existence`` and
``description``. All except ``count`` and ``description`` require the model to find one object among
several, and so to attend to the right place; mean pooling cannot solve them. Half of the existence
questions are about an object that does not exist. Most of these are "hard": the colour and the
shape both occur, on different objects.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from xmodal_interp.errors import InputError

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 230),
    "yellow": (235, 215, 50),
    "purple": (165, 60, 200),
    "cyan": (60, 210, 220),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "cross")

SMALLEST, LARGEST = 9.0, 14.0  # radius, px, on a canvas whose shorter side is 96 px
GAP = 3.0  # px between boxes, and between x of centres: descriptions go from left to right
MARGIN = 4.5  # px between a centre and a mid-line, so that quadrants are unambiguous
_NOISE = 4.0  # standard deviation of the pixel noise, grey levels


@dataclass(frozen=True)
class Thing:
    """One object: centre ``x``, ``y`` and ``radius`` in pixels; ``gain`` scales the colour."""

    color: str
    shape: str
    x: float
    y: float
    radius: float
    gain: float = 1.0

    @property
    def name(self) -> str:
        """Colour and shape, such as ``"red circle"``."""
        return f"{self.color} {self.shape}"

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Exact extent of the object, ``(x0, y0, x1, y1)`` in pixels."""
        r = self.radius * (0.9 if self.shape == "square" else 1.0)
        return (self.x - r, self.y - r, self.x + r, self.y + r)

    @property
    def window(self) -> tuple[slice, slice]:
        """Rows and columns of the pixels that the object and its anti-aliased edge can cover."""
        x0, y0, x1, y1 = self.box
        return (
            slice(max(0, int(y0) - 2), int(y1) + 3),
            slice(max(0, int(x0) - 2), int(x1) + 3),
        )

    def distance(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Return the signed distance of points ``(x, y)`` to the outline, px; negative inside."""
        dx, dy, r = np.abs(x - self.x), y - self.y, self.radius
        if self.shape == "circle":
            outside = np.hypot(dx, dy) - r
        elif self.shape == "square":
            outside = np.maximum(dx, np.abs(dy)) - 0.9 * r
        elif self.shape == "triangle":
            outside = np.maximum(dy - r, (2 * dx - (dy + r)) / np.sqrt(5))
        else:  # a cross: the union of two bars
            arm, dy = 0.36 * r, np.abs(dy)
            outside = np.minimum(np.maximum(dx - arm, dy - r), np.maximum(dx - r, dy - arm))
        return np.asarray(outside)


@dataclass(frozen=True)
class Scene:
    """A scene: canvas size in pixels, objects, grey background, and seed of the pixel noise."""

    width: int
    height: int
    things: tuple[Thing, ...]
    background: float
    noise_seed: int

    def render(self, scale: int = 1) -> np.ndarray:
        """Draw the scene as ``uint8 [scale * height, scale * width, 3]``.

        Args:
            scale: Pixels drawn per pixel of the canvas and axis. Outlines are drawn at the full
                resolution; the noise is that of ``scale=1``, enlarged.
        """
        if scale < 1:
            raise InputError(f"scale must be at least 1, got {scale}.")
        shape = (self.height * scale, self.width * scale)
        y, x = (np.mgrid[: shape[0], : shape[1]].astype(np.float32) + np.float32(0.5)) / scale
        canvas = np.full((*shape, 3), self.background, np.float32)
        for thing in self.things:
            near = tuple(slice(each.start * scale, each.stop * scale) for each in thing.window)
            cover = np.clip(0.5 - scale * thing.distance(x[near], y[near]), 0, 1)[..., None]
            cover = cover.astype(np.float32)
            paint = np.asarray(COLORS[thing.color], np.float32) * np.float32(thing.gain)
            canvas[near] = canvas[near] * (1 - cover) + paint * cover
        noise = np.random.default_rng(self.noise_seed).standard_normal(
            (self.height, self.width, 3), dtype=np.float32
        )
        noise = noise.repeat(scale, axis=0).repeat(scale, axis=1)
        return np.clip(np.rint(canvas + _NOISE * noise), 0, 255).astype(np.uint8)

    def image(self, scale: int = 1) -> Image.Image:
        """Return the scene as a PIL image of ``scale`` times its width and height."""
        return Image.fromarray(self.render(scale))

    def recolored(self, index: int, color: str) -> Scene:
        """Return the scene with object ``index`` in another ``color`` and no other change."""
        things = list(self.things)
        things[index] = replace(things[index], color=color)
        return replace(self, things=tuple(things))

    def blank(self) -> Scene:
        """Return the scene without objects, the control of position statistics."""
        return replace(self, things=())


def sample_scene(
    rng: np.random.Generator,
    *,
    width: int = 96,
    height: int = 96,
    n_things: tuple[int, int] = (2, 4),
) -> Scene:
    """Return a random scene.

    Args:
        rng: Random generator; the same state gives the same scene.
        width: Canvas width in pixels.
        height: Canvas height in pixels. Radii scale with the shorter side.
        n_things: Smallest and largest number of objects, both included.

    Returns:
        A scene whose objects have distinct (colour, shape) pairs and do not overlap.
    """
    n = int(rng.integers(n_things[0], n_things[1] + 1))
    unit = min(width, height) / 96
    pairs = rng.permutation(len(COLORS) * len(SHAPES))[:n]
    x, y, radius = _layout(rng, n, width, height, unit)
    gain = rng.uniform(0.8, 1.05, n)
    colors = list(COLORS)
    things = tuple(
        Thing(
            colors[p // len(SHAPES)],
            SHAPES[p % len(SHAPES)],
            float(x[i]),
            float(y[i]),
            float(radius[i]),
            float(gain[i]),
        )
        for i, p in enumerate(pairs)
    )
    return Scene(width, height, things, float(rng.uniform(20, 100)), int(rng.integers(2**31)))


def _layout(
    rng: np.random.Generator, n: int, width: int, height: int, unit: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return centres and radii of ``n`` objects, by rejection sampling of 64 layouts at a time."""
    upper = np.triu_indices(n, 1)
    while True:
        r = rng.uniform(SMALLEST * unit, LARGEST * unit, (64, n))
        x = rng.uniform(r + 1, width - r - 1)
        y = rng.uniform(r + 1, height - r - 1)
        off_lines = (np.abs(x - width / 2) > MARGIN * unit) & (
            np.abs(y - height / 2) > MARGIN * unit
        )
        dx = np.abs(x[:, :, None] - x[:, None])[:, *upper]
        dy = np.abs(y[:, :, None] - y[:, None])[:, *upper]
        reach = (r[:, :, None] + r[:, None])[:, *upper] + GAP * unit
        fits = off_lines.all(1) & ((np.maximum(dx, dy) > reach) & (dx > GAP * unit)).all(1)
        if fits.any():
            i = int(fits.argmax())
            return x[i], y[i], r[i]


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
