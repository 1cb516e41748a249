"""The contract of a recording, for every type: unchanged outputs, all attention, exact values.

A third of the types are tested by default, all of them with ``--all-types``. Further models, which
were not used to develop the recorder, are dual encoders and LLaVA with other text models.
"""

from __future__ import annotations

import inspect
from collections import Counter
from fnmatch import fnmatchcase

import pytest
import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from tests.conformance.matrix import STALE, STORED, TABLE, row_of, with_videos
from tests.conformance.measuring import WORST, Measured, measured
from tests.helpers.attention_variants import BACKBONES, llava_over
from tests.helpers.clips import clip
from tests.helpers.families import DUAL_ENCODERS, RECORDS
from tests.helpers.model_types import (
    STEPS,
    Tiny,
    reads_videos,
    record_of,
    representatives,
    tiny,
    types,
)
from tests.helpers.real import inputs, real
from tests.helpers.tiny import QUESTION, picture, tiny_vlm
from xmodal_interp.hooks import record
from xmodal_interp.hooks.inline_attention import CHUNKED_NOTE
from xmodal_interp.models import FAMILIES

pytestmark = pytest.mark.filterwarnings(  # raised inside the processors
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"
)
LIMIT = 1e-5  # of a probability, in float32
SOME_DUAL_ENCODERS = ["clip", "siglip", "blip_itm", "bridgetower", "groupvit"]
WITH_VIDEO = {f"{name} with video": name for name in RECORDS if reads_videos(name)}
NO_VIDEO = [name for name, record in RECORDS.items() if record.no_video]
OVER = {f"llava over {text}": text for text in ("gpt_oss", "gemma2")}
Found = tuple[str, Measured]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "found" in metafunc.fixturenames:
        everything = metafunc.config.getoption("all_types")
        names = [*types(), *DUAL_ENCODERS] if everything else representatives() + SOME_DUAL_ENCODERS
        videos = WITH_VIDEO if everything else some_with_video()
        metafunc.parametrize("found", [*names, *videos, *OVER], indirect=True, scope="module")


def some_with_video() -> list[str]:
    """Return one type for each rule that places frames and images."""
    ways = {
        (FAMILIES[name].video_rule, FAMILIES[name].rule): shown
        for shown, name in reversed(WITH_VIDEO.items())
    }
    return list(ways.values())


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest) -> Found:
    name = request.param
    if name in OVER:
        return name, measured(_llava_over(OVER[name]))
    return name, measured(tiny(WITH_VIDEO.get(name, name), video=name in WITH_VIDEO))


def test_outputs_are_bit_identical(found: Found) -> None:
    _, model = found
    assert model.forward.same


def test_a_cached_generation_is_unchanged(found: Found) -> None:
    name, model = found
    assert model.generation is None or model.generation.same
    if name in OVER:
        assert model.generation is not None


def test_every_softmax_attention_call_is_recorded(found: Found) -> None:
    _, model = found
    for run in model.runs:
        assert run.spied
        assert run.recorded == run.spied


def test_probabilities_equal_the_observed_ones(
    found: Found, request: pytest.FixtureRequest
) -> None:
    name, model = found
    request.config.stash.setdefault(WORST, {})[name] = model.error
    for run in model.runs:
        assert len(run.spied_errors) == len(run.recording.calls)
        assert [error for error in run.spied_errors if not error < LIMIT] == []


def test_probabilities_reproduce_the_output_and_equal_eager(found: Found) -> None:
    _, model = found
    calls = [call for run in model.runs for call in run.recording.calls]
    asked = [call for call in calls if not call.note]
    errors = [error for run in model.runs for error in run.exactness.output_errors]
    assert len(errors) >= len(asked)
    assert [error for error in errors if not error < LIMIT] == []
    eager = [error for run in model.runs for error in run.exactness.eager_errors]
    assert [error for error in eager if not error < LIMIT] == []


