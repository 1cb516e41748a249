"""A sample of a batch equals the sample captured alone, with the real processor of every type.

Some types are tested by default, all of them with ``--all-types``. Models run in float64 if they
can, because rounding depends on the shape of a batch.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import xmodal_interp as xi
from tests.helpers.families import RECORDS
from tests.helpers.real import GENERATING, asked_in_full, real, settled
from tests.helpers.tiny import picture
from xmodal_interp.models import VLM
from xmodal_interp.sample import Sample

pytestmark = pytest.mark.filterwarnings(  # raised inside the processors
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"
)
SINGLE = ("deepseek_vl_hybrid", "kosmos-2", "kosmos-2.5", "pix2struct", "muse_spark", "inkling2")
"""Types that do not run in float64: they create float32 tensors, or read float32 patches."""
LIMITS = dict.fromkeys(
    # entirely in float32, or with a recurrence or rotary angles in float32
    [
        *(*SINGLE, "qwen3_5", "qwen3_5_moe", "minicpm_ocr", "minicpmv4_6", "minicpmv4_7"),
        *("granite4_vision", "unlimited_ocr", "deepseek_ocr2"),
    ],
    2e-4,
)
SOME = ("llava", "qwen2_vl", "mllama", "git", "blip", "florence2", "kosmos-2")
"""One type for each way to run batches."""
WITHOUT = {"mllama", "idefics", "git", "qwen2_vl", "gemma3"}
"""Types whose batches are also tested with a sample without an image."""
N_ROWS = 512  # per comparison: some vision towers have 4,096 tokens per tile
QUESTIONS = ["what is it?", "where is the red circle, and how many shapes are in the image?"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "model_type" not in metafunc.fixturenames:
        return
    everything = metafunc.config.getoption("all_types")
    chosen = GENERATING if everything else [name for name in GENERATING if name in SOME]
    metafunc.parametrize("model_type", chosen)


def check(vlm: VLM, images: list, questions: list[str], n_new: int, limit: float) -> None:
    together = xi.capture_batch(vlm, images, questions, max_new_tokens=n_new)
    for index, sample in enumerate(together):
        alone = xi.capture(vlm, images[index], questions[index], max_new_tokens=n_new)
        assert sample.name == f"sample-{index}"
        check_same(sample, alone, limit)


def check_same(sample: Sample, alone: Sample, limit: float) -> None:
    ours, theirs = (
        np.flatnonzero(each.tokens["kind"].ne("padding").to_numpy(dtype=bool))
        for each in (sample, alone)
    )
    rounded = "next_probability"
    columns = [name for name in alone.tokens if not name.startswith("rope_") and name != rounded]
    one, other = (
        each.tokens[columns].iloc[read].reset_index(drop=True)
        for each, read in ((sample, ours), (alone, theirs))
    )
    assert one.equals(other)
    assert (rounded in alone.tokens) == (rounded in sample.tokens)
    if rounded in alone.tokens:
        np.testing.assert_allclose(
            sample.tokens[rounded].to_numpy()[ours],
            alone.tokens[rounded].to_numpy()[theirs],
            rtol=0,
            atol=limit,
        )
    assert sample.answer == alone.answer
    assert set(sample.calls) == set(alone.calls)
    for key, call in alone.calls.items():
        ours_of_call, theirs_of_call = np.arange(call.n_queries), np.arange(call.n_queries)
        keys = slice(None), slice(None)
        if key[0] == "language":
            assert sample.calls[key].n_queries == len(sample.tokens), key
            ours_of_call, theirs_of_call = ours, theirs
            if key[1] == "self" or call.n_keys == len(alone.tokens):  # an encoder's positions
                keys = ours, theirs
        for start in range(0, len(theirs_of_call), N_ROWS):
            rows = slice(start, start + N_ROWS)
            found = sample.calls[key].probs(queries=ours_of_call[rows])[0][:, :, keys[0]]
            expected = call.probs(queries=theirs_of_call[rows])[0][:, :, keys[1]]
            torch.testing.assert_close(
                found, expected, atol=limit, rtol=0, equal_nan=True, msg=str(key)
            )


def test_a_sample_of_a_batch_equals_a_single_sample(model_type: str) -> None:
    model, processor = real(model_type)[0], settled(model_type)
    if model_type not in SINGLE:
        model = copy.deepcopy(model).double()
        model.set_experts_implementation("eager")  # torch's grouped kernel does not support float64
    vlm, limit = VLM(model, processor), LIMITS.get(model_type, 1e-5)
    images = [[picture(96, 96, 0)], [picture(300, 90, 1)]]
    questions = [asked_in_full(vlm, each, 1) for each in QUESTIONS]
    check(vlm, images, questions, 3, limit)
    check(vlm, images, questions[::-1], 0, limit)
    if RECORDS[model_type].several and "images" not in RECORDS[model_type].alike:
        images = [images[0], [picture(300, 90, 1), picture(96, 96, 2)]]
        questions = [asked_in_full(vlm, each, n) for n, each in enumerate(QUESTIONS, start=1)]
        check(vlm, images, questions, 2, limit)
    if model_type in WITHOUT:
        images = [images[0], []]
        questions = [asked_in_full(vlm, QUESTIONS[0], 1), QUESTIONS[1]]
        check(vlm, images, questions, 2, limit)


@pytest.mark.parametrize("name", ["mllama", "idefics", "vision-encoder-decoder", "florence2"])
def test_a_sample_that_ends_early_equals_a_single_sample(name: str) -> None:
    """Cross-attention has one row per token of the sample, not of the longest answer."""
    model = copy.deepcopy(real(name)[0]).double()
    vlm = VLM(model, settled(name))
    images = [[picture(61, 173, 0)], [picture(257, 83, 1)], [picture(100, 77, 2)]]
    asked = ("circle?", "where is the red circle, and how many?", "is the blue square left?")
    questions = [asked_in_full(vlm, each, 1) for each in asked]
    answers = [
        vlm.generate(vlm.prepare([own], [question])[0], max_new_tokens=5)[0, -5:].tolist()
        for own, question in zip(images, questions, strict=True)
    ]
    model.generation_config.eos_token_id = next(
        token for token in answers[0] if name == "florence2" or token not in answers[1]
    )
    check(vlm, images, questions, 5, LIMITS.get(name, 1e-5))
    lengths = {len(s.answer) for s in xi.capture_batch(vlm, images, questions, max_new_tokens=5)}
    assert len(lengths) > 1
