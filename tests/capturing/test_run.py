"""Capture end to end: a model, a processor, a picture and a question."""

import dataclasses
import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from transformers import ProcessorMixin

from tests.helpers.real import real
from tests.helpers.tiny import QUESTION, picture, tiny_vlm
from xmodal_interp.capturing.run import Keep, capture, capture_batch
from xmodal_interp.errors import (
    GeometryError,
    InputError,
    LayerError,
    NotRecordedError,
    PhraseError,
    UnsupportedModelError,
)
from xmodal_interp.models import VLM, load
from xmodal_interp.models.picture_sources import WANTED
from xmodal_interp.models.records import family_of
from xmodal_interp.models.token_table import token_table
from xmodal_interp.shapes.tiny_models import build_processor, untrained

STEPS = {"max_new_tokens": 5, "generation": {"min_new_tokens": 5}}


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "mllama"])
def test_rows_are_the_same_with_and_without_cache(family: str) -> None:
    vlm = tiny_vlm(family)
    cached = capture(vlm, picture(), QUESTION, **STEPS)
    options = {"min_new_tokens": 5, "use_cache": False}
    ids = []
    inputs = vlm.prepare([[picture()]], [QUESTION])[0]
    with torch.no_grad():
        ids = vlm.generate(inputs, max_new_tokens=5, **options)[0]
    assert cached.answer == vlm.tokenizer.decode(
        ids[inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    fed = {**inputs, "input_ids": ids[None, :-1], "attention_mask": torch.ones_like(ids[None, :-1])}
    if "mm_token_type_ids" in fed:
        fed["mm_token_type_ids"] = torch.nn.functional.pad(fed["mm_token_type_ids"], (0, 4))
    if "cross_attention_mask" in fed:
        mask = fed["cross_attention_mask"]
        fed["cross_attention_mask"] = torch.cat([mask, mask[:, -1:].expand(-1, 4, -1, -1)], 1)
    from xmodal_interp.hooks import record

    with torch.no_grad(), record(vlm.model, towers=["language"]) as whole:
        vlm.model(**fed, use_cache=False)
    assert len(whole.calls) == sum(key[0] == "language" for key in cached.calls)
    for call in whole.calls:
        ours = cached.probs(call.layer, kind=call.kind)
        assert ours.shape[1] == len(cached.tokens)
        torch.testing.assert_close(ours, call.probs()[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "mllama"])
def test_samples_of_a_padded_batch_equal_single_captures(family: str) -> None:
    vlm = tiny_vlm(family)
    questions = [QUESTION, "how many shapes ?"]
    pictures = [picture(seed=1), picture(seed=2)]
    together = capture_batch(vlm, [[p] for p in pictures], questions, **STEPS)
    for image, question, sample in zip(pictures, questions, together, strict=True):
        alone = capture(vlm, image, question, **STEPS)
        pad = len(sample.where("padding"))
        assert sample.answer == alone.answer
        assert sample.tokens["token"][pad:].tolist() == alone.tokens["token"].tolist()
        for key in alone.calls:
            ours, theirs = sample.calls[key].probs()[0], alone.calls[key].probs()[0]
            if key[0] == "language":
                ours = ours[:, pad:, pad:] if key[1] == "self" else ours[:, pad:]
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0, equal_nan=True)
        if pad and family != "mllama":
            assert sample.probs(0, queries=[0]).isnan().all()


def test_the_images_of_a_batch_may_be_flat(tmp_path) -> None:
    """One image for each prompt needs no list around it."""
    vlm = tiny_vlm("llava")
    picture().save(tmp_path / "scene.png")
    questions = [QUESTION, "how many shapes ?", QUESTION]
    nested = [[picture()], [tmp_path / "scene.png"], []]
    flat = [picture(), str(tmp_path / "scene.png"), iter([])]
    expected = capture_batch(vlm, nested, questions)
    for found, other in zip(capture_batch(vlm, flat, questions), expected, strict=True):
        assert found.text == other.text
        assert torch.equal(found.probs(0).nan_to_num(), other.probs(0).nan_to_num())
    inputs, expected = (vlm.prepare(each[:2], questions[:2])[0] for each in (flat, nested))
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])


