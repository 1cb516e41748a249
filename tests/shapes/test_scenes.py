"""The ground truth of scenes is right."""

import numpy as np
import pytest

from xmodal_interp.errors import InputError
from xmodal_interp.shapes import KINDS, ask, ask_all, sample_scene
from xmodal_interp.shapes.scenes import COLORS, Scene, Thing, place


def bare(thing: Thing, width: int = 96, height: int = 96) -> np.ndarray:
    return (
        Scene(width, height, (thing,), background=0.0, noise_seed=0).render().astype(float).sum(-1)
    )


@pytest.mark.parametrize("shape", ["circle", "square", "triangle", "cross"])
def test_a_box_is_the_extent_of_the_pixels(shape: str) -> None:
    thing = Thing("yellow", shape, 40.3, 51.7, 12.2)
    painted = np.argwhere(bare(thing) > 120)
    (top, left), (bottom, right) = painted.min(0), painted.max(0) + 1
    assert np.abs(np.array([left, top, right, bottom]) - thing.box).max() < 1.6


@pytest.mark.parametrize("size", [(96, 96), (128, 72), (72, 128), (200, 150)])
def test_objects_do_not_overlap_and_stay_inside(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        scene = sample_scene(rng, width=size[0], height=size[1])
        assert len({thing.name for thing in scene.things}) == len(scene.things)
        for i, a in enumerate(scene.things):
            assert min(a.box) >= 0
            assert a.box[2] <= size[0]
            assert a.box[3] <= size[1]
            for b in scene.things[:i]:
                apart = a.box[0] > b.box[2] or b.box[0] > a.box[2]
                assert apart or a.box[1] > b.box[3] or b.box[1] > a.box[3]


def test_a_recoloured_scene_differs_in_one_box_only() -> None:
    scene = sample_scene(np.random.default_rng(3))
    other = next(color for color in COLORS if color != scene.things[0].color)
    twin = scene.recolored(0, other)
    rows, cols = np.nonzero((scene.render() != twin.render()).any(-1))
    x0, y0, x1, y1 = scene.things[0].box
    assert len(rows) > 100
    assert (cols + 1 > x0 - 1).all()
    assert (cols < x1 + 1).all()
    assert (rows + 1 > y0 - 1).all()
    assert (rows < y1 + 1).all()


def test_every_question_has_one_right_answer() -> None:
    rng = np.random.default_rng(1)
    seen = dict.fromkeys(KINDS, 0)
    for _ in range(200):
        scene = sample_scene(rng)
        for question in ask_all(scene, rng):
            seen[question.kind] += 1
            names = [thing.name for thing in scene.things]
            if question.kind == "color":
                assert [t.color for t in scene.things if t.shape == question.subject] == [
                    question.answer
                ]
            elif question.kind == "shape":
                assert [t.shape for t in scene.things if t.color == question.subject] == [
                    question.answer
                ]
            elif question.kind == "place":
                assert question.answer == place(scene, names.index(question.subject))
            elif question.kind == "existence":
                assert question.answer == ("yes" if question.subject in names else "no")
            elif question.kind == "description":
                ordered = [t.name for t in sorted(scene.things, key=lambda t: t.x)]
                assert question.answer == " , ".join(f"a {name}" for name in ordered)
    assert min(seen.values()) > 100


def test_a_scene_is_the_same_for_the_same_seed() -> None:
    one, two = (sample_scene(np.random.default_rng(9)) for _ in range(2))
    assert one == two
    assert np.array_equal(one.render(), two.render())


def test_an_unknown_question_kind_raises() -> None:
    with pytest.raises(ValueError, match="kind must be one of color, shape, place, count") as error:
        ask(sample_scene(np.random.default_rng(0)), "size", np.random.default_rng(0))
    assert "got 'size'" in str(error.value)


def test_an_enlarged_scene_is_the_same_picture() -> None:
    scene = sample_scene(np.random.default_rng(5))
    small, large = scene.render(), scene.render(4)
    assert large.shape == (4 * scene.height, 4 * scene.width, 3)
    reduced = large.reshape(scene.height, 4, scene.width, 4, 3).mean((1, 3))
    assert np.abs(reduced - small).mean() < 0.2  # the edges are antialiased differently
    noise = Scene(scene.width, scene.height, (), scene.background, scene.noise_seed)
    np.testing.assert_array_equal(noise.render(4)[::4, ::4], noise.render())
    with pytest.raises(InputError, match=r"^scale must be at least 1, got 0\.$"):
        scene.render(0)
