"""One language of selectors wherever positions are named, and negative layers wherever layers are.

The values of each selector are read off the token tables of samples of the shipped models. Every
public function with an argument for positions or layers is in a table below; a function that is
added to the package and not to the table fails a test.
"""

import functools
import inspect
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image, ImageSequence
from typer.testing import CliRunner

import xmodal_interp as xi
from tests.helpers.intervened import logits
from tests.helpers.store_samples import shipped
from tests.helpers.tiny import QUESTION, picture, tiny_vlm
from xmodal_interp import at, evaluation, figures, hooks
from xmodal_interp.cli.commands import app
from xmodal_interp.errors import (
    GeometryError,
    InputError,
    LayerError,
    PhraseError,
    PositionError,
)
from xmodal_interp.sample import Sample
from xmodal_interp.shapes.scenes import sample_scene

ASKED = "where is the red circle ?"
N = 155  # positions of the sample: <bos> user: 144 image tokens, the question, assistant: top right
IMAGE = list(range(2, 146))
WORDS = list(range(146, 152))


@functools.cache
def scene_picture() -> Any:
    return sample_scene(np.random.default_rng(0)).image()


@functools.cache
def one_image(n_new: int = 4) -> Sample:
    return xi.capture(shipped(), scene_picture(), ASKED, max_new_tokens=n_new)


@functools.cache
def two_images() -> Sample:
    pictures = [scene_picture(), picture(96, 96)]
    return xi.capture(shipped("qwen2_vl"), pictures, ASKED, max_new_tokens=4)


@functools.cache
def a_video() -> Sample:
    video = xi.Video([scene_picture()] * 4, fps=2.0)
    return xi.capture(shipped("qwen2_vl"), [], ASKED, videos=video, max_new_tokens=4)


def refusal(error: type[Exception], function: Callable[..., Any], *args: Any, **more: Any) -> str:
    with pytest.raises(error) as found:
        function(*args, **more)
    assert type(found.value) is error
    return str(found.value)


# ------------------------------------------------------------------------------- the right values

VALUES: dict[str, tuple[Any, list[int]]] = {
    "last": (at.last, [152]),
    "text": (at.text, [*WORDS, 152, 153, 154]),
    "prompt": (at.prompt, list(range(153))),
    "answer": (at.answer, [153, 154]),
    "phrase": (at.phrase("red circle"), [149, 150]),
    "occurrence": (at.phrase("circle", occurrence=-1), [150]),
    "image": (at.image, IMAGE),
    "image 0": (at.image(0), IMAGE),
    "kind": (at.kind("text"), [1, *WORDS, 152, 153, 154]),
    "special": (at.special, [0]),
    "user": (at.role("user"), [*IMAGE, *WORDS]),
    "generated": (at.role("generated"), [153, 154]),
    "patch": (at.patch(3, 4), [2 + 3 * 12 + 4]),
    "box": (at.box((8, 8, 24, 20)), [15, 16, 27, 28]),  # tokens of 8 px
    "positions": (at.positions([5, -1]), [5, 154]),
    "slice": (at.positions(start=-3), [152, 153, 154]),
    "predicted phrase": (at.predicts("red circle"), [148, 149]),
    "predicted answer": (at.predicts(at.answer), [152, 153]),
    "predicted twice": (at.predicts(at.predicts(at.answer)), [151, 152]),
    "union": (at.answer | at.phrase("red") | 5 | "where" | [0, -1], [0, 5, 146, 149, 153, 154]),
    "left of a union": ([0] | at.last, [0, 152]),
    "array": (np.array([0, 7]) | at.last, [0, 7, 152]),
    "list": ([at.answer, "red", 5, slice(0, 2), lambda s: s.last], [0, 1, 5, 149, 152, 153, 154]),
    "nested list": ([at.last, ["red", [5, 6]]], [5, 6, 149, 152]),
    "function": (lambda sample: sample.find("red"), [149]),
    "function of a selector": (lambda _: [at.last, "red"], [149, 152]),
    "mask": ([i == 7 for i in range(N)], [7]),
    "numbers": ([9, 3, -1], [9, 3, 154]),
    "keyword last": ("last", [152]),
    "keyword text": ("text", [*WORDS, 152, 153, 154]),
    "keyword image": ("image", IMAGE),
    "keyword image 0": ("image 0", IMAGE),
    "keyword answer": ("answer", [153, 154]),
    "keyword prompt": ("prompt", list(range(153))),
    "keyword special": ("special", [0]),
}


@pytest.mark.parametrize("name", VALUES)
def test_values(name: str) -> None:
    selector, expected = VALUES[name]
    sample = one_image()
    assert len(sample) == N
    assert sample.positions(selector).tolist() == expected
    probs = sample.probs(0, queries=selector)
    assert torch.equal(probs, sample.probs(0, queries=expected))
    assert torch.equal(
        sample.probs(0, queries=[-1], keys=selector), sample.probs(0, [*range(8)], [-1], expected)
    )


