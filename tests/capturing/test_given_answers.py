"""Given answers: the rows are those of the same answer when it is generated."""

import json

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

import xmodal_interp as xi
from tests.helpers.real import real, settled
from tests.helpers.store_samples import items, shipped
from tests.helpers.tiny import QUESTION, picture, tiny_vlm
from tests.helpers.vision import registers_vlm
from xmodal_interp.capturing.dataset import capture_dataset
from xmodal_interp.capturing.run import Keep, capture, capture_batch
from xmodal_interp.cli.commands import app
from xmodal_interp.errors import InputError, StoreError
from xmodal_interp.models import VLM
from xmodal_interp.models.known_answers import answer_ids
from xmodal_interp.vocabulary import NEXT_COLUMNS

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
ANSWER = "top left red"
CHAT = [
    {"role": "system", "content": "describe the image"},
    {
        "role": "user",
        "content": [
            {"type": "image", "image": picture(seed=1)},
            {"type": "text", "text": "what color is the circle ?"},
        ],
    },
    {"role": "assistant", "content": "red"},
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "where is the circle ?"},
            {"type": "image", "image": picture(seed=2)},
        ],
    },
]
TYPES = (
    *("gemma3", "paligemma", "idefics3", "llava_next", "internvl", "qwen2_5_vl", "mllama"),
    *("florence2", "kosmos-2", "llava_onevision", "aya_vision", "smolvlm"),
)


def generated(vlm: VLM, image, prompt, answer: str = ANSWER, **options) -> xi.Sample:
    """Return the sample of an answer that the model must generate, and then end."""
    text = vlm.prepare([image], [prompt])[1][0].text
    end = min(vlm.end_ids, default=vlm.tokenizer.eos_token_id)
    ids = [*answer_ids(vlm, text, answer), end]
    start = []

    def allowed(_, before) -> list[int]:
        start.append(len(before))
        return [ids[min(len(before) - start[0], len(ids) - 1)]]

    return capture(
        vlm,
        image,
        prompt,
        max_new_tokens=len(ids),
        generation={"prefix_allowed_tokens_fn": allowed, "eos_token_id": end},
        **options,
    )


def assert_same_probabilities(ours: xi.Sample, theirs: xi.Sample) -> None:
    """The tokens of our answer have the same probability in both samples."""
    names = list(NEXT_COLUMNS)
    predicts = ours.tokens["next_token"].notna()  # a given answer has no end-of-sequence token
    assert predicts.sum() == ours.tokens["role"].eq("generated").sum()
    assert ours.tokens["next_probability"].notna().equals(predicts.astype(bool))
    pd.testing.assert_frame_equal(
        ours.tokens.loc[predicts, names], theirs.tokens.loc[predicts, names], atol=1e-5, rtol=0
    )


def assert_same(ours: xi.Sample, theirs: xi.Sample) -> None:
    """Two samples have the same tokens, texts and attention."""
    names = [name for name in NEXT_COLUMNS if name in ours.tokens]
    pd.testing.assert_frame_equal(
        ours.tokens.drop(columns=names), theirs.tokens.drop(columns=names)
    )
    if names:
        assert_same_probabilities(ours, theirs)
    assert (ours.text, ours.answer, ours.n_prompt) == (theirs.text, theirs.answer, theirs.n_prompt)
    assert list(ours.calls) == list(theirs.calls)
    for key, call in ours.calls.items():
        expected = theirs.calls[key].probs()  # NaN in rows that an encoder or a decoder lacks
        torch.testing.assert_close(call.probs(), expected, atol=1e-5, rtol=0, equal_nan=True)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
@pytest.mark.parametrize("prompt", ["question", "chat"])
def test_rows_are_those_of_the_same_answer_generated(family: str, prompt: str) -> None:
    vlm = tiny_vlm(family)
    image, asked = ([picture()], QUESTION) if prompt == "question" else ([], CHAT)
    ours = capture(vlm, image, asked, answer=ANSWER)
    assert_same(ours, generated(vlm, image, asked))
    rows = ours.tokens[ours.tokens["role"].eq("generated")]
    assert rows["kind"].tolist() == ["text"] * 3
    assert rows["token"].tolist() == ["top", "left", "red"]
    assert rows.index.tolist() == [ours.n_prompt, ours.n_prompt + 1, ours.n_prompt + 2]
    assert ours.answer == ANSWER
    assert ours.provenance["answer"] == "given"
    assert "answer" not in capture(vlm, image, asked, max_new_tokens=2).provenance