@pytest.mark.usefixtures("any_type")
@pytest.mark.parametrize(
    ("images", "prompts", "message"),
    [
        (
            [picture()],
            QUESTION,
            f"prompts must be an ordered sequence, such as a list; got str {QUESTION!r}.",
        ),
        (
            picture(),
            [QUESTION],
            "images must be an ordered sequence, such as a list; got Image <PIL.Image.Image image "
            "mode=RGB size=96x96 at 0x",
        ),
        (
            [picture(), picture()],
            [QUESTION],
            "images, prompts and videos must have one entry for each sample; got 2 entries of "
            "images, 1 prompts and 1 entries of videos.",
        ),
        (
            [[picture()], None],
            [QUESTION, QUESTION],
            f"{WANTED}; got an object of NoneType.",
        ),
        ([[picture()], 7], [QUESTION, QUESTION], f"{WANTED}; got an object of int."),
        ([[picture()]], [7], "A prompt must be a string or a list of messages"),
    ],
)
def test_members_of_a_batch_that_cannot_be_read_are_errors(images, prompts, message) -> None:
    with pytest.raises(InputError) as refusal:
        capture_batch(tiny_vlm("llava"), images, prompts)
    assert str(refusal.value).startswith(message)


def test_two_images_of_different_size() -> None:
    sample = capture(tiny_vlm("qwen2_vl"), [picture(96, 96), picture(128, 72)], QUESTION)
    assert [len(sample.where("image", image=i)) for i in (0, 1)] == [144, 144]
    assert sample.grid(np.arange(144), 1).shape == (9, 16)
    assert sample.call(0, tower="vision", call=1).n_queries == 576
    assert sample.text_after_image().min() > sample.where("image", image=1).max()


def test_token_table() -> None:
    sample = capture(
        tiny_vlm("llava"), picture(160, 96), QUESTION, system="describe the image", **STEPS
    )
    tokens = sample.tokens
    for position in sample.where("text"):
        row = tokens.loc[position]
        assert sample.text[row["start"] : row["end"]] == row["token"]
    assert sample.find("red circle").tolist() == [sample.last - 3, sample.last - 2]
    assert sample.find("RED  circle").tolist() == sample.find("red circle").tolist()
    assert tokens.loc[sample.where(role="system"), "token"].tolist() == ["describe", "the", "image"]
    assert tokens.loc[sample.last, "token"] == "assistant:"
    assert tokens.loc[sample.last, "role"] == "template"
    assert (tokens["role"] == "generated").sum() == 4  # the fifth is not fed to the model
    assert len(sample) == sample.call(0).n_queries == sample.call(0).n_keys


def test_missing_and_ambiguous_phrases_are_errors() -> None:
    sample = capture(tiny_vlm("llava"), picture(), "is the red circle near the blue circle ?")
    with pytest.raises(PhraseError) as missing:
        sample.find("green")
    assert str(missing.value) == (f"'green' is not in the sample's text {sample.text!r}.")
    with pytest.raises(PhraseError) as several:
        sample.find("circle")
    assert str(several.value) == (
        f"'circle' occurs 2 times in {sample.text!r}; choose one with occurrence=0 to 1."
    )
    assert sample.find("circle", 1) == sample.find("blue circle")[1]
    assert sample.find("circle", -2) == sample.find("red circle")[1]
    with pytest.raises(PhraseError):
        sample.find("ircle")


def test_a_list_of_phrases_selects_all_their_positions() -> None:
    sample = capture(tiny_vlm("llava"), picture(), QUESTION)
    red, circle = sample.find("red circle").tolist()
    assert sample.positions(["circle", "red"]).tolist() == [red, circle]
    assert sample.positions(["circle", "red circle", -len(sample)]).tolist() == [0, red, circle]
    assert sample.positions([circle, red]).tolist() == [circle, red]  # numbers keep their order
    probs = sample.probs(0, queries=("circle", "red"), keys=["red"])
    assert torch.equal(probs, sample.probs(0, queries=[red, circle], keys=[red]))
    with pytest.raises(PhraseError, match="'green' is not in"):
        sample.probs(0, queries=["green", "circle"])
    with pytest.raises(PhraseError, match=r"No position of the vision tower .* is named 'red'"):
        sample.probs(0, tower="vision", queries=["red"])