def test_several_images() -> None:
    """Each image has 144 tokens, between two special tokens."""
    sample = two_images()
    first, second = list(range(3, 147)), list(range(149, 293))
    for selector, expected in (
        (at.image, first + second),
        (at.image(0), first),
        (at.image(np.int64(1)), second),
        ("image 1", second),
        (at.kind("image"), first + second),
        (at.patch(1, 2), [3 + 14]),
        (at.patch(1, 2, image=1), [149 + 14]),
        (at.box((0, 0, 8, 8), image=1), [149]),
        (at.image(1) | at.last, [*second, sample.last]),
    ):
        assert sample.positions(selector).tolist() == expected
    assert refusal(InputError, sample.positions, at.image(2)) == (
        "There is no image 2: sample 'sample-0' has 2 images, image 0 to image 1."
    )


def test_videos() -> None:
    """Two frames of 144 tokens."""
    sample = a_video()
    for selector, expected in (
        (at.video, range(3, 291)),
        ("video", range(3, 291)),
        ("video 0", range(3, 291)),
        (at.video(0), range(3, 291)),
        (at.video(0, frame=1), range(147, 291)),
        (at.kind("video"), range(3, 291)),
    ):
        assert sample.positions(selector).tolist() == list(expected)
    assert refusal(InputError, sample.positions, at.video(0, frame=2)) == (
        "There is no frame 2: video 0 of sample 'sample-0' has 2 frames of tokens, numbered from 0."
    )
    assert refusal(InputError, sample.positions, at.video(1)) == (
        "There is no video 1: sample 'sample-0' has 1 video, video 0."
    )
    assert refusal(InputError, sample.positions, "image 0") == (
        "There is no image 0: sample 'sample-0' has no images."
    )
    in_tower = sample.positions(at.video(0, frame=1), tower="vision").tolist()
    assert in_tower == np.flatnonzero(sample.video_grids[0].patch_places[:, 0] == 1).tolist()


@pytest.mark.parametrize("image", [0, 1])
def test_the_vision_tower(image: int) -> None:
    """24 x 24 patches of 4 px in blocks of 2 x 2; no class token."""
    sample = two_images()
    place = {"tower": "vision", "image": image}
    n = 24 * 24
    assert sample.positions(at.image, **place).tolist() == list(range(n))
    assert sample.positions(at.image(image), **place).tolist() == list(range(n))
    assert sample.positions("patch", **place).tolist() == list(range(n))
    places = sample.grids[image].patch_places.tolist()
    assert sample.positions(at.patch(1, 3), **place).tolist() == [places.index([1, 3])]
    overlapping = [places.index([row, col]) for row in (2, 3) for col in (0, 1, 2)]
    found = sample.positions(at.box((0, 8, 12, 16)), **place).tolist()
    assert found == sorted(overlapping)
    one = sample.probs(0, queries=at.patch(1, 3), keys=at.image, tower="vision", call=image)
    expected = sample.probs(0, queries=[places.index([1, 3])], tower="vision", call=image)
    assert torch.equal(one, expected)
    other = 1 - image
    assert refusal(InputError, sample.positions, at.image(other), **place) == (
        f"There are no tokens of image {other} in the vision tower of sample 'sample-0'."
    )


def test_names_of_the_vision_tower() -> None:
    sample = one_image()
    for selector in ("class", at.name("class"), at.special, at.kind("special")):
        assert sample.positions(selector, tower="vision").tolist() == [0]
    assert sample.positions(["class", at.patch(0, 1)], tower="vision").tolist() == [0, 2]
    assert refusal(PhraseError, sample.positions, at.name("crown"), tower="vision") == (
        "No position of the vision tower of sample 'sample-0' is named 'crown'; the names are "
        "class, patch. Pass one of them, or positions as numbers."
    )
    assert refusal(InputError, sample.positions, at.last, tower="vision") == (
        "at.last selects positions of the language tower; got it for the vision tower of sample "
        "'sample-0'. Pass at.image, at.patch(row, column), a name of the tower, or numbers."
    )
    assert refusal(InputError, sample.positions, at.name("class")) == (
        "at.name('class') selects positions of the vision tower; got it for sample 'sample-0'. "
        "Pass tower='vision', or at.phrase('class') for the words."
    )
    assert refusal(GeometryError, sample.positions, at.image, tower="vision", image=1) == (
        "There is no image 1: the sample has 1 images."
    )


def test_keys_of_cross_attention() -> None:
    sample = xi.capture(tiny_vlm("mllama"), [picture()], QUESTION)
    layer = sample.layers("language", "cross")[0]
    table = sample.cross_keys
    here = np.flatnonzero((table["row"].eq(1) & table["col"].eq(0)).fillna(value=False))
    place = {"queries": at.last, "kind": "cross"}
    whole = sample.probs(layer, **place)
    for selector, expected in (
        (at.image, np.flatnonzero(table["kind"] == "image")),
        ("image 0", np.flatnonzero(table["image"].eq(0).fillna(value=False))),
        (at.patch(1, 0), here),
        ([at.patch(1, 0), 0], sorted({0, *here.tolist()})),
    ):
        found = sample.probs(layer, keys=selector, **place)
        assert torch.equal(found, whole[..., torch.as_tensor(np.asarray(expected))])
    assert refusal(InputError, sample.probs, layer, keys="red circle", **place) == (
        "The phrase 'red circle' selects text, but keys of cross-attention are image tokens. Pass "
        "at.image, at.patch(row, column), or numbers."
    )
    assert refusal(InputError, sample.probs, layer, keys=at.last, **place) == (
        "at.last selects positions of the language tower; got it for the cross-attention keys of "
        "sample 'sample-0'. Pass at.image, at.patch(row, column), a name of the tower, or numbers."
    )