@pytest.mark.parametrize("model_type", TYPES)
def test_rows_of_real_types(model_type: str) -> None:
    vlm = VLM(real(model_type)[0], settled(model_type))
    ours = capture(vlm, picture(), QUESTION, answer="a red circle")
    assert ours.tokens["role"].eq("generated").sum() > 2
    assert_same(ours, generated(vlm, [picture()], QUESTION, "a red circle"))


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
@pytest.mark.parametrize("queries", ["all", "text"])
def test_statistics_are_those_of_the_same_answer_generated(family: str, queries: str) -> None:
    vlm = tiny_vlm(family)
    keep = Keep(statistics=("mass", "entropy", "received"), queries=queries)
    ours = capture(vlm, picture(), QUESTION, answer=ANSWER, keep=keep)
    theirs = generated(vlm, [picture()], QUESTION, keep=keep)
    assert list(ours.calls) == list(theirs.calls)
    for key, call in ours.calls.items():
        for name in ("group_mass", "row_entropy", "key_received", "groups", "counted", "rows"):
            kept, expected = getattr(call, name), getattr(theirs.calls[key], name)
            assert (kept is None) == (expected is None), name
            if kept is not None:
                torch.testing.assert_close(kept, expected, atol=1e-5, rtol=1e-5)


def test_values_and_norms_of_a_given_answer() -> None:
    keep = Keep(values=True, norms=True)
    vlm = tiny_vlm("llava")
    ours = capture(vlm, picture(), QUESTION, answer=ANSWER, keep=keep)
    theirs = generated(vlm, [picture()], QUESTION, keep=keep)
    for key, call in ours.calls.items():
        torch.testing.assert_close(call.v, theirs.calls[key].v, atol=1e-5, rtol=0)
    ours, theirs = (xi.token_norms(each) for each in (ours, theirs))
    pd.testing.assert_frame_equal(ours, theirs, atol=1e-4, rtol=1e-5)


def test_the_end_of_a_chat_is_its_given_answer() -> None:
    vlm = tiny_vlm("llava")
    expected = capture(vlm, prompt=CHAT, answer=ANSWER)
    for content in (ANSWER, [{"type": "text", "text": ANSWER}]):
        sample = capture(vlm, prompt=[*CHAT, {"role": "assistant", "content": content}])
        assert_same(sample, expected)
        assert sample.provenance["answer"] == "given"
        assert sample.provenance["messages"] == expected.provenance["messages"]
    rows = sample.tokens[sample.tokens["role"].eq("generated")]
    assert rows["turn"].tolist() == [4, 4, 4]
    assert sample.where(role="assistant").tolist() == sample.where(turn=2).tolist()


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_a_batch_equals_single_samples(family: str) -> None:
    """Prompts and answers of different lengths, and a prompt without an answer."""
    vlm = tiny_vlm(family)
    prompts = [QUESTION, "where ?", CHAT, "how many shapes are in the image ?"]
    images = [picture(seed=0), picture(seed=1), [], picture(seed=3)]
    answers = ["red", "top left", ANSWER, None]
    batch = capture_batch(vlm, images, prompts, answers=answers)
    for number, sample in enumerate(batch):
        alone = capture(vlm, images[number], prompts[number], answer=answers[number])
        pad = len(sample.where("padding"))
        assert sample.answer == alone.answer == (answers[number] or "")
        assert sample.tokens["role"][pad:].tolist() == alone.tokens["role"].tolist()
        assert sample.tokens["token"][pad:].tolist() == alone.tokens["token"].tolist()
        torch.testing.assert_close(sample.probs()[:, pad:, pad:], alone.probs(), atol=1e-5, rtol=0)
        assert ("answer" in sample.provenance) == (answers[number] is not None)


