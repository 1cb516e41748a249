"""``xi.capture`` with the real processor of every type, on tiny random models.

A third of the types are tested by default, all of them with ``--all-types``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import xmodal_interp as xi
from tests.helpers.families import RECORDS
from tests.helpers.real import GENERATING, REFUSED, SOME, asked, real, settled
from tests.helpers.store_samples import assert_same
from tests.helpers.tiny import picture
from xmodal_interp.capturing.fingerprint import fingerprint
from xmodal_interp.errors import GeometryError, InputError
from xmodal_interp.models import FAMILIES, VLM, prompt_ids
from xmodal_interp.sample import Sample
from xmodal_interp.store import StoreWriter, check_store, open_store

pytestmark = pytest.mark.filterwarnings(  # raised inside the processors
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"
)
N_NEW = 3
SIZES = ((96, 96), (120, 64))  # width, height; px
OTHER_PATCHES = {
    *("deepseek_vl_hybrid", "florence2", "granite4_vision", "fast_vlm", "gemma3n"),
    *("deepseek_ocr2", "unlimited_ocr", "minicpmv4_6", "minicpmv4_7", "pp_formulanet"),
}
"""Types with a second tower, or with windows or stages of a tower, whose positions are not the
patches of the grid."""
NO_TOWER = {"fuyu", "gemma4_unified", "inkling_mm_model"}
"""Types without a vision tower: the language model reads the patches."""


@dataclass(frozen=True)
class Captured:
    """A sample, its model and question, and the model's fingerprint before the capture."""

    vlm: VLM
    question: str
    sample: Sample
    before: dict[str, Any]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    everything = metafunc.config.getoption("all_types")
    some = [name for name in GENERATING if name in SOME or name in GENERATING[::3]]
    chosen = GENERATING if everything else some
    if "captured" in metafunc.fixturenames:
        metafunc.parametrize("captured", chosen, indirect=True, scope="module")
    if "pair" in metafunc.fixturenames:
        ruled = [name for name in chosen if FAMILIES[name].geometry and RECORDS[name].several]
        metafunc.parametrize("pair", ruled, indirect=True, scope="module")


def captured_from(name: str, n_images: int) -> Captured:
    vlm = VLM(real(name)[0], settled(name))
    images = [picture(*size, seed) for seed, size in enumerate(SIZES)][:n_images]
    question = asked(vlm, n_images)
    before = fingerprint(vlm)
    sample = xi.capture(vlm, images, question, max_new_tokens=N_NEW)
    return Captured(vlm, question, sample, before)


@pytest.fixture(scope="module")
def captured(request: pytest.FixtureRequest) -> Captured:
    return captured_from(request.param, 1)


@pytest.fixture(scope="module")
def pair(request: pytest.FixtureRequest) -> Captured:
    return captured_from(request.param, 2)


def of_language(sample: Sample, kind: str) -> list[Any]:
    return [call for key, call in sample.calls.items() if key[:2] == ("language", kind)]


def check_rows(sample: Sample) -> None:
    """Check that each language call has one row per position, and one key per labelled key."""
    n = len(sample.tokens)
    selves, crosses = of_language(sample, "self"), of_language(sample, "cross")
    assert selves
    n_keys = n if sample.cross_keys is None else len(sample.cross_keys)
    assert {(call.n_queries, call.n_keys) for call in selves} == {(n, n)}
    assert {(call.n_queries, call.n_keys) for call in crosses} <= {(n, n_keys)}


def check_images(sample: Sample) -> None:
    """Check that each image has as many tokens, or keys, as its grid."""
    crossed = sample.cross_keys is not None
    kinds = sample.cross_keys if crossed else sample.tokens
    of_images = kinds.loc[kinds["kind"] == "image", "image"]
    assert [int(of_images.eq(i).sum()) for i in range(len(sample.grids))] == [
        grid.n_tokens for grid in sample.grids
    ]
    assert all(grid.n_tokens > 0 for grid in sample.grids)


def test_a_row_for_each_position(captured: Captured) -> None:
    check_rows(captured.sample)