def test_positions_without_names() -> None:
    sample = one_image(0)
    assert refusal(InputError, sample.probs, queries="red", tower="connector") == (
        "queries of the connector tower's self-attention must be numbers; got 'red'. Its positions "
        "have no names."
    )
    assert refusal(InputError, sample.probs, keys=at.last, kind="cross") == (
        "keys of the language tower's cross-attention must be numbers; got at.last. Its positions "
        "have no names."
    )


def test_the_turns_of_a_chat() -> None:
    """Message 0 is the question, 1 its answer, 2 a second question, which the model answers."""
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": ASKED}]},
        {"role": "assistant", "content": "top right"},
        {"role": "user", "content": "how many shapes ?"},
    ]
    chat = xi.capture(shipped(), scene_picture(), messages, max_new_tokens=4)
    for selector, expected in (
        (at.role("user"), [*IMAGE, *WORDS, 157, 158, 159, 160]),
        (at.role("user", turn=0), [*IMAGE, *WORDS]),
        (at.role("user", turn=2), [157, 158, 159, 160]),
        (at.role("assistant"), [153, 154]),
        (at.role("generated", turn=3), [162, 163]),
        (at.answer, [162, 163]),
    ):
        assert chat.positions(selector).tolist() == expected
    assert refusal(InputError, chat.positions, at.role("user", turn=1)) == (
        "Sample 'sample-0' has no tokens with the role 'user' in turn 1; its roles are template, "
        "user, assistant, generated. Choose one of them."
    )
    assert refusal(InputError, one_image().positions, at.role("user", turn=0)) == (
        "Sample 'sample-0' is not a chat, so its tokens have no turns. Leave out turn."
    )


def test_a_given_answer() -> None:
    """Every token of a given answer has a row."""
    sample = xi.capture(shipped(), scene_picture(), ASKED, answer="top left")
    assert sample.positions(at.answer).tolist() == [153, 154]
    assert sample.positions(at.predicts(at.answer)).tolist() == [152, 153]
    assert sample.positions(at.predicts("left")).tolist() == [153]


# ----------------------------------------------------------------------------------- the language

EXPRESSIONS = (
    "at.last",
    "at.image",
    "at.image(1)",
    "at.video(0, frame=2)",
    "at.phrase('circle', occurrence=1)",
    'at.phrase("don\'t")',
    "at.kind('text')",
    "at.role('user', turn=1)",
    "at.patch(3, 4, image=1)",
    "at.box((8, 8, 40.5, 24))",
    "at.name('register 0')",
    "at.positions((3, 5))",
    "at.positions((7,))",
    "at.positions((True, False))",
    "at.positions(start=3, step=2)",
    "at.predicts(at.answer)",
    "at.predicts('yes')",
    "at.last | at.image(1) | 'red' | at.positions((5,))",
    "at.predicts(at.last | at.text)",
)


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_the_repr_is_the_expression(expression: str) -> None:
    selector = eval(expression, {"at": at})
    assert repr(selector) == expression
    assert at.parse(expression) == at.parse(f"xi.{expression}") == selector
    assert hash(at.parse(expression)) == hash(selector)
    assert selector | selector == selector
    again = pickle.loads(pickle.dumps(selector))
    assert again == selector
    assert type(again) is type(selector)
    with pytest.raises(AttributeError):
        selector.rule = "text"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("last", "last"),
        ("red circle", "red circle"),
        ("Note: here", "Note: here"),
        ("at:last", at.last),
        ("at:image 1", at.image(1)),
        ("phrase:last", at.phrase("last")),
        ("phrase:at:last", at.phrase("at:last")),
        ("kind:special", at.kind("special")),
        ("role:user", at.role("user")),
        ("name:register 0", at.name("register 0")),
        ("positions:3,5", at.positions([3, 5])),
        ("positions:-1", at.positions(-1)),
        ("positions:3:9", at.positions(slice(3, 9))),
        ("positions::9:2", at.positions(stop=9, step=2)),
        ("predicts:yes", at.predicts("yes")),
        ("predicts:phrase:last", at.predicts(at.phrase("last"))),
        ("predicts:at.answer | at.last", at.predicts(at.answer | at.last)),
    ],
)
def test_strings_of_the_command_line(given: str, expected: Any) -> None:
    assert at.parse(given) == expected


NAMES = (
    "at.last, at.text, at.image, at.video, at.special, at.answer, at.prompt, at.phrase, at.kind, "
    "at.role, at.patch, at.box, at.name, at.positions, at.predicts"
)


@pytest.mark.parametrize(
    "given",
    [
        *("at.first", "at.phrase", "at.phrase('a', 1", "at.last.rule", "at.phrase(open('a'))"),
        *("at.positions(__import__('os'))", "at.image(1)(2)", "at.phrase()", "at.last | None"),
    ],
)
def test_strings_that_are_no_expression(given: str) -> None:
    assert refusal(InputError, at.parse, given) == (
        f"{given!r} is not a selector. Write it as in Python, such as "
        f"at.phrase('circle', occurrence=1); the names are {NAMES}."
    )