def test_layers_and_rows_that_were_not_kept_are_errors() -> None:
    keep = Keep(towers=("language",), layers=(1, 3), queries="text")
    sample = capture(tiny_vlm("llava"), picture(), QUESTION, keep=keep)
    assert sample.layers() == [1, 3]
    whole = capture(tiny_vlm("llava"), picture(), QUESTION)
    assert torch.equal(sample.probs(-1, queries="red circle"), whole.probs(3, queries="red circle"))
    with pytest.raises(NotRecordedError) as layer:
        sample.call(2)
    assert str(layer.value) == (
        "Layer 2 of language self-attention was not kept; kept layers: [1, 3]. Capture again with "
        "this layer."
    )
    with pytest.raises(NotRecordedError, match="does not hold the query rows 5;"):
        sample.probs(1, queries=[5])
    with pytest.raises(LayerError) as unknown:
        sample.call(9)
    assert str(unknown.value) == (
        "There is no layer 9, call 0: language self-attention has layers [0, 1, 2, 3]."
    )
    with pytest.raises(LayerError) as unknown:
        sample.call(1, call=5)
    assert str(unknown.value) == (
        "There is no layer 1, call 5: language self-attention has layers [0, 1, 2, 3], with calls "
        "0 to 0."
    )


def test_error_messages_name_the_bad_input(tmp_path) -> None:
    vlm = tiny_vlm("llava")
    with pytest.raises(InputError) as missing:
        capture(vlm, tmp_path / "none.png", QUESTION)
    assert str(missing.value) == (
        f"There is no image file '{tmp_path / 'none.png'}'. Pass the path of an existing file, or "
        "a PIL image."
    )
    (tmp_path / "bad.png").write_bytes(b"not an image")
    with pytest.raises(InputError, match=r"Pillow cannot read the image file '.*bad.png'"):
        capture(vlm, tmp_path / "bad.png", QUESTION)
    picture().save(tmp_path / "cut.png")
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"Pillow cannot read the image file '.*cut.png'"):
        capture(vlm, tmp_path / "cut.png", QUESTION)
    with pytest.raises(InputError) as empty:
        capture(vlm, picture(), "  ")
    assert str(empty.value) == "The prompt is empty or only white space. Pass a question."
    with pytest.raises(GeometryError, match="There is no image 1: the sample has 1 images"):
        capture(vlm, picture(), QUESTION).grid(np.zeros(144), 1)


WRONG = {
    "array": (
        {"image": np.full((8, 8, 3), 300)},
        "The range of an array of int64 is not known: it has the values 300 to 300, which are "
        "neither bytes nor from 0 to 1. Convert it to bytes, 0 to 255 (np.uint8).",
    ),
    "nothing": (
        {"image": None},
        "An image must be a path, a URL, a PIL image, an array, the bytes of a file or a dict with "
        "bytes or path; got an object of NoneType.",
    ),
    "messages": (
        {"prompt": [{"role": "user"}]},
        "A message must have a content; got {'role': 'user'}.",
    ),
    "name": (
        {"vlm": "llava"},
        "vlm must be a VLM; got an object of str. Use xi.load(name) or xi.VLM(model, processor).",
    ),
    "tokens": (
        {"max_new_tokens": -1},
        "max_new_tokens must be a whole number, 0 or more; got -1.",
    ),
    "tokens as a string": (
        {"max_new_tokens": "3"},
        "max_new_tokens must be a whole number, 0 or more; got '3'.",
    ),
    "tokens as a fraction": (
        {"max_new_tokens": 2.5},
        "max_new_tokens must be a whole number, 0 or more; got 2.5.",
    ),
    "tokens in generation": (
        {"generation": {"max_new_tokens": 5}},
        "generation contains max_new_tokens. Pass it as a separate argument: max_new_tokens=5.",
    ),
    "generation": (
        {"max_new_tokens": 2, "generation": "greedy"},
        "generation must be a mapping of arguments of model.generate to their values; got "
        "'greedy'.",
    ),
    "one placeholder too many": (
        {"prompt": "<image> <image> what ?"},
        "The prompt '<bos>user: <image> <image> what ? assistant:' contains <image> 2 times for 1 "
        "images. Write it once for each image.",
    ),
    "one image too many": (
        {"prompt": "<image> what ?", "image": [picture()] * 2},
        "The prompt '<bos>user: <image> what ? assistant:' contains <image> 1 times for 2 images. "
        "Write it once for each image.",
    ),
    "no image": (
        {"prompt": "<image> what ?", "image": []},
        "The prompt '<bos>user: <image> what ? assistant:' contains <image> 1 times for 0 images. "
        "Write it once for each image.",
    ),
}


