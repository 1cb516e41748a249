"""Probabilities of answer tokens equal those of the logits that ``generate`` returns.

Some types are tested by default, all of them with ``--all-types``.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import xmodal_interp as xi
from tests.helpers.real import GENERATING, asked_in_full, real, settled
from tests.helpers.tiny import picture
from xmodal_interp.models import VLM

pytestmark = pytest.mark.filterwarnings(  # raised inside the processors
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"
)
SOME = ("llava", "qwen2_vl", "mllama", "git", "blip", "blip-2", "florence2", "kosmos-2", "gemma3")
"""Each way to generate: the model's own method, that of its language model, encoder and decoder."""
N_NEW = 3


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    everything = metafunc.config.getoption("all_types")
    chosen = GENERATING if everything else [name for name in GENERATING if name in SOME]
    metafunc.parametrize("model_type", chosen)


def test_the_probabilities_are_those_of_the_returned_logits(model_type: str) -> None:
    vlm = VLM(real(model_type)[0], settled(model_type))
    question = asked_in_full(vlm, "what is it?", 1)
    image = picture(96, 96, 0)
    sample = xi.capture(vlm, image, question, max_new_tokens=N_NEW)
    inputs = vlm.prepare([[image]], [question])[0]
    # without the check of the options: logits are returned only in a dict
    given = xi.models.vlm.for_generate(inputs) if vlm.family.rewritten else inputs
    with torch.no_grad():
        output = vlm.model.generate(
            **given,
            max_new_tokens=N_NEW,
            do_sample=False,
            num_beams=1,
            output_logits=True,
            return_dict_in_generate=True,
        )
    ids = output.sequences[0, -len(output.logits) :].tolist()
    expected = [
        logits[0].double().softmax(-1)[token].item()
        for logits, token in zip(output.logits, ids, strict=True)
    ]
    table = sample.tokens
    found = table["next_probability"].to_numpy()[sample.n_prompt - 1 :]
    np.testing.assert_allclose(found[: len(expected)], expected, rtol=0, atol=1e-5)
    assert np.isnan(found[len(expected) :]).all()
    assert np.isnan(table["next_probability"].to_numpy()[: sample.n_prompt - 1]).all()
    names = table["next_token"].iloc[sample.n_prompt - 1 :].tolist()
    fed = table["token"].iloc[sample.n_prompt :].tolist()
    assert names[: len(fed)] == fed
    assert not any(name is None for name in names[: len(expected)])