def test_all_types_that_take_videos_are_tested() -> None:
    mapping = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    takes = {
        name
        for name in types()
        if "pixel_values_videos"
        in inspect.signature(getattr(transformers, mapping[name]).forward).parameters
    }
    assert takes <= {*WITH_VIDEO.values(), *NO_VIDEO}


def run_with_video(name: str) -> None:
    model, question = real(name)[0], "where is the red circle?"
    model(**inputs(name, [[]], [question], videos=[clip(2, 0)]))


@pytest.mark.parametrize("name", NO_VIDEO)
def test_some_types_fail_on_videos_without_recording(name: str) -> None:
    with pytest.raises((AttributeError, RuntimeError, TypeError), match=record_of(name).no_video):
        run_with_video(name)


@pytest.mark.parametrize("name", ["gemma3n", "gemma4"])
def test_chunked_audio_attention_is_recorded_as_probabilities(name: str) -> None:
    """Chunks of queries attend to the keys around them; five axes become four, with a note."""
    model = tiny(name)
    with record(model.model, towers=["audio"]) as recording, torch.no_grad():
        model.model(**model.inputs)
    assert len(recording.calls) == 2
    for call in recording.calls:
        assert call.note == CHUNKED_NOTE
        assert (call.n_queries, call.n_keys) == (12, 8)  # three chunks of 4; 4 keys before each
        probs, visible = call.probs(), call.visible().expand(2, -1, -1, -1)
        seeing = visible.any(-1).expand(probs.shape[:-1])
        assert seeing.any()
        torch.testing.assert_close(probs[seeing].sum(-1), torch.ones(int(seeing.sum())))
        assert probs[seeing][~visible.expand(probs.shape)[seeing]].max() < 1e-6
        assert not visible[1, 0, -1].any()  # the shorter sound has fewer keys


def test_the_stored_row_equals_the_measurement(found: Found) -> None:
    name, model = found
    if name not in STORED["types"]:
        return
    again, stored = row_of(name, with_videos(name, model)), STORED["types"][name]
    assert max(again.pop("worst_error"), stored["worst_error"]) < LIMIT
    assert {**again, "worst_error": stored["worst_error"]} == stored, f"{TABLE.name} {STALE}"
    assert again["outputs_same"] is True
    assert again["generation"] is not False


def test_names_of_modules_are_unique(found: Found) -> None:
    _, model = found
    recording = model.forward.recording
    names = Counter((each.tower, each.kind, each.layer) for each in recording.modules)
    assert [name for name, n in names.items() if n > 1] == []
    places = Counter((c.tower, c.kind, c.layer, c.call) for c in recording.calls)
    assert [place for place, n in places.items() if n > 1] == []


def test_self_attention_is_square_and_cross_attention_is_not(found: Found) -> None:
    name, model = found
    stated = {} if name in OVER else record_of(WITH_VIDEO.get(name, name)).not_square
    odd = {
        call.module
        for call in model.forward.recording.calls
        if (call.kind != "cross") != (call.n_queries == call.n_keys)
    }
    assert [m for m in odd if not any(fnmatchcase(m, pattern) for pattern in stated)] == []
    unused = [p for p in stated if not any(fnmatchcase(module, p) for module in odd)]
    assert unused == [] or name in WITH_VIDEO  # sounds are passed with images only


def test_every_call_has_more_than_one_key(found: Found) -> None:
    _, model = found
    assert [call.name for call in model.forward.recording.calls if call.n_keys < 2] == []


def _llava_over(text: str) -> Tiny:
    """Build LLaVA with another language model, and inputs of two questions of different lengths."""
    vlm = tiny_vlm("llava")
    pictures = [[picture(seed=i)] for i in range(2)]
    inputs, _ = vlm.prepare(pictures, [QUESTION, "how many ?"])
    assert not bool(inputs["attention_mask"].all())
    with torch.random.fork_rng(devices=[]):
        model = llava_over(text, **BACKBONES[text])
    return Tiny(model, inputs, inputs | STEPS)