@pytest.mark.usefixtures("any_type")
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments_are_errors(wrong: str) -> None:
    given, message = WRONG[wrong]
    if "contains <image>" in message and not hasattr(ProcessorMixin, "replace_image_token"):
        pytest.skip("The processors of this release of transformers do not count placeholders.")
    asked = {"vlm": tiny_vlm("llava"), "image": picture(), "prompt": QUESTION, **given}
    with pytest.raises(InputError) as refusal:
        capture(**asked)
    assert str(refusal.value) == message


def test_exif_orientation_is_applied(tmp_path) -> None:
    turned = Image.new("RGB", (40, 20), "red")
    exif = turned.getexif()
    exif[274] = 6  # orientation: rotated by 90 degrees
    turned.save(tmp_path / "photo.jpg", exif=exif)
    sample = capture(tiny_vlm("llava"), tmp_path / "photo.jpg", QUESTION)
    assert sample.images[0].size == (20, 40)
    assert sample.tokens["y0"].min() == pytest.approx(10)  # the centre crop is square
    assert sample.tokens["y1"].max() == pytest.approx(30)


def test_repr_of_a_vlm() -> None:
    assert repr(tiny_vlm("llava")) == (
        "VLM(LlavaForConditionalGeneration, LlavaProcessor; llava, torch.float32, cpu)"
    )


def test_unsupported_models_are_errors(tmp_path) -> None:
    from transformers import BertConfig, GPT2Config, LlamaForCausalLM

    with pytest.raises(UnsupportedModelError) as text_only:
        VLM(LlamaForCausalLM(untrained("llava").config.text_config), None)
    assert str(text_only.value).startswith(
        "The model type 'llama' is text-only: its configuration has no vision_config."
    )
    with pytest.raises(InputError) as processor:
        VLM(untrained("llava"), build_processor("llava").tokenizer)
    assert str(processor.value) == (
        "The processor must have a tokenizer and an image processor; got TokenizersBackend. Load "
        "both with AutoProcessor."
    )
    GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="'gpt2' is text-only"):
        load(tmp_path)
    with pytest.raises(InputError, match="could not be loaded"):
        load(tmp_path / "nowhere")
    config = BertConfig()
    config.vision_config = {"hidden_size": 4}
    with pytest.raises(UnsupportedModelError) as unknown:
        family_of(config)
    assert str(unknown.value) == (
        "The model type 'bert' has no family record, which labelling tokens requires; "
        "xmodal_interp.models.FAMILIES has 97 types. Write one "
        "(xmodal_interp.models.Family) and pass it as VLM(model, processor, family=...), "
        "or record the bare attention with xi.record(model)."
    )