@pytest.mark.usefixtures("any_type")
def test_refused_arguments() -> None:
    assert refusal(InputError, at.parse, "at:first") == (
        "'first' is not a keyword; the keywords are last, text, image, video, special, answer, "
        "prompt, 'image 1' and 'video 0'. Pass phrase:first for the words."
    )
    assert refusal(InputError, at.parse, "positions:a") == (
        "Positions must be numbers with commas, such as 3,5, or a slice, such as 3:9; got 'a'."
    )
    assert refusal(InputError, at.parse, "role:cook").startswith("role must be one of system, user")
    assert refusal(InputError, at.kind, "noise") == (
        "kind must be one of image, video, text, special, padding; got 'noise'."
    )
    assert refusal(InputError, at.image, -1) == (
        "image must be an integer from 0 to 10000000; got -1."
    )
    assert refusal(InputError, at.image(0), 1) == (
        "at.image(0) is one image already; it takes no index."
    )
    assert repr(at.last | len) == "at.last | function len"
    assert refusal(InputError, at.image, 0, frame=1) == (
        "Images have no frames; got frame=1. Leave frame out."
    )
    assert refusal(InputError, at.box, (4, 0, 2, 9)) == (
        "A box must be x0, y0, x1, y1 with x0 < x1 and y0 < y1; got (4, 0, 2, 9)."
    )
    assert refusal(InputError, at.phrase, "red", occurrence=0.5) == (
        "occurrence must be an integer, 0 for the first; got 0.5."
    )
    for given in (0.5, None, {3: 4}):
        assert refusal(PositionError, at.predicts, given) == (
            "A position must be a number, a list of numbers, a slice, or a boolean mask; got "
            f"{given!r}."
        )


def no_positions(sample: Sample) -> None:
    """Return nothing, although a selector must be returned."""


