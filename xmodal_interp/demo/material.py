"""Input of the demo: held-out scenes, and one question of every kind about each."""

from __future__ import annotations

from typing import Any

import numpy as np

from xmodal_interp.shapes import KINDS, Scene, ask_all, sample_scene

HELD_OUT = 2**40  # first part of the seed; training uses (seed, step), which is never this large


def held_out_scenes(n_scenes: int) -> list[Scene]:
    """Return scenes not used in training, each of which allows a question of every kind."""
    scenes: list[Scene] = []
    number = 0
    while len(scenes) < n_scenes:
        rng = np.random.default_rng((HELD_OUT, number))
        scene = sample_scene(rng)
        number += 1
        if len(ask_all(scene, rng)) == len(KINDS):
            scenes.append(scene)
    return scenes


def questions_about(scenes: list[Scene]) -> list[dict[str, Any]]:
    """Return items for the analyses: image, prompt, answer, question kind and boxes.

    ``box`` is the box of the object asked about, ``other_boxes`` are those of the other objects, in
    pixels. Questions about the whole scene have neither.
    """
    items = []
    for number, scene in enumerate(scenes):
        image = scene.image()
        rng = np.random.default_rng((HELD_OUT, number, 1))
        for question in ask_all(scene, rng):
            item: dict[str, Any] = {
                "name": f"scene-{number:03d}-{question.kind}",
                "image": image,
                "prompt": question.text,
                "answer": question.answer,
                "kind": question.kind,
                "subject": question.subject,
            }
            if question.thing is not None:
                boxes = [list(thing.box) for thing in scene.things]
                item["box"] = boxes.pop(question.thing)
                item["other_boxes"] = boxes
            items.append(item)
    return items


def of_kind(items: list[dict[str, Any]], *kinds: str) -> list[dict[str, Any]]:
    """Return the items of some question kinds."""
    return [item for item in items if item["kind"] in kinds]