def test_a_prompt_with_a_placeholder_is_not_rendered() -> None:
    processor = build_processor("llava")
    processor.chat_template = None
    vlm = VLM(untrained("llava"), processor)
    with pytest.raises(InputError) as error:
        capture(vlm, picture(), QUESTION)
    assert str(error.value) == (
        f"LlavaProcessor has no chat template to render the question {QUESTION!r}. Write the whole "
        "prompt, with <image> where each image goes."
    )
    sample = capture(vlm, Image.new("RGB", (96, 96)), "<image> how many shapes ?")
    assert sample.text == "<image> how many shapes ?"
    assert len(sample.where("image")) == 144


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "mllama"])
def test_generation_without_a_cache_gives_the_same_calls(family: str) -> None:
    vlm = tiny_vlm(family)
    cached = capture(vlm, picture(), QUESTION, **STEPS)
    options = {"min_new_tokens": 5, "use_cache": False}
    uncached = capture(vlm, picture(), QUESTION, max_new_tokens=5, generation=options)
    assert uncached.answer == cached.answer
    assert set(uncached.calls) == set(cached.calls)
    for key, call in cached.calls.items():
        assert uncached.calls[key].call == call.call
        torch.testing.assert_close(
            uncached.calls[key].probs(), call.probs(), atol=1e-5, rtol=0, equal_nan=True
        )


def test_rotary_positions_are_those_of_the_model() -> None:
    """Image tokens share their time; text continues after the longer side of the image grid."""
    vlm = tiny_vlm("qwen2_vl")
    tokens = capture(vlm, picture(128, 72), QUESTION, **STEPS).tokens
    rope = tokens[["rope_t", "rope_h", "rope_w"]].to_numpy(dtype=int)
    image = tokens["kind"].eq("image").to_numpy(dtype=bool)
    first = rope[image][0, 0]
    assert (rope[image][:, 0] == first).all()
    np.testing.assert_array_equal(rope[image][:, 1] - first, tokens["row"][image].to_numpy(int))
    np.testing.assert_array_equal(rope[image][:, 2] - first, tokens["col"][image].to_numpy(int))
    after = rope[np.flatnonzero(image)[-1] + 1 :]
    assert after[0].tolist() == [first + 16] * 3
    np.testing.assert_array_equal(after, after[:1] + np.arange(len(after))[:, None])
    padded = capture_batch(vlm, [[picture()], [picture()]], [QUESTION, "how many shapes ?"])[1]
    shown = padded.tokens["kind"].ne("padding").to_numpy(dtype=bool)
    times = padded.tokens["rope_t"]
    np.testing.assert_array_equal(times.notna(), shown)
    assert times[shown].iloc[0] == 0


def test_rotary_positions_with_other_axes_are_left_out() -> None:
    """HunYuan-VL has four axes; they are not stored as time, row and column."""
    sample = capture(VLM(*real("hunyuan_vl")), picture(), QUESTION, **STEPS)
    assert "row" in sample.tokens.columns
    assert not {"rope_t", "rope_h", "rope_w"} & set(sample.tokens.columns)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_the_token_table_is_built_at_first_use_and_once(family: str, monkeypatch) -> None:
    built = []

    def counted(*args):
        built.append(args)
        return token_table(*args)

    monkeypatch.setattr("xmodal_interp.capturing.run.token_table", counted)
    vlm = tiny_vlm(family)
    samples = capture_batch(vlm, [[picture()]] * 2, [QUESTION, "how many shapes ?"], **STEPS)
    alone = capture(vlm, picture(), QUESTION, name="alone", **STEPS)
    assert alone.question == QUESTION
    assert built == []
    for sample in (*samples, alone):
        assert sample.tokens is sample.tokens
        other = pickle.loads(pickle.dumps(sample.changed(name="other")))
        assert other.name == "other"
        pd.testing.assert_frame_equal(other.tokens, sample.tokens)
    assert len(built) == 3
    kept = alone.tokens.assign(role="other")
    changed = dataclasses.replace(alone, tokens=kept)
    assert changed.tokens is kept
    assert alone.changed(tokens=kept).tokens is kept
    assert alone.tokens is not kept
    assert alone.tokens.index.equals(pd.RangeIndex(alone.n_prompt + 4, name="position"))
    assert alone.tokens["role"][alone.n_prompt :].eq("generated").all()
    assert alone.tokens["rope_t"].notna().all()