def test_samples_of_one_length_share_a_padded_run() -> None:
    vlm = tiny_vlm("llava")
    batch = capture_batch(vlm, [picture()] * 2, [QUESTION, "where ?"], answers=["red", "left"])
    assert [len(each.where("padding")) > 0 for each in batch] == [False, True]
    alone = capture(vlm, picture(), "where ?", answer="left")
    pad = len(batch[1].where("padding"))
    torch.testing.assert_close(batch[1].probs()[:, pad:, pad:], alone.probs(), atol=1e-5, rtol=0)


def test_given_answers_of_items_are_stored(tmp_path) -> None:
    made = items(3)
    store = capture_dataset(
        shipped(), made, tmp_path / "run", given_answers=True, batch_size=3, progress=False
    )
    for item, sample in zip(made, store, strict=True):
        expected = capture(shipped(), item["image"], item["prompt"], answer=item["answer"])
        assert sample.answer == sample.labels["answer"] == item["answer"]
        assert sample.provenance["answer"] == "given"
        pad = len(sample.where("padding"))
        ours = sample.tokens["token"][pad:].tolist()
        assert ours == expected.tokens["token"].tolist()
        torch.testing.assert_close(
            sample.probs()[:, pad:, pad:], expected.probs(), atol=1e-5, rtol=0
        )


def test_an_answer_of_an_item_is_a_label_unless_it_is_asked_to_be_read(tmp_path) -> None:
    """Without ``given_answers``, ``answer`` is the true answer, and the model generates its own."""
    (item,) = items(1)
    item["answer"] = "no such answer"
    options = {"max_new_tokens": 4, "progress": False}
    (sample,) = capture_dataset(shipped(), [item], tmp_path / "run", **options)
    expected = capture(shipped(), item["image"], item["prompt"], max_new_tokens=4)
    assert sample.labels["answer"] == "no such answer"
    assert sample.answer == expected.answer != "no such answer"
    assert "answer" not in sample.provenance
    with pytest.raises(StoreError, match="given_answers"):
        capture_dataset(shipped(), [item], tmp_path / "run", given_answers=True, progress=False)


def test_the_end_of_a_chat_of_an_item_is_its_label(tmp_path) -> None:
    chat = [*CHAT[:1], *CHAT[3:], {"role": "assistant", "content": ANSWER}]
    options = {"progress": False}
    (label,) = capture_dataset(shipped(), [{"messages": chat}], tmp_path / "label", **options)
    (given,) = capture_dataset(
        shipped(), [{"messages": chat}], tmp_path / "given", given_answers=True, **options
    )
    assert label.labels == given.labels == {"answer": ANSWER}
    assert (label.answer, given.answer) == ("", ANSWER)
    assert_same(given, capture(shipped(), prompt=chat))
    assert_same(label, capture(shipped(), prompt=chat[:-1]))


def test_a_label_that_is_a_number_stays_one(tmp_path) -> None:
    chat = [{"role": "user", "content": [{"type": "image", "image": picture()}, "how many ?"]}]
    items_of = [
        {"id": "question", "image": picture(), "prompt": "how many ?", "answer": 4},
        {"id": "chat", "messages": chat, "answer": 4},
    ]
    options = {"given_answers": True, "progress": False}
    store = capture_dataset(shipped(), items_of, tmp_path / "run", **options)
    for sample in store:
        assert sample.labels == {"answer": 4}
        assert sample.answer == "4"


def test_the_command_line_reads_given_answers(tmp_path) -> None:
    run = CliRunner().invoke
    picture().save(tmp_path / "scene.png")
    row = {"id": "a", "image": "scene.png", "prompt": "where is it ?", "answer": "top left"}
    path = tmp_path / "items.jsonl"
    path.write_text(json.dumps(row))
    store = str(tmp_path / "run")
    shown = run(app, ["capture", store, "--items", str(path), "--given-answers"])
    assert shown.exit_code == 0, shown.output
    (sample,) = xi.open_store(store)
    assert_same(sample, capture(shipped(), picture(), "where is it ?", answer="top left"))
    resumed = capture_dataset(shipped(), path, store, given_answers=True, progress=False)
    assert resumed.names == ("a",)
    options = ["--items", str(path), "--given-answers", "--max-new-tokens", "3"]
    refused = run(app, ["capture", str(tmp_path / "other"), *options])
    assert refused.exit_code == 1
    assert " ".join(refused.output.split()) == (
        "error: given_answers=True and max_new_tokens=3 exclude each other. Pass one of them."
    )


