"""Token norms equal those of the hidden states that the model returns."""

from pathlib import Path

import numpy as np
import pytest
import torch

import xmodal_interp as xi
from tests.helpers.tiny import QUESTION, picture, tiny_vlm
from tests.helpers.vision import registers_vlm
from xmodal_interp.errors import InputError, NotRecordedError
from xmodal_interp.models import VLM
from xmodal_interp.store import open_store

NORMS = xi.Keep(norms=True)


def hidden_norms(vlm: VLM) -> list[np.ndarray]:
    inputs, _ = vlm.prepare([[picture()]], [QUESTION if vlm.family.language else ""])
    with torch.no_grad():
        states = vlm.model(**inputs, output_hidden_states=True).hidden_states
    return [state[0].norm(dim=-1).double().numpy() for state in states]


def test_norms_of_a_vision_model_are_those_of_its_hidden_states() -> None:
    vlm = registers_vlm()
    table = xi.token_norms(xi.capture(vlm, picture(), keep=NORMS))
    assert table["token"].tolist()[:4] == ["class", "register 0", "register 1", "patch"]
    for layer, expected in enumerate(hidden_norms(vlm)[1:]):
        norm = table[table["layer"].eq(layer)]["norm"].to_numpy()
        np.testing.assert_allclose(norm, expected, rtol=1e-6)
        ratio = table[table["layer"].eq(layer)]["ratio"].to_numpy()
        np.testing.assert_allclose(ratio, expected / np.median(expected[3:]), rtol=1e-6)


def test_norms_of_both_towers_of_a_vlm() -> None:
    vlm = tiny_vlm("llava")
    sample = xi.capture(vlm, picture(), QUESTION, keep=NORMS, max_new_tokens=3)
    table = xi.token_norms(sample)
    assert table["tower"].eq("language").all()
    assert table["position"].nunique() == len(sample)
    prompt = table[table["position"].lt(sample.n_prompt)]
    for layer, expected in enumerate(hidden_norms(vlm)[1:-1]):  # the last has a final norm
        norm = prompt[prompt["layer"].eq(layer)]["norm"].to_numpy()
        np.testing.assert_allclose(norm, expected, rtol=1e-5)
    vision = xi.token_norms(sample, tower="vision")
    assert vision["tower"].eq("vision").all()
    assert len(vision) == 3 * len(sample.grids[0].patch_places)


def test_padding_has_no_rows_and_changes_no_norm() -> None:
    vlm = tiny_vlm("llava")
    questions = [QUESTION, "what is it ?"]
    both = xi.capture_batch(vlm, [[picture()], [picture()]], questions, keep=NORMS)
    for question, sample in zip(questions, both, strict=True):
        alone = xi.token_norms(xi.capture(vlm, picture(), question, keep=NORMS))
        padded = xi.token_norms(sample)
        assert not padded["token_kind"].eq("padding").any()
        np.testing.assert_allclose(padded["norm"], alone["norm"], rtol=1e-4)


def test_a_store_keeps_norms_in_a_version_that_older_readers_refuse(tmp_path: Path) -> None:
    vlm = registers_vlm()
    xi.capture_dataset(
        vlm, [{"name": "a", "image": picture()}], tmp_path / "s", keep=NORMS, progress=False
    )
    text = (tmp_path / "s" / "samples" / "a" / "sample.json").read_text()
    assert '"version": 4' in text
    stored = xi.token_norms(open_store(tmp_path / "s"))
    fresh = xi.token_norms(xi.capture(vlm, picture(), keep=NORMS, name="a"))
    np.testing.assert_allclose(stored["norm"], fresh["norm"], rtol=1e-6)


def test_refuses_samples_without_norms_and_other_towers() -> None:
    sample = xi.capture(registers_vlm(), picture())
    with pytest.raises(NotRecordedError) as caught:
        xi.token_norms(sample)
    assert str(caught.value) == (
        "vision self-attention, layer 0, call 0 was captured without token norms. Capture with "
        "Keep(norms=True)."
    )
    with pytest.raises(InputError) as refused:
        xi.token_norms(sample, tower="connector")
    assert str(refused.value) == (
        "token_norms is not defined for tower='connector'. Choose 'language' or 'vision'."
    )
