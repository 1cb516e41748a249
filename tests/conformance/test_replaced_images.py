"""Deletion and insertion remove the image: with all tokens replaced, logits ignore the image.

The tests are for types whose image tokens are in the sequence of a decoder. With each image token
replaced by the mean of the other tokens, two different images must give identical logits. Some
types are tested by default, all of them with ``--all-types``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers.real import ANSWER, GENERATING, SOME, asked, vlm_with_exact_steps
from tests.helpers.tiny import picture
from xmodal_interp.analysis.answers import answer_scores
from xmodal_interp.errors import CaptureError, UnsupportedModelError
from xmodal_interp.evaluation.faithfulness import deletion_curve
from xmodal_interp.hooks.embeddings import check_images_gone, mean_embeddings
from xmodal_interp.models import FAMILIES, VLM
from xmodal_interp.models.known_answers import batches_of

pytestmark = pytest.mark.filterwarnings(  # raised inside the processors
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"
)
ADDED_INSIDE = (
    *("qwen3_vl", "qwen3_vl_moe", "qwen3_omni_moe_thinker", "cosmos3_omni"),
    *("cohere_compass", "granite4_vision", "granite_docling"),
)
"""Types that add image features to the hidden states of the language model."""
OTHER_INPUTS = {
    **dict.fromkeys(
        ("git", "kosmos-2", "kosmos-2.5", "chameleon", "t5gemma2"), "received no embeddings"
    ),
    "florence2": "did not run inside the with block",
}
"""Types that are refused: their decoder takes ids, or an encoder reads the image."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "name" in metafunc.fixturenames:
        everything = metafunc.config.getoption("all_types")
        in_sequence = [name for name in GENERATING if FAMILIES[name].in_sequence]
        some = {*ADDED_INSIDE, *OTHER_INPUTS, *SOME, "paligemma", *GENERATING[1::6]}
        chosen = [name for name in in_sequence if everything or name in some]
        metafunc.parametrize("name", chosen)


def ready(vlm: VLM, seed: int = 0) -> tuple[dict[str, Any], Tensor]:
    """Return the inputs of a question about a picture, and a mask of its image tokens."""
    inputs, (prompt,) = vlm.prepare([[picture(seed=seed)]], [asked(vlm, 1)])
    return inputs, torch.tensor([[kind == "image" for kind in prompt.columns["kind"]]])


def test_with_every_token_replaced_two_images_give_the_same_logits(name: str) -> None:
    vlm, logits = vlm_with_exact_steps(name), []
    for seed in (0, 1):
        inputs, image = ready(vlm, seed)
        if name in OTHER_INPUTS:
            with (
                pytest.raises(CaptureError, match=OTHER_INPUTS[name]),
                torch.no_grad(),
                mean_embeddings(vlm, image, ~image),
            ):
                vlm.model(**inputs, use_cache=False)
            return
        with torch.no_grad(), mean_embeddings(vlm, image, ~image):
            logits.append(vlm.model(**inputs, use_cache=False).logits)
    assert torch.equal(*logits)
    check_images_gone(vlm, inputs, image)


@pytest.mark.parametrize("model_type", ["granite4_vision", "qwen3_vl"])
def test_features_added_inside_are_deleted_token_by_token(model_type: str) -> None:
    """The expected means are inserted by a hook of this test, at every layer that adds features."""
    vlm = vlm_with_exact_steps(model_type)
    item = {"image": picture(), "prompt": asked(vlm, 1), "answer": ANSWER}
    (batch,) = batches_of(vlm, [item], batch_size=1)
    kinds = np.array(batch.prompts[0].columns["kind"])
    n_image = int((kinds == "image").sum())
    salience = np.random.default_rng(0).permutation(n_image).astype(float)
    curve = deletion_curve(vlm, [item], [salience], steps=3, progress=False)
    gone = torch.from_numpy(salience >= n_image - n_image // 2)

    def replace(_module: Any, args: Any, options: dict[str, Any]) -> Any:
        embedded = options["inputs_embeds"].clone()
        at = torch.from_numpy(np.flatnonzero(kinds == "image"))
        embedded[0, at[gone]] = embedded[0, at].mean(0)
        added = options.get("deepstack_visual_embeds", options.get("deepstack_features"))
        of_layers = added.values() if isinstance(added, dict) else added
        assert of_layers
        for features in of_layers:
            features[gone] = features.mean(0)
        return args, {**options, "inputs_embeds": embedded}

    decoder = vlm.model.get_decoder()
    handle = decoder.register_forward_pre_hook(replace, with_kwargs=True)
    expected = np.exp(answer_scores(vlm, batch)[1, 0])
    handle.remove()
    assert curve["probability"][1] == pytest.approx(expected, rel=1e-5)
    assert curve["probability"].nunique() == 3


def test_an_image_that_enters_in_another_way_is_refused() -> None:
    """Here a hook adds the image features to the hidden states."""
    vlm = vlm_with_exact_steps("llava")
    inputs, image = ready(vlm)
    model = vlm.model
    seen: list[Tensor] = []
    hooks = [
        model.model.vision_tower.register_forward_hook(
            lambda _m, _a, output: seen.append(output.last_hidden_state.mean())
        ),
        model.get_decoder()
        .layers[0]
        .register_forward_hook(lambda _m, _a, output: output + seen[-1]),
    ]
    with pytest.raises(UnsupportedModelError, match="also receives the image by inputs other than"):
        check_images_gone(vlm, inputs, image)
    for hook in hooks:
        hook.remove()
    check_images_gone(vlm, inputs, image)
