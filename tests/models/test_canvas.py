"""A block diffusion model reads the prompt in one stack and denoises a canvas in another.

The canvas is a separate tower, because its positions are not those of the sample.
"""

import pytest
import torch

import xmodal_interp as xi
from tests.helpers.real import real, settled
from tests.helpers.tiny import picture
from xmodal_interp.errors import InputError

QUESTIONS = ["where is the red circle?", "how many?"]
REFUSED = (
    "DiffusionGemmaForBlockDiffusion generates by block diffusion, 4 positions at a time, not "
    "token by token. Capture the prompt with max_new_tokens=0, or record the calls with "
    "xi.record(model)."
)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.fixture(scope="module")
def vlm() -> xi.VLM:
    return xi.VLM(real("diffusion_gemma")[0], settled("diffusion_gemma"))


def test_the_canvas_is_a_separate_tower(vlm: xi.VLM, tmp_path) -> None:
    torch.manual_seed(0)
    samples = xi.capture_batch(vlm, [[picture()], [picture(seed=1)]], QUESTIONS)
    for sample in samples:
        n = len(sample.tokens)
        language = [call for key, call in sample.calls.items() if key[0] == "language"]
        canvas = [call for key, call in sample.calls.items() if key[0] == "other"]
        assert [(call.n_queries, call.n_keys) for call in language] == [(n, n)] * 2
        assert [(call.n_samples, call.n_queries) for call in canvas] == [(1, 4)] * 2
        assert all("decoder" in call.module for call in canvas)
        ratio = xi.cross_modal_ratio(sample)
        assert sorted(ratio["layer"].unique()) == [0, 1]
        rows = sample.probs(layer=1)[:, sample.text_after_image()]
        image = torch.from_numpy(sample.tokens["kind"].eq("image").to_numpy(dtype=bool))
        mass = rows[..., image].sum(-1).mean(1)
        ours = ratio[ratio["layer"] == 1].groupby("head")["ratio"].mean().to_numpy()
        torch.testing.assert_close(torch.from_numpy(ours).float(), mass, atol=1e-5, rtol=0)
    alone = xi.capture(vlm, picture(seed=1), QUESTIONS[1])
    seen = samples[1].tokens["kind"].ne("padding").to_numpy(dtype=bool)
    torch.testing.assert_close(
        samples[1].probs(layer=1)[:, seen][:, :, seen], alone.probs(layer=1), atol=1e-5, rtol=0
    )
    items = [{"image": picture(), "prompt": QUESTIONS[0]}]
    store = xi.capture_dataset(vlm, items, tmp_path / "store", progress=False)
    assert {key[0] for key in store[0].calls} == {"vision", "language", "other"}


def test_generation_and_scoring_are_refused(vlm: xi.VLM) -> None:
    with pytest.raises(InputError) as generated:
        xi.capture(vlm, picture(), QUESTIONS[0], max_new_tokens=2)
    assert str(generated.value) == REFUSED
    items = [{"image": picture(), "prompt": QUESTIONS[0], "answer": "red"}]
    with pytest.raises(InputError) as scored:
        xi.head_pruning(vlm, items, progress=False)
    assert str(scored.value) == REFUSED


def test_the_doctor_checks_the_rest(vlm: xi.VLM) -> None:
    checkup = xi.doctor(vlm, picture(), QUESTIONS[0])
    assert checkup.ok
    check = "generated tokens are the same with and without recording"
    row = checkup.table.set_index("check").loc[check]
    assert (row["verdict"], row["note"]) == ("skipped", REFUSED)