ERRORS: dict[str, tuple[Any, type[Exception], str]] = {
    "no such phrase": (
        at.phrase("dog"),
        PhraseError,
        "'dog' is not in the sample's text '<bos>user: <image> where is the red circle ? "
        "assistant: top right'.",
    ),
    "no such occurrence": (
        at.phrase("circle", occurrence=1),
        PhraseError,
        "There is no occurrence 1: 'circle' occurs 1 times.",
    ),
    "no image": (
        at.image(1),
        InputError,
        "There is no image 1: sample 'sample-0' has 1 image, image 0.",
    ),
    "no image by keyword": (
        "image 1",
        InputError,
        "There is no image 1: sample 'sample-0' has 1 image, image 0.",
    ),
    "no video": (
        at.video,
        InputError,
        "There are no video tokens in sample 'sample-0'. Choose other positions.",
    ),
    "no role": (
        at.role("system"),
        InputError,
        "Sample 'sample-0' has no tokens with the role 'system'; its roles are template, user, "
        "generated. Choose one of them.",
    ),
    "no patch": (
        at.patch(12, 0),
        InputError,
        "There is no token in row 12, column 0 of image 0 of sample 'sample-0': its grid has 12 "
        "rows and 12 columns.",
    ),
    "no box": (
        at.box((200, 0, 300, 9)),
        InputError,
        "No token of image 0 of sample 'sample-0' overlaps the box [200, 0, 300, 9]. The tokens "
        "cover [0.0, 0.0, 96.0, 96.0].",
    ),
    "function of nothing": (
        no_positions,
        PositionError,
        "The function no_positions returned None for sample 'sample-0'. It must return positions, "
        "a slice, a boolean mask, a phrase, a selector of xi.at, or a list of these.",
    ),
    "function of a fraction": (
        lambda _: [0.5],
        PositionError,
        "The function <lambda> returned [0.5] for sample 'sample-0'. It must return positions, a "
        "slice, a boolean mask, a phrase, a selector of xi.at, or a list of these.",
    ),
    "function beyond the end": (
        lambda _: 999,
        PositionError,
        "The function <lambda> returned 999 for sample 'sample-0'. A position must lie between "
        "-155 and 154; got 999.",
    ),
    "position beyond the end": (
        at.positions([3, 155]),
        PositionError,
        "A position must lie between -155 and 154; got 155.",
    ),
    "first position": (
        at.predicts(0),
        PositionError,
        "No position predicts the token at position 0 of sample 'sample-0': it is the first "
        "position. Leave out predicts=True.",
    ),
    "list of lists": (
        [[3, 4], [5, 6]],
        PositionError,
        "A position must be a number, a list of numbers, a slice, or a boolean mask; got "
        "[[3, 4], [5, 6]].",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    selector, error, message = ERRORS[name]
    assert refusal(error, one_image().positions, selector) == message


def test_a_mask_of_numbers_is_an_error() -> None:
    """Read as numbers, its zeros and ones are positions 0 and 1."""
    sample = xi.capture(shipped(), picture(), ASKED)
    length = len(sample.tokens)
    mask = np.arange(length) % 50 == 0
    assert sample.positions(mask).tolist() == np.flatnonzero(mask).tolist()
    for given in (mask.astype(int), torch.tensor(mask).to(torch.uint8), torch.tensor(mask).long()):
        with pytest.raises(PositionError) as refusal:
            sample.positions(given)
        assert str(refusal.value) == (
            f"The position numbers are {length} zeros and ones, one per position, which look like "
            "a mask. Convert a mask to booleans, such as mask.astype(bool)."
        )
    assert sample.positions([0, 1, 1]).tolist() == [0, 1, 1]


def test_a_sample_without_an_answer() -> None:
    message = (
        "Sample 'sample-0' has no answer: no token was generated. Capture it with max_new_tokens=, "
        "or choose other positions."
    )
    for selector in (at.answer, "answer", at.predicts(at.answer), [at.answer, 3]):
        assert refusal(InputError, one_image(0).positions, selector) == message


def test_an_answer_of_one_token_has_no_row() -> None:
    sample = one_image(1)
    assert (sample.answer, len(sample)) == ("top", sample.n_prompt)
    assert sample.positions(at.predicts(at.answer)).tolist() == [sample.last]
    assert sample.positions(at.predicts(at.phrase("top"))).tolist() == [sample.last]
    assert refusal(PhraseError, sample.positions, at.answer) == (
        "The answer 'top' of sample 'sample-0' has no attention row: its only token was generated "
        "last and was not fed back to the model. Pass xi.at.predicts(xi.at.answer), the row that "
        "predicts it, or capture more tokens."
    )


@pytest.mark.parametrize(
    ("word", "keyword"),
    [
        *(("last", "at.last"), ("Image", "at.image"), ("image 0", "at.image(0)")),
        *(("ANSWER", "at.answer"), ("prompt", "at.prompt"), ("special", "at.special")),
    ],
)
def test_a_keyword_that_is_a_word_of_the_text(word: str, keyword: str) -> None:
    sample = one_image()
    plain, typed = word.lower(), at.parse(keyword)
    meant = sample.positions(typed)
    collides = sample.changed(text=f"{sample.text} the {word} one")
    assert torch.equal(sample.positions(plain), meant)
    assert torch.equal(collides.positions(typed), meant)
    assert refusal(PhraseError, collides.positions, plain) == (
        f"{plain!r} is ambiguous: it is a keyword and a word in the text of sample 'sample-0'. "
        f"Pass xi.{keyword} for the keyword, or xi.at.phrase({plain!r}) for the word."
    )


# ------------------------------------------------------------------- every function, every selector

POSITIONS = ("queries", "keys", "positions", "selector", "sinks")
LAYERS = ("layer", "layers")
BOX = [(0, 0, 40, 40)]


def public_functions() -> dict[str, Callable[..., Any]]:
    """Return all public functions and the methods of samples, by name."""
    found = {}
    for module in (xi, xi.analysis, evaluation, figures, hooks):
        for name in dir(module):
            each = getattr(module, name)
            if inspect.isfunction(each) or inspect.isclass(each):
                found[name] = each
    methods = inspect.getmembers(Sample, inspect.isfunction)
    return found | {f"Sample.{name}": each for name, each in methods if not name.startswith("_")}


def arguments_of(names: tuple[str, ...]) -> set[tuple[str, str]]:
    """Return each public function with each of its arguments that is in ``names``."""
    found = set()
    for function, each in public_functions().items():
        try:
            parameters = inspect.signature(each).parameters
        except (TypeError, ValueError):
            continue
        found |= {(function, name) for name in parameters if name in names}
    return found


def drawn(figure: Any) -> list[Any]:
    """Return the titles, texts and images of a figure."""
    parts: list[Any] = [text.get_text() for text in figure.texts]
    for axes in figure.axes:
        parts += [axes.get_title(), [t.get_text() for t in axes.get_xticklabels()]]
        parts += [
            np.nan_to_num(np.ma.filled(image.get_array(), np.nan), nan=-1.0).tolist()
            for image in axes.images
        ]
    return parts


def analysis(name: str, argument: str = "queries", **options: Any) -> Callable[[Any], Any]:
    function = public_functions()[name]
    return lambda given: function(one_image(0), **{argument: given}, **options)


def figure(name: str, **options: Any) -> Callable[[Any], Any]:
    function = public_functions()[name]
    return lambda given: drawn(function(one_image(0), queries=given, **options))


def intervened(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def run(given: Any) -> Any:
        vlm = shipped()
        inputs, _ = vlm.prepare([[scene_picture()]], [ASKED])
        return logits(vlm, inputs, make(given))

    return run


def kept(given: Any) -> Any:
    keep = xi.Keep(queries=given, layers=[0])
    sample = xi.capture(shipped(), scene_picture(), ASKED, keep=keep)
    return sample.call(0).query_positions


def head_means(given: Any) -> Any:
    items = [{"image": scene_picture(), "prompt": ASKED}]
    means = xi.mean_head_outputs(shipped(), items, positions=given)
    return torch.stack(list(means.means.values()))


CALLS: dict[tuple[str, str], Callable[[Any], Any]] = {
    **{
        (name, "queries"): analysis(name)
        for name in (
            *("cross_modal_ratio", "token_ratio", "attention_entropy", "recency_index"),
            *("raster_bias", "raster_map", "raster_profile"),
        )
    },
    ("attention_rollout", "queries"): analysis("attention_rollout"),
    ("attention_rollout", "sinks"): analysis("attention_rollout", "sinks", queries=[150]),
    ("rollout_matrix", "sinks"): analysis("rollout_matrix", "sinks"),
    **{
        (name, "queries"): lambda given, name=name: getattr(evaluation, name)(
            one_image(0), BOX, queries=given, **({"n_bootstrap": 5} if "game" in name else {})
        )
        for name in ("pointing_game", "pointing_hits")
    },
    **{
        (name, "queries"): figure(name)
        for name in ("overlay", "overlays", "overlay_grid", "head_overlays", "token_patch_matrix")
    },
    ("layer_overlays", "queries"): figure("layer_overlays", layers=[0, 3]),
    ("token_head_grid", "queries"): figure("token_head_grid", heads=[0, 1]),
    ("before_after", "queries"): lambda given: drawn(
        figures.before_after(one_image(0), one_image(0), given)
    ),
    ("ablate_heads", "queries"): intervened(lambda given: xi.ablate_heads({1: [0]}, queries=given)),
    ("knock_out_attention", "queries"): intervened(
        lambda given: xi.knock_out_attention(given, at.image)
    ),
    ("knock_out_attention", "keys"): intervened(
        lambda given: xi.knock_out_attention(at.last, given)
    ),
    ("mean_head_outputs", "positions"): head_means,
    ("Keep", "queries"): kept,
    ("view", "queries"): lambda given: (
        xi.view(one_image(0), queries=given, rollout=False).rows[0].queries.tolist()
    ),
    ("Sample.positions", "selector"): lambda given: one_image(0).positions(given),
    ("Sample.probs", "queries"): lambda given: one_image(0).probs(0, queries=given),
    ("Sample.probs", "keys"): lambda given: one_image(0).probs(0, keys=given),
}
NOT_SELECTORS = {  # numbers of one call, or of no sample
    ("AttentionCall", "sinks"),  # learned scores of the model
    ("RawCall", "sinks"),
}
OF_VIDEOS = ("video_overlays", "video_animation")
FORMS: dict[str, tuple[Any, list[int]]] = {
    "phrase": ("circle", [150]),
    "typed": (at.phrase("red"), [149]),
    "union": (at.last | at.phrase("red"), [149, 152]),
    "list": (["red", at.last], [149, 152]),
    "function": (lambda sample: sample.find("red circle"), [149, 150]),
    "function of a selector": (lambda _: at.last, [152]),
    "slice": (slice(149, 151), [149, 150]),
    "mask": (np.arange(153) == 151, [151]),
    "negative": (-3, [150]),
}


def test_every_argument_for_positions_is_tested() -> None:
    of_videos = {(name, "queries") for name in OF_VIDEOS}
    assert arguments_of(POSITIONS) - NOT_SELECTORS - of_videos == set(CALLS)


PAIRS = [
    pytest.param(call, form, id=f"{'-'.join(call)}-{form}")
    for call in CALLS
    for form, (given, _) in FORMS.items()
    if call[0] != "Keep" or isinstance(given, (str, at.TypedSelector))
]


@pytest.mark.parametrize(("call", "form"), PAIRS)
def test_every_function_takes_every_selector(call: tuple[str, str], form: str) -> None:
    given, expected = FORMS[form]
    run = CALLS[call]
    if form == "negative" and call[0] in ("ablate_heads", "knock_out_attention"):
        assert refusal(PositionError, run, given) == (
            "Got the negative position -3, but positions of an intervention count from the start "
            "of the sequence, because its end moves during generation. Use xi.at.last for the last "
            "position of a prompt."
        )
        return
    found, plain = run(given), run(at.positions(expected) if call[0] == "Keep" else expected)
    if isinstance(found, pd.DataFrame):
        pd.testing.assert_frame_equal(found, plain)
        json.dumps(found.attrs)
    elif isinstance(found, torch.Tensor):
        assert torch.equal(found, plain)
        assert found.numel()
    else:
        assert found == plain


def at_layer(name: str, argument: str, **options: Any) -> Callable[[Any], Any]:
    function = public_functions()[name]

    def run(layer: Any) -> Any:
        found = function(one_image(0), **{argument: layer}, **options)
        return drawn(found) if hasattr(found, "axes") and hasattr(found, "texts") else found

    return run


def recorded(layers: Any) -> Any:
    vlm = shipped()
    inputs, _ = vlm.prepare([[scene_picture()]], [ASKED])
    with torch.no_grad(), xi.record(vlm, layers=layers, towers=["language"]) as recording:
        vlm.run(inputs)
    return [repr(call) for call in recording.calls]


def kept_layers(layers: Any) -> Any:
    keep = xi.Keep(layers=layers, towers=("language",))
    return list(xi.capture(shipped(), scene_picture(), ASKED, keep=keep).calls)


def pruned(layers: Any) -> Any:
    items = [{"image": scene_picture(), "prompt": ASKED, "answer": "top right"}]
    return xi.head_pruning(shipped(), items, layers=layers, n_bootstrap=1)


OF_LAYERS: dict[tuple[str, str], Callable[[Any], Any]] = {
    **{
        (name, "layers"): at_layer(name, "layers")
        for name in (
            *("attention_allocation", "attention_distance", "attention_entropy"),
            *("attention_rollout", "rollout_matrix", "attention_sinks", "sink_rate"),
            *("block_statistics", "cross_modal_ratio", "token_ratio", "positional_bias"),
            *("recency_index", "raster_bias", "raster_map", "raster_profile"),
            *("layer_overlays", "overlay_grid"),
        )
    },
    **{
        (name, "layer"): at_layer(name, "layer")
        for name in (
            *("cross_modal_summary", "overlay", "overlays", "head_overlays", "token_head_grid"),
            *("token_patch_matrix", "attention_matrix", "mask_structure"),
        )
    },
    ("token_norms", "layers"): lambda layers: xi.token_norms(with_norms(), layers=layers),
    ("pointing_game", "layers"): lambda layers: evaluation.pointing_game(
        one_image(0), BOX, layers=layers, n_bootstrap=5
    ),
    ("pointing_hits", "layers"): lambda layers: evaluation.pointing_hits(
        one_image(0), BOX, layers=layers
    ),
    ("head_pruning", "layers"): pruned,
    ("record", "layers"): recorded,
    ("Keep", "layers"): kept_layers,
    ("view", "layers"): lambda layers: xi.view(one_image(0), layers=[layers]).rows[0].layers,
    ("knock_out_attention", "layers"): intervened(
        lambda layers: xi.knock_out_attention(at.last, at.image, layers=layers)
    ),
    ("answer_overlays", "layer"): lambda layer: drawn(figures.answer_overlays(one_image(), layer)),
    ("before_after", "layer"): lambda layer: drawn(
        figures.before_after(one_image(0), one_image(0), "red", layer)
    ),
    ("mask_comparison", "layer"): lambda layer: drawn(
        figures.mask_comparison({"one": one_image(0)}, layer)
    ),
    ("patch_overlays", "layer"): lambda layer: drawn(
        figures.patch_overlays(one_image(0), [(10, 10)], layer)
    ),
    ("MatrixSelection", "layer"): lambda layer: repr(
        figures.MatrixSelection(one_image(0), layer).found()
    ),
    ("Sample.call", "layer"): lambda layer: repr(one_image(0).call(layer)),
    ("Sample.probs", "layer"): lambda layer: one_image(0).probs(layer, queries=at.last),
}
OF_VISION = {("patch_overlays", "layer"): 2, ("attention_distance", "layers"): 2}  # of 3 layers
NOT_LAYERS = {("AttentionCall", "layer"), ("Identity", "layer")}  # what a call or a module is


@functools.cache
def with_norms() -> Sample:
    return xi.capture(shipped(), scene_picture(), ASKED, keep=xi.Keep(norms=True))


def test_every_argument_for_layers_is_tested() -> None:
    of_videos = {(name, "layer") for name in OF_VIDEOS}
    assert arguments_of(LAYERS) - NOT_LAYERS - of_videos == set(OF_LAYERS)


def frames_of(path: Path) -> list[bytes]:
    with Image.open(path) as opened:
        return [frame.convert("RGB").tobytes() for frame in ImageSequence.Iterator(opened)]


@pytest.mark.parametrize("given", [at.phrase("circle"), "circle", ["circle"], lambda _: "circle"])
def test_figures_of_videos_take_selectors_and_negative_layers(given: Any, tmp_path: Path) -> None:
    sample = a_video()
    rows, last = sample.find("circle").tolist(), sample.layers()[-1]
    found = figures.video_overlays(sample, given, -1)
    assert drawn(found) == drawn(figures.video_overlays(sample, rows, last))
    one = figures.video_animation(sample, given, -1, path=tmp_path / "one.gif")
    other = figures.video_animation(sample, rows, last, path=tmp_path / "other.gif")
    assert frames_of(one) == frames_of(other)


@pytest.mark.parametrize("call", OF_LAYERS, ids="-".join)
def test_negative_layers_count_from_the_last(call: tuple[str, str]) -> None:
    run = OF_LAYERS[call]
    last = OF_VISION.get(call, 3)
    for layer, expected in ((-1, last), (-2, last - 1)):
        found, plain = run(layer), run(expected)
        if isinstance(found, pd.DataFrame):
            pd.testing.assert_frame_equal(found, plain)
            assert set(found.get("layer", [expected])) <= {expected, pd.NA}
        elif isinstance(found, torch.Tensor):
            assert torch.equal(found, plain)
        else:
            assert found == plain
            assert found


def test_negative_layers_of_each_tower() -> None:
    """The language tower has 4 layers, the vision tower 3."""
    keep = xi.Keep(layers=[-1, 0])
    sample = xi.capture(shipped(), scene_picture(), ASKED, keep=keep)
    assert sample.layers("language") == [0, 3]
    assert sample.layers("vision") == [0, 2]
    ablated = intervened(lambda given: xi.ablate_heads(given))
    assert torch.equal(ablated({-1: [0], -2: [-1]}), ablated({3: [0], 2: [7]}))
    message = (
        "Got layers -5, but the model has layers 0 to 3. Count layers from 0; negative numbers "
        "count from the last."
    )
    assert refusal(InputError, kept_all, [-5]) == message
    assert refusal(LayerError, xi.attention_rollout, one_image(0), layers=-5) == (
        "There is no layer -5: layers are 0 to 3."
    )


def kept_all(layers: Any) -> Any:
    return xi.capture(shipped(), scene_picture(), ASKED, keep=xi.Keep(layers=layers))


# ---------------------------------------------------------- stores, processes and the command line


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> xi.Store:
    folder = tmp_path_factory.mktemp("selectors") / "store"
    questions = (ASKED, "how many shapes ?")
    items = [{"image": scene_picture(), "prompt": each} for each in questions]
    return xi.capture_dataset(shipped(), items, folder, max_new_tokens=4, progress=False)


def test_a_store_is_analysed_with_a_selector_for_every_sample(store: xi.Store) -> None:
    for selector in (at.answer, at.predicts(at.answer), lambda s: s.positions(at.answer)):
        table = xi.cross_modal_ratio(store, queries=selector)
        parts = [xi.cross_modal_ratio(s, queries=s.positions(selector).tolist()) for s in store]
        pd.testing.assert_frame_equal(table, pd.concat(parts, ignore_index=True))
    assert table.attrs["parameters"]["queries"] == "function <lambda>"
    table = xi.cross_modal_ratio(store, queries=at.predicts(at.answer) | "assistant" | at.last)
    assert table.attrs["parameters"]["queries"] == (
        "at.predicts(at.answer) | 'assistant' | at.last"
    )


def test_processes_are_given_selectors(store: xi.Store) -> None:
    selector = at.answer | at.last
    found = xi.cross_modal_ratio(store, queries=selector, workers=2)
    pd.testing.assert_frame_equal(found, xi.cross_modal_ratio(store, queries=selector))
    assert found.attrs["parameters"]["queries"] == "at.answer | at.last"


def test_the_settings_of_a_store_hold_the_selector(tmp_path: Any) -> None:
    item = {"image": scene_picture(), "prompt": ASKED}
    keep = xi.Keep(queries=at.predicts(at.answer), layers=-1)
    options = {"max_new_tokens": 4, "keep": keep, "progress": False}
    (sample,) = xi.capture_dataset(shipped(), [item], tmp_path, **options)
    assert sample.call(-1).query_positions.tolist() == [152, 153]
    assert at.parse(sample.provenance["kept"]["queries"]) == at.predicts(at.answer)
    (again,) = xi.capture_dataset(shipped(), [item], tmp_path, **options)
    assert again.name == sample.name


@pytest.mark.usefixtures("any_type")
def test_the_kept_rows_can_be_written_in_settings() -> None:
    for given in ([3, 5], slice(3), lambda s: s.last, at.last | len, at.predicts(len)):
        assert refusal(InputError, xi.Keep, queries=given).startswith(
            "queries must be 'all', 'text', or another string or selector of xi.at without a "
            "function; got "
        )
    assert xi.Keep(queries=at.text).queries == "text"
    message = "With statistics, queries must be 'all' or 'text'; got at.last."
    assert refusal(InputError, xi.Keep, queries=at.last, statistics=["mass"]) == message


@pytest.mark.parametrize(
    ("given", "selector"),
    [
        *(("last", at.last), ("answer", at.answer), ("phrase:shapes", at.phrase("shapes"))),
        *(("at:last", at.last), ("predicts:at:answer", at.predicts(at.answer))),
        *(("positions:-2,-1", [-2, -1]), ("at.answer | at.last", at.answer | at.last)),
    ],
)
def test_the_command_line(tmp_path: Any, given: str, selector: Any) -> None:
    run = CliRunner().invoke
    path = tmp_path / "table.parquet"
    folder = tmp_path / "one"
    item = {"image": scene_picture(), "prompt": "how many shapes ?"}
    one = xi.capture_dataset(shipped(), [item], folder, max_new_tokens=4, progress=False)
    done = run(
        app, ["analyze", str(folder), "token-ratio", "--queries", given, "--path", str(path)]
    )
    assert done.exit_code == 0, done.output
    expected = xi.token_ratio(one, queries=selector)
    pd.testing.assert_frame_equal(pd.read_parquet(path), expected, check_dtype=False)


def test_the_command_line_refuses_what_is_no_selector(store: xi.Store) -> None:
    run = CliRunner().invoke
    done = run(app, ["analyze", str(store.path), "token-ratio", "--queries", "at:first"])
    assert done.exit_code == 1
    assert "'first' is not a keyword" in " ".join(done.output.split())
    done = run(app, ["analyze", str(store.path), "token-ratio", "--queries", "image 1"])
    assert done.exit_code == 1
    assert "There is no image 1" in " ".join(done.output.split())


# ------------------------------------------------------------------------------------ the document


def test_the_page_of_selectors() -> None:
    """Each line of code of docs/selectors.md is executed; its comment is the result."""
    names: dict[str, Any] = {}
    checked = 0
    for block in re.findall(r"```python\n(.*?)```", Path("docs/selectors.md").read_text(), re.S):
        for line in block.splitlines():
            code, _, expected = line.partition("  # ")
            if not expected:
                exec(code, names)
                continue
            assert repr(eval(code, names)) == expected, line
            checked += 1
    assert checked == 24


def test_the_page_and_the_docstring_name_every_selector() -> None:
    page = Path("docs/selectors.md").read_text()
    for name in set(at.__all__) - {"Selector", "TypedSelector", "parse"}:
        assert f"at.{name}" in page, name
        assert f"at.{name}" in at.__doc__, name
    for keyword in at.KEYWORDS:
        assert f'"{keyword}"' in page
        assert f'"{keyword}"' in at.__doc__
