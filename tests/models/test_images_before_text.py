"""Image features without a token id: before the ids, marked by a mask, or cross-attention keys."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    DonutImageProcessor,
    DonutProcessor,
    DonutSwinConfig,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
)

import xmodal_interp as xi
from tests.helpers.real import asked, real, settled
from tests.helpers.tiny import picture
from xmodal_interp.analysis.answers import METRICS, answer_scores
from xmodal_interp.capturing.run import capture_batch
from xmodal_interp.errors import GeometryError, InputError
from xmodal_interp.models import VLM, geometry
from xmodal_interp.models.known_answers import batches_of

pytestmark = pytest.mark.filterwarnings(  # raised inside the processors
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"
)
QUESTION = "where is the red circle?"


def vlm_of(model_type: str) -> VLM:
    return VLM(real(model_type)[0], settled(model_type))


def test_features_before_the_ids_are_positions() -> None:
    sample = xi.capture(vlm_of("git"), picture(), QUESTION, max_new_tokens=3)
    kinds = sample.tokens["kind"].tolist()
    assert kinds[:65] == ["image"] * 65
    assert set(kinds[65:]) <= {"text", "special"}
    assert sample.tokens["row"].isna().tolist()[:66] == [True] + [False] * 64 + [
        True
    ]  # class token
    phrase = sample.find("red circle")
    assert phrase.min() > 65
    assert "".join(sample.tokens["token"].iloc[phrase]).split() == ["red", "circle"]
    patches = sample.probs(0, queries="red circle", keys=sample.where("image"))
    assert sample.grid(patches.mean((0, 1))).shape == (8, 8)


def test_features_precede_the_padding_of_a_batch() -> None:
    vlm, images = vlm_of("git"), [[picture()], [picture(120, 64, 1)]]
    questions = ["a circle", QUESTION]
    inputs, (short, long) = vlm.prepare(images, questions)
    padding = np.flatnonzero(short.tokens["kind"].eq("padding"))
    text = np.flatnonzero(short.tokens["kind"].eq("text"))
    assert len(short.tokens) == len(long.tokens)
    assert short.tokens["kind"].tolist()[64:66] == ["image", "padding"]
    with torch.no_grad(), xi.record(vlm.model, towers=["language"]) as recording:
        vlm.model(**inputs)
    read = recording.calls[-1].probs(queries=text)[0]
    assert (read[:, :, padding] == 0).all()
    torch.testing.assert_close(read.sum(-1), torch.ones(read.shape[:2]))


def test_samples_run_one_by_one_if_padding_shifts_positions() -> None:
    """GIT counts padding in its positions (transformers 5.23, ``GitEmbeddings``)."""
    vlm, images = vlm_of("git"), [[picture()], [picture(120, 64, 1)]]
    questions = ["a circle", QUESTION]
    assert vlm.batches(images) == [[0], [1]]
    for index, sample in enumerate(capture_batch(vlm, images, questions)):
        assert not len(sample.where("padding"))
        alone = xi.capture(vlm, images[index], questions[index])
        torch.testing.assert_close(sample.probs(1), alone.probs(1), atol=1e-6, rtol=0)
    assert vlm_of("llava").batches(images) == [[0, 1]]
    assert vlm_of("mllama").batches([*images, images[0] * 2, []]) == [[0, 1], [2], [3]]


@pytest.mark.parametrize(("model_type", "first"), [("kosmos-2", 2), ("kosmos-2.5", 2)])
def test_a_mask_marks_image_tokens(model_type: str, first: int) -> None:
    sample = xi.capture(vlm_of(model_type), picture(), QUESTION, max_new_tokens=2)
    image = sample.where("image")
    assert image.tolist() == list(range(first, first + 8))
    assert sample.tokens["token"].iloc[image].eq("<image>").all()
    assert sample.tokens["kind"].iloc[: first + 9 : 8].tolist()[0] == "special"
    words = sample.tokens["token"].iloc[sample.find("red circle")].str.strip()
    assert words.tolist() == ["red", "circle"]


def test_a_rewritten_prompt_is_labelled_as_generate_reads_it() -> None:
    vlm = vlm_of("blip")
    given = vlm.processor(images=[[picture()]], text=[QUESTION], return_tensors="pt")
    with torch.no_grad():
        output = vlm.model.generate(**given, max_new_tokens=3, do_sample=False, num_beams=1)
    sample = xi.capture(vlm, picture(), QUESTION, max_new_tokens=3)
    assert sample.n_prompt == given["input_ids"].shape[1] - 1
    begin = vlm.model.config.text_config.bos_token_id
    assert sample.tokens["token"].iloc[0] == vlm.tokenizer.convert_ids_to_tokens(begin)
    assert sample.answer == vlm.tokenizer.decode(
        output[0, sample.n_prompt :], skip_special_tokens=True
    )
    prompt_only = xi.capture(vlm, picture(), QUESTION)
    before = sample.probs(1, queries=range(sample.n_prompt), keys=range(sample.n_prompt))
    torch.testing.assert_close(prompt_only.probs(1), before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("model_type", ["pix2struct", "pp_formulanet", "vision-encoder-decoder"])
def test_a_decoder_starts_without_a_prompt(model_type: str) -> None:
    sample = xi.capture(vlm_of(model_type), picture(), "", max_new_tokens=3)
    assert sample.n_prompt == 1
    assert sample.tokens["kind"].iloc[0] == "special"
    assert sample.tokens["role"].tolist() == ["template", "generated", "generated"]
    seen = sample.probs(1, kind="cross", queries=[2])
    assert seen.shape == (seen.shape[0], 1, len(sample.cross_keys))
    torch.testing.assert_close(seen.sum(-1), torch.ones(seen.shape[:2]))
    grid = sample.grids[0]
    assert sample.grid(seen.mean((0, 1))).shape == (grid.rows, grid.cols)


def test_a_prompt_may_be_read_by_the_decoder() -> None:
    sample = xi.capture(vlm_of("pix2struct"), picture(120, 64), QUESTION, max_new_tokens=3)
    assert sample.tokens["kind"].tolist()[:2] == ["special", "text"]
    assert sample.find("red circle").min() > 1
    padding = sample.cross_keys["row"].isna()
    assert 0 < padding.sum() < len(padding)
    of_padding = sample.probs(0, kind="cross", keys=np.flatnonzero(padding))
    assert of_padding.max() == 0


def test_boxes_are_unknown_if_the_question_is_drawn() -> None:
    patches = np.zeros((1, 7, 5))
    patches[0, :6, :2] = np.argwhere(np.ones((3, 2))) + 1
    processor = SimpleNamespace(image_processor=SimpleNamespace(is_vqa=True))
    given = {"flattened_patches": patches}
    (grid,) = geometry.FlattenedPatches()(processor, None, given, [Image.new("RGB", (20, 30))])
    assert (grid.rows, grid.cols, grid.n_tokens) == (3, 2, 7)
    assert grid.places[-2:].tolist() == [[2, 1], [-1, -1]]
    assert np.isnan(grid.boxes).all()


def test_an_encoder_without_a_rule_is_named() -> None:
    vlm = vlm_of("vision-encoder-decoder")
    family = type(vlm.family)(
        "vision-encoder-decoder",
        None,
        geometry.Chosen(lambda config: config.encoder.model_type, {}, "No rule for {!r}."),
        in_sequence=False,
        reads_text=False,
    )
    sample = xi.capture(VLM(vlm.model, vlm.processor, family), picture(), "", max_new_tokens=2)
    assert sample.cross_keys is None
    with pytest.raises(GeometryError, match=r"^Image 0 has no grid. No rule for 'vit'.$"):
        sample.grid(sample.probs(0, kind="cross")[0, 0])


def test_the_patches_of_an_encoder_may_be_merged_stage_by_stage() -> None:
    known = vlm_of("vision-encoder-decoder")
    encoder = DonutSwinConfig(
        image_size=[96, 64], embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4
    )
    config = VisionEncoderDecoderConfig(
        encoder=encoder.to_dict(),
        decoder=known.model.config.decoder.to_dict(),
        decoder_start_token_id=1,
        pad_token_id=0,
    )
    pages = DonutImageProcessor(size={"height": 96, "width": 64})
    vlm = VLM(VisionEncoderDecoderModel(config).eval(), DonutProcessor(pages, known.tokenizer))
    sample = xi.capture(vlm, picture(120, 100), "", max_new_tokens=2)
    assert (sample.grids[0].rows, sample.grids[0].cols) == (12, 8)  # of 4 x 4 px, 2 x 2 merged
    assert sample.call(0, kind="cross").n_keys == len(sample.cross_keys) == 96
    assert sample.cross_keys["x0"].isna().any()  # cells on padding


def test_images_are_at_the_marks_of_the_prompt() -> None:
    vlm = vlm_of("idefics")
    images = [picture(), picture(120, 64, 1)]
    sample = xi.capture(vlm, images, "first <image> then <image> what is new?")
    marks = np.flatnonzero(sample.tokens["token"] == "<image>")
    assert len(marks) == 2
    words = [int(sample.find(word)[0]) for word in ("first", "then", "new")]
    assert words[0] < marks[0] < words[1] < marks[1] < words[2]
    seen = sample.call(0, kind="cross").visible(words)[0, 0]
    of_image = sample.cross_keys["image"].to_numpy()
    assert [seen[row, of_image == i].any().item() for row in range(3) for i in range(2)] == [
        *(False, False),  # nothing before the first image
        *(True, False),
        *(False, True),  # text attends only to the image before it
    ]


def test_the_number_of_marks_must_equal_the_number_of_images() -> None:
    with pytest.raises(InputError) as error:
        xi.capture(vlm_of("idefics"), [picture()] * 2, "what is in <image> ?")
    assert str(error.value) == (
        "The prompt 'what is in<image>?' contains <image> 1 times for 2 images. Write it once for "
        "each image, or leave it out."
    )


@pytest.mark.parametrize("model_type", ["florence2", "t5gemma2"])
def test_encoder_and_decoder_share_one_axis(model_type: str) -> None:
    vlm = vlm_of(model_type)
    question = asked(vlm, 1)
    sample = xi.capture(vlm, picture(), question, max_new_tokens=3)
    inputs, (prompt,) = vlm.prepare([[picture()]], [question])
    n = prompt.n_encoder
    assert len(sample.tokens) == n + 3
    assert sample.tokens["role"].tolist()[n:] == ["template", "generated", "generated"]
    with torch.no_grad(), xi.record(vlm.model) as recording:
        vlm.generate(inputs, max_new_tokens=3)
    language = [call for call in recording.calls if call.tower == "language"]
    merged = not any(call.kind == "cross" for call in language)
    step: dict[tuple[str, int], int] = {}
    for call in language:
        raw = call.probs()[0]
        number = step[call.kind, call.layer] = step.get((call.kind, call.layer), -1) + 1
        whole = sample.probs(call.layer, kind=call.kind)
        if call.n_queries == n:
            torch.testing.assert_close(whole[:, :n, :n], raw, rtol=0, atol=1e-6)
            assert whole[:, n:].isnan().all()
            assert (whole[:, :n, n:] == 0).all()
            continue
        row, own = whole[:, n + number], slice(n, n + number + 1)
        of_encoder = call.kind == "cross" or merged
        expected = raw[:, 0] if not merged else raw[:, 0].roll(n, -1)
        got = torch.cat([row[:, :n]] * of_encoder + [row[:, own]] * (call.kind == "self"), -1)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(row.sum(-1), torch.ones(len(row)))
        assert whole[:, :n].isnan().all()


@pytest.mark.parametrize("model_type", ["florence2", "pix2struct", "vision-encoder-decoder"])
def test_an_answer_is_appended_to_the_prompt_of_the_decoder(model_type: str) -> None:
    vlm = vlm_of(model_type)
    question = asked(vlm, 1)
    item = {"image": picture(), "prompt": question, "answer": "red"}
    (plain,) = batches_of(vlm, [item], batch_size=1, answers=False)
    (batch,) = batches_of(vlm, [item], batch_size=1)
    given, longer = (each.inputs["decoder_input_ids"] for each in (plain, batch))
    assert longer[0].tolist() == [*given[0].tolist(), *batch.answers[0]]
    for name in set(plain.inputs) - {"decoder_input_ids", "decoder_attention_mask"}:
        assert torch.equal(plain.inputs[name], batch.inputs[name])
    n = len(batch.answers[0])
    with torch.no_grad():
        logits = vlm.model(**batch.inputs).logits[0, -n - 1 : -1].log_softmax(-1)
    expected = logits[range(n), list(batch.answers[0])].double().mean().item()
    scores = dict(zip(METRICS, answer_scores(vlm, batch)[:, 0], strict=True))
    assert scores["log_prob"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("model_type", ["idefics", "mllama"])
def test_samples_with_fewer_images_have_only_their_own_keys(model_type: str) -> None:
    vlm = vlm_of(model_type)
    one, two = [picture(96, 64, 0)], [picture(96, 64, 0), picture(64, 96, 1)]
    questions = ["where is it?", "which one is it?"]
    keep = xi.Keep(towers=("language",))
    samples = xi.capture_batch(vlm, [one, two], questions, keep=keep)
    for sample, images, question in zip(samples, (one, two), questions, strict=True):
        alone = xi.capture(vlm, images, question, keep=keep)
        assert sample.cross_keys is not None
        layer = sample.layers(kind="cross")[-1]
        text = sample.text_after_image()
        ours = sample.probs(layer, queries=text, kind="cross")
        theirs = alone.probs(layer, queries=alone.text_after_image(), kind="cross")
        assert ours.shape[-1] == len(sample.cross_keys) == len(alone.cross_keys)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0, equal_nan=True)
