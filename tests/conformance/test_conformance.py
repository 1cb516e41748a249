"""The contract of a recording, kept by every type: the same outputs, all attention, exact numbers.

A third of the types by default, all of them with ``--all-types``; besides, models that were not
looked at while the recorder was written: dual encoders, other text models inside LLaVA.
"""

from __future__ import annotations

from collections import Counter
from fnmatch import fnmatchcase

import pytest
import torch

from tests.attention.test_stitching import BACKBONES, llava_over
from tests.conformance.building import STEPS, Tiny, representatives, tiny, types
from tests.conformance.known import NOT_SQUARE, WRONG
from tests.conformance.measuring import WORST, Measured, measured
from tests.conformance.overrides import DUAL_ENCODERS
from tests.tiny import QUESTION, picture, tiny_vlm

LIMIT = 1e-5  # of a probability, in float32
SOME_DUAL_ENCODERS = ["clip", "siglip", "blip_itm", "bridgetower", "groupvit"]
OVER = {f"llava over {text}": text for text in ("gpt_oss", "gemma2")}
Found = tuple[str, Measured]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "found" in metafunc.fixturenames:
        everything = metafunc.config.getoption("all_types")
        names = [*types(), *DUAL_ENCODERS] if everything else representatives() + SOME_DUAL_ENCODERS
        metafunc.parametrize("found", [*names, *OVER], indirect=True, scope="module")


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest) -> Found:
    name = request.param
    model = _llava_over(OVER[name]) if name in OVER else tiny(name)
    return name, measured(model)


@pytest.fixture(autouse=True)
def _known_to_be_wrong(request: pytest.FixtureRequest) -> None:
    name = getattr(getattr(request.node, "callspec", None), "params", {}).get("found")
    reason = WRONG.get((name, request.node.originalname))
    if reason:
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))


def test_outputs_are_bit_identical(found: Found) -> None:
    _, model = found
    assert model.forward.same


def test_a_cached_generation_is_the_same(found: Found) -> None:
    name, model = found
    assert model.generation is None or model.generation.same
    if name in OVER:
        assert model.generation is not None


def test_every_softmax_attention_is_heard_as_often_as_it_ran(found: Found) -> None:
    _, model = found
    for run in model.runs:
        assert run.spied
        assert run.heard == run.spied


def test_probabilities_are_those_that_ran(found: Found, request: pytest.FixtureRequest) -> None:
    name, model = found
    request.config.stash.setdefault(WORST, {})[name] = model.error
    for run in model.runs:
        assert len(run.spied_errors) == len(run.recording.calls)
        assert [error for error in run.spied_errors if not error < LIMIT] == []


def test_probabilities_give_the_output_and_are_those_of_eager(found: Found) -> None:
    _, model = found
    calls = [call for run in model.runs for call in run.recording.calls]
    asked = [call for call in calls if not call.note]
    errors = [error for run in model.runs for error in run.exactness.output_errors]
    assert len(errors) >= len(asked)
    assert [error for error in errors if not error < LIMIT] == []
    eager = [error for run in model.runs for error in run.exactness.eager_errors]
    assert [error for error in eager if not error < LIMIT] == []


def test_each_module_has_a_name_of_its_own(found: Found) -> None:
    _, model = found
    recording = model.forward.recording
    names = Counter((each.tower, each.kind, each.layer) for each in recording.modules)
    assert [name for name, n in names.items() if n > 1] == []
    places = Counter((c.tower, c.kind, c.layer, c.call) for c in recording.calls)
    assert [place for place, n in places.items() if n > 1] == []


def test_self_attention_is_square_and_cross_attention_is_not(found: Found) -> None:
    name, model = found
    stated = NOT_SQUARE.get(name, {})
    odd = {
        call.module
        for call in model.forward.recording.calls
        if (call.kind == "self") != (call.n_queries == call.n_keys)
    }
    assert [m for m in odd if not any(fnmatchcase(m, pattern) for pattern in stated)] == []
    unused = [p for p in stated if not any(fnmatchcase(module, p) for module in odd)]
    assert unused == []


def test_each_query_has_a_choice(found: Found) -> None:
    _, model = found
    assert [call.name for call in model.forward.recording.calls if call.n_keys < 2] == []


def _llava_over(text: str) -> Tiny:
    """LLaVA with another language model, two questions of different lengths."""
    vlm = tiny_vlm("llava")
    pictures = [[picture(seed=i)] for i in range(2)]
    inputs, _ = vlm.prepare(pictures, [QUESTION, "how many ?"])
    assert not bool(inputs["attention_mask"].all())
    with torch.random.fork_rng(devices=[]):
        model = llava_over(text, **BACKBONES[text])
    return Tiny(model, inputs, generates=True, generate_inputs=inputs | STEPS)