def test_the_command_line_takes_one_answer(tmp_path) -> None:
    run = CliRunner().invoke
    picture().save(tmp_path / "scene.png")
    one = ["--image", str(tmp_path / "scene.png"), "--prompt", "where is it ?"]
    options = ["capture", str(tmp_path / "run"), "--answer", "top left"]
    shown = run(app, [*options, *one])
    assert shown.exit_code == 0, shown.output
    (sample,) = xi.open_store(tmp_path / "run")
    assert_same(sample, capture(shipped(), picture(), "where is it ?", answer="top left"))
    refused = run(app, [*options, "--items", str(tmp_path / "items.jsonl")])
    assert refused.exit_code == 1
    assert " ".join(refused.output.split()) == (
        "error: --items cannot be combined with --image, --name or --answer."
    )


WRONG = {
    "also generated": (
        {"answer": "red", "max_new_tokens": 2},
        "The answer 'red' is given, so none is generated, but max_new_tokens is 2. Pass "
        "max_new_tokens=0, or leave out the answer (in a chat, the assistant's last message).",
    ),
    "empty": (
        {"answer": " "},
        "The answer ' ' is empty, or changes the tokens of the prompt '<bos>user: <image> where is "
        "it ? assistant:'. Give an answer that starts a new token.",
    ),
    "a number": ({"answer": 7}, "A given answer must be a string; got 7."),
    "two": (
        {"prompt": [*CHAT, {"role": "assistant", "content": "red"}], "answer": "blue"},
        "The messages end with the assistant's answer 'red', and answer='blue' was passed too. "
        "Leave out one of them.",
    ),
    "a chat that ends with an answer": (
        {"prompt": [*CHAT, {"role": "assistant", "content": "red"}], "max_new_tokens": 2},
        "The answer 'red' is given, so none is generated, but max_new_tokens is 2. Pass "
        "max_new_tokens=0, or leave out the answer (in a chat, the assistant's last message).",
    ),
}


@pytest.mark.usefixtures("any_type")
@pytest.mark.parametrize("case", WRONG)
def test_answers_that_cannot_be_given(case: str) -> None:
    options, message = WRONG[case]
    given = {"prompt": "where is it ?", **options}
    images = [picture()] if isinstance(given["prompt"], str) else []
    with pytest.raises(InputError) as refusal:
        capture(tiny_vlm("llava"), images, **given)
    assert str(refusal.value) == message


def test_another_number_of_answers_than_prompts() -> None:
    with pytest.raises(InputError) as refusal:
        capture_batch(tiny_vlm("llava"), [picture()], ["where ?"], answers=["red", "blue"])
    assert str(refusal.value) == ("answers must have one entry for each of 1 prompts; got 2.")


def test_an_item_without_an_answer(tmp_path) -> None:
    item = {"image": picture(), "prompt": "where ?"}
    with pytest.raises(InputError) as refusal:
        capture_dataset(shipped(), [item], tmp_path / "run", given_answers=True, progress=False)
    assert str(refusal.value) == (
        "Item 0 ('item-000000') has no answer, which given_answers=True requires. Add the entry "
        "answer, or leave out given_answers."
    )


def test_a_vision_model_reads_no_answer() -> None:
    with pytest.raises(InputError) as refusal:
        capture(registers_vlm(), picture(), answer="red")
    assert str(refusal.value) == (
        "A dinov2_with_registers model has no language model; got the answer 'red'. Leave the "
        "answer out."
    )


@pytest.mark.parametrize(("family", "mark"), [("llava", "<image>"), ("qwen2_vl", "<|image_pad|>")])
def test_a_placeholder_in_an_answer_is_an_error(family, mark):
    """The model would look for the features of another image, or read none."""
    message = (
        f"The answer '{mark} red' contains {mark}, the model's placeholder of an image or video. "
        "Leave it out of the answer."
    )
    vlm = tiny_vlm(family)
    with pytest.raises(InputError) as refusal:
        capture(vlm, picture(), QUESTION, answer=f"{mark} red")
    assert str(refusal.value) == message