def test_a_stored_sample_equals_the_sample_in_memory(captured: Captured, tmp_path: Path) -> None:
    with StoreWriter(tmp_path, {}) as writer:
        writer.write(replace(captured.sample, labels={"box": [1, 2.5]}))
    assert_same(open_store(tmp_path)[0], captured.sample)
    assert open_store(tmp_path)[0].labels == {"box": [1, 2.5]}
    assert check_store(tmp_path)["ok"].all()


def test_running_a_model_does_not_change_its_fingerprint(captured: Captured) -> None:
    assert fingerprint(captured.vlm) == captured.before


def test_images_have_as_many_tokens_as_their_grids(captured: Captured) -> None:
    check_images(captured.sample)


def test_tokens_flagged_special_are_no_text(captured: Captured) -> None:
    """This includes tokens without a name: headers of a chat template, markers of images.

    ``all_special_ids`` of transformers 5.23 has only tokens with a name. All tokens that decoding
    skips are flagged ``special`` in ``added_tokens_decoder``.
    """
    tokenizer, tokens = captured.vlm.tokenizer, captured.sample.tokens
    added = tokenizer.added_tokens_decoder.values()
    flagged = {each.content for each in added if each.special} - {tokenizer.unk_token}
    kinds = tokens.loc[tokens["token"].isin(flagged), "kind"]
    assert set(kinds) <= {"image", "special", "padding"}


def test_probabilities_are_probabilities(captured: Captured) -> None:
    sample = captured.sample
    text = sample.where("text")
    assert len(text) > 0
    n_seeing = torch.zeros(len(text))
    for call in of_language(sample, "self") + of_language(sample, "cross"):
        seeing = call.visible(text.tolist()).any(-1).any(1)[0].expand(len(text))
        probs = call.probs(queries=text.tolist())[0][:, seeing]
        assert torch.isfinite(probs).all()
        assert (probs.sum(-1) < 1 + 1e-3).all()
        assert (probs.sum(-1) > 1 - 1e-3).all() or call.sinks is not None  # sinks take a share
        n_seeing += seeing
    assert (n_seeing > 0).all()


def test_the_answer_equals_plain_generation(captured: Captured) -> None:
    vlm, sample = captured.vlm, captured.sample
    inputs, _ = vlm.prepare([sample.images], [captured.question])
    with torch.no_grad():
        output = vlm.generate(inputs, max_new_tokens=N_NEW)
    new = output[0, prompt_ids(inputs).shape[1] :].tolist()
    until = next((i for i, token in enumerate(new) if token in vlm.end_ids), len(new))
    assert vlm.tokenizer.decode(new[:until], skip_special_tokens=True).strip() == sample.answer
    read = min(until, len(new) - 1)
    assert len(sample.tokens) == sample.n_prompt + read
    assert sample.tokens["role"].eq("generated").sum() == read


def test_keys_of_the_tower_match_the_grid(captured: Captured) -> None:
    sample = captured.sample
    calls = [(k, c) for k, c in sample.calls.items() if k[:2] == ("vision", "self")]
    fitting = 0
    for (_, _, _, number), call in calls:
        grid = sample.grids[number]
        values = np.arange(call.n_keys, dtype=float)
        if call.n_keys == len(grid.patch_places) and grid.patch_rows:
            cells = sample.grid(values, image=number)
            assert cells.shape == (grid.patch_rows, grid.patch_cols)
            fitting += 1
        elif call.n_keys != grid.n_tokens:
            with pytest.raises(GeometryError):
                sample.grid(values, image=number)
    name = captured.vlm.family.model_type
    assert bool(calls) == (name not in NO_TOWER)
    assert fitting == len(calls) or name in OTHER_PATCHES


def test_two_images_have_separate_rows_and_grids(pair: Captured) -> None:
    check_rows(pair.sample)
    check_images(pair.sample)
    assert len(pair.sample.grids) == 2
    vision = [key for key in pair.sample.calls if key[:2] == ("vision", "self")]
    towerless = pair.vlm.family.model_type in NO_TOWER
    assert {key[3] for key in vision} == (set() if towerless else {0, 1})


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_be_captured_are_refused(name: str) -> None:
    vlm = VLM(*real(name))
    with pytest.raises(InputError, match=REFUSED[name]):
        xi.capture(vlm, picture(), asked(vlm, 1), max_new_tokens=0 if name == "pi0" else N_NEW)
