"""Chats: messages of several turns, and the role and turn of each token."""

import base64
import copy
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import xmodal_interp as xi
from tests.helpers.store_samples import shipped
from tests.helpers.tiny import picture, tiny_vlm
from xmodal_interp.capturing.dataset import capture_dataset
from xmodal_interp.capturing.run import capture, capture_batch
from xmodal_interp.errors import InputError, StoreError
from xmodal_interp.models import VLM, Video
from xmodal_interp.models.chats import read_chat
from xmodal_interp.models.known_answers import batches_of

ONE, OTHER = picture(seed=1), picture(seed=2)
SHIPPED = ["llava", "qwen2_vl"]


def image_part(image=None) -> dict:
    return {"type": "image"} if image is None else {"type": "image", "image": image}


def text_part(text: str) -> dict:
    return {"type": "text", "text": text}


CHAT = [
    {"role": "system", "content": "describe the image"},
    {"role": "user", "content": [image_part(ONE), text_part("what color is the circle ?")]},
    {"role": "assistant", "content": "red"},
    {"role": "tool", "content": [image_part(OTHER), text_part("image")]},
    {"role": "user", "content": [text_part("and"), image_part(ONE), text_part("where is it ?")]},
]
ROLES = [each["role"] for each in CHAT]


@pytest.mark.parametrize("family", SHIPPED)
def test_a_chat_is_what_its_template_and_processor_make_of_it(family: str) -> None:
    vlm = tiny_vlm(family)
    sample = capture(vlm, prompt=CHAT)
    parts = [
        {**each, "content": [text_part(each["content"])]}
        if isinstance(each["content"], str)
        else each
        for each in CHAT
    ]
    text = vlm.processor.apply_chat_template(parts, add_generation_prompt=True)
    assert sample.text == text
    theirs = vlm.processor(
        text=text, images=[ONE, OTHER, ONE], return_tensors="pt", add_special_tokens=False
    )
    ours = vlm.prepare([[]], [CHAT])[0]
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    assert [image.tobytes() for image in sample.images] == [
        image.tobytes() for image in (ONE, OTHER, ONE)
    ]
    assert sample.question == "and\nwhere is it ?"
    assert sample.provenance["messages"][0] == {
        "role": "system",
        "content": [text_part("describe the image")],
    }


@pytest.mark.parametrize("family", SHIPPED)
def test_each_token_has_the_role_and_the_turn_of_its_message(family: str) -> None:
    sample = capture(tiny_vlm(family), prompt=CHAT, max_new_tokens=3)
    tokens = sample.tokens
    texts = {0: "describe the image", 1: "what color is the circle ?", 2: "red", 3: "image"}
    texts |= {4: "and where is it ?"}
    for turn, text in texts.items():
        rows = tokens.loc[sample.where("text", turn=turn)]
        assert " ".join(
            sample.text[s:e] for s, e in zip(rows["start"], rows["end"], strict=True)
        ) == (text)
        assert set(rows["role"]) == {ROLES[turn]}
    for image, turn in enumerate((1, 3, 4)):
        rows = tokens.loc[sample.where("image", image=image)]
        assert len(rows) == 144
        assert set(rows["role"]) == {ROLES[turn]}
        assert set(rows["turn"]) == {turn}
    generated = tokens["role"].eq("generated")
    assert generated.sum() == 2
    assert tokens["turn"][generated].eq(5).all()
    assert tokens["turn"][tokens["role"].eq("template")].isna().all()
    assert sample.where(role="assistant").tolist() == sample.where(turn=2).tolist()
    assert len(sample.where("text", role="tool")) == 1


def test_a_question_has_no_turns() -> None:
    sample = capture(tiny_vlm("llava"), ONE, "where is it ?")
    assert "turn" not in sample.tokens
    with pytest.raises(InputError) as refusal:
        sample.where(turn=0)
    assert str(refusal.value) == (
        "Sample 'sample-0' is not a chat, so its tokens have no turns. Leave out turn."
    )


@pytest.mark.parametrize("answer", ["s", "a", "user", "assistant", "is", "?", " red "])
def test_texts_that_occur_elsewhere_are_found_in_their_place(answer: str) -> None:
    """The answer to a multiple choice is in the name of a role: ``assistant: a``."""
    chat = [
        {"role": "user", "content": "s is a user ?"},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "is it s ?"},
    ]
    sample = capture(tiny_vlm("llava"), prompt=chat)
    start = len("<bos>user: s is a user ? assistant: ") + (len(answer) - len(answer.lstrip()))
    rows = sample.tokens.loc[sample.where(role="assistant")]
    assert (rows["start"].min(), rows["end"].max()) == (start, start + len(answer.strip()))
    rows = sample.tokens.loc[sample.where(turn=2)]
    assert sample.text[rows["start"].min() : rows["end"].max()] == "is it s ?"


def test_a_template_that_drops_roles_and_moves_images() -> None:
    """LLaVA 1.5 writes the images of a message first; templates may put the system message into
    that of the user."""
    template = (
        "{% for message in messages %}{{ message['role'].upper() }}: {% for part in "
        "message['content'] | selectattr('type', 'equalto', 'image') %}<image>\n{% endfor %}"
        "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
        "{{ part['text'] | trim }} {% endfor %}{% endfor %}ASSISTANT:"
    )
    processor = copy.copy(tiny_vlm("llava").processor)
    processor.chat_template = template
    sample = capture(VLM(tiny_vlm("llava").model, processor), prompt=CHAT)
    assert sample.text == (
        "SYSTEM: describe the image USER: <image>\nwhat color is the circle ? ASSISTANT: red "
        "TOOL: <image>\nimage USER: <image>\nand where is it ? ASSISTANT:"
    )
    assert [set(sample.tokens.loc[sample.where("image", image=i), "turn"]) for i in range(3)] == [
        {1},
        {3},
        {4},
    ]
    assert sample.where(role="tool").min() > sample.find("red").max()


def test_all_forms_of_an_image_in_a_message(tmp_path: Path) -> None:
    path = tmp_path / "scene.png"
    ONE.save(path)
    digits = base64.b64encode(path.read_bytes()).decode()
    forms = [
        {"type": "image", "image": ONE},
        {"type": "image", "image": str(path)},
        {"type": "image", "image": np.asarray(ONE)},
        {"type": "image", "image": {"bytes": path.read_bytes(), "path": None}},
        {"type": "image", "url": path.as_uri(), "text": None},
        {"type": "image", "path": path},
        {"type": "image", "base64": digits},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{digits}"}},
        {"type": "image_url", "image_url": str(path)},
        {"image": ONE},
    ]
    for form in forms:
        chat = [{"role": "user", "content": [form, "where is it ?"]}]
        sample = capture(tiny_vlm("llava"), prompt=chat)
        assert sample.images[0].tobytes() == ONE.tobytes(), form
        assert sample.text == "<bos>user: <image> where is it ? assistant:"


SEPARATE = {
    "parts": [image_part(), image_part(), text_part("where is it ?")],
    "marks": "<image>\n<image>\nwhere is it ?",
    "no place": "where is it ?",
    "placeholders": [text_part("<image> <image> where is it ?")],
    "one in the message": [image_part(ONE), image_part(), text_part("where is it ?")],
}


@pytest.mark.parametrize("form", SEPARATE)
def test_images_that_are_passed_separately(form: str) -> None:
    chat = [{"role": "user", "content": SEPARATE[form]}]
    images = [OTHER] if form == "one in the message" else [ONE, OTHER]
    sample = capture(tiny_vlm("llava"), images, chat)
    assert [each.tobytes() for each in sample.images] == [ONE.tobytes(), OTHER.tobytes()]
    assert sample.text == "<bos>user: <image> <image> where is it ? assistant:"
    assert len(sample.where("image", role="user", turn=0)) == 288


def test_a_mark_is_the_place_of_an_image_for_every_model() -> None:
    """``<image>`` is LLaVA's mark; it is no token of other models."""
    chat = [{"role": "user", "content": "is <image> like\n<image>\n?"}]
    sample = capture(tiny_vlm("qwen2_vl"), [ONE, OTHER], chat)
    vision = "<|vision_start|><|image_pad|><|vision_end|>"
    assert sample.text == f"<bos>user: is  {vision}  like {vision} ? assistant:"


def test_frames_of_a_video_in_a_message() -> None:
    clip = [picture(seed=i) for i in range(4)]
    for part in (
        {"type": "video", "video": clip, "fps": 2.0},
        {"type": "video", "video": Video(clip, 2)},
    ):
        chat = [{"role": "user", "content": [part, text_part("where is it ?")]}]
        _, images, videos = read_chat(chat)
        assert images == []
        assert (videos[0].fps, len(videos[0])) == (2, 4)
    chat = [{"role": "user", "content": "<video>\nwhere is it ?"}]
    assert read_chat(chat, videos=[Video(clip)])[0].messages[0]["content"][0] == {"type": "video"}


def test_messages_as_tables_and_datasets_return_them() -> None:
    """``datasets`` fills missing entries of a struct with None; pandas reads lists as arrays."""
    plain = [
        {"role": "user", "content": [image_part(ONE), text_part("where is it ?")]},
        {"role": "assistant", "content": [text_part("left")]},
        {"role": "user", "content": [text_part("and the circle ?")]},
    ]
    expected = capture(tiny_vlm("llava"), prompt=plain)
    filled = [
        {
            "role": each["role"],
            "name": None,
            "content": [
                {"image": None, "text": None, "url": None, **part} for part in each["content"]
            ],
        }
        for each in plain
    ]
    columns = {name: [each[name] for each in filled] for name in ("role", "content")}
    arrays = np.array([{**each, "content": np.array(each["content"])} for each in filled])
    for given in (filled, columns, arrays, tuple(filled), iter(filled)):
        sample = capture(tiny_vlm("llava"), prompt=given)
        pd.testing.assert_frame_equal(sample.tokens, expected.tokens)
        assert torch.equal(sample.probs(), expected.probs())


def test_system_is_the_first_message() -> None:
    chat = CHAT[1:]
    expected = capture(tiny_vlm("llava"), prompt=CHAT)
    sample = capture(tiny_vlm("llava"), prompt=chat, system="describe the image")
    pd.testing.assert_frame_equal(sample.tokens, expected.tokens)
    with pytest.raises(InputError) as refusal:
        capture(tiny_vlm("llava"), prompt=CHAT, system="be brief")
    assert str(refusal.value) == (
        "The messages contain a system message, and system='be brief' was passed too. Leave out "
        "one of them."
    )


@pytest.mark.parametrize("family", SHIPPED)
def test_chats_and_questions_in_one_batch(family: str) -> None:
    vlm = tiny_vlm(family)
    short = [{"role": "user", "content": [image_part(OTHER), text_part("where ?")]}]
    prompts, images = [CHAT, "how many ?", short], [[], [ONE], []]
    together = capture_batch(vlm, images, prompts, max_new_tokens=2)
    for sample, prompt, of in zip(together, prompts, images, strict=True):
        alone = capture(vlm, of, prompt, max_new_tokens=2)
        pad = len(sample.where("padding"))
        assert sample.answer == alone.answer
        columns = [name for name in alone.tokens if name in sample.tokens]
        assert ("turn" in columns) == (prompt != "how many ?")
        assert sample.tokens["role"][pad:].tolist() == alone.tokens["role"].tolist()
        torch.testing.assert_close(sample.probs()[:, pad:, pad:], alone.probs(), atol=1e-5, rtol=0)


WRONG = {
    "no messages": (
        [],
        "A prompt must be a string or a list of messages, which are dicts with role and content; "
        "got [].",
    ),
    "strings": (
        ["where ?"],
        "A prompt must be a string or a list of messages, which are dicts with role and content; "
        "got ['where ?'].",
    ),
    "role": (
        [{"role": "human", "content": "where ?"}],
        "A message must have one of the roles system, user, assistant, tool; got 'human' in "
        "{'content': 'where ?', 'role': 'human'}.",
    ),
    "speaker": (
        [{"from": "bot", "value": "where ?"}],
        "A message must have one of the roles system, user, assistant, tool, human, gpt, "
        "observation; got 'bot' in {'from': 'bot', 'value': 'where ?'}.",
    ),
    "no content": (
        [{"role": "user"}],
        "A message must have a content; got {'role': 'user'}.",
    ),
    "audio": (
        [{"role": "user", "content": [{"type": "audio", "audio": "a.wav"}]}],
        "A part of a message must be a text, an image or a video; got the type 'audio' with the "
        "entries audio.",
    ),
    "resolution": (
        [{"role": "user", "content": [{"type": "image", "image": ONE, "max_pixels": 50176}]}],
        "A part of the type image has the entries image, max_pixels, of which max_pixels would not "
        "be read. Leave them out; processor_options sets the resolution.",
    ),
    "two pictures": (
        [{"role": "user", "content": [{"type": "image", "image": ONE, "url": "a.png"}]}],
        "A part of the type image has the entries image, url, of which url would not be read. "
        "Leave them out; processor_options sets the resolution.",
    ),
    "too few images": (
        [{"role": "user", "content": "<image> where ?"}],
        "The messages have 1 places for images that are passed separately ({'type': 'image'} or "
        "<image>), but 0 were passed. Pass one image for each place.",
    ),
    "no answer": (
        [{"role": "assistant", "content": "red"}],
        "The last message is the assistant's, which is the given answer; it must be text and "
        "follow another message; got {'content': [{'text': 'red', 'type': 'text'}], 'role': "
        "'assistant'}. Leave it out to generate one.",
    ),
    "a number": (
        7,
        "A prompt must be a string or a list of messages, which are dicts with role and content; "
        "got 7.",
    ),
}


@pytest.mark.usefixtures("any_type")
@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_chat_is_refused(case: str) -> None:
    given, message = WRONG[case]
    with pytest.raises(InputError) as refusal:
        capture(tiny_vlm("llava"), prompt=given)
    assert str(refusal.value) == message


def test_models_that_take_no_chat() -> None:
    processor = copy.copy(tiny_vlm("llava").processor)
    processor.chat_template = None
    with pytest.raises(InputError) as refusal:
        capture(VLM(tiny_vlm("llava").model, processor), prompt=CHAT)
    assert str(refusal.value) == (
        "LlavaProcessor has no chat template to render messages. Pass the prompt as a string."
    )
    with pytest.raises(InputError, match="The messages end with the assistant's 'red', which is"):
        tiny_vlm("llava").prepare([[]], [CHAT[:3]])


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two pictures, and the same items in the layout of LLaVA and as messages."""
    (tmp_path / "images").mkdir()
    ONE.save(tmp_path / "images" / "one.png")
    OTHER.save(tmp_path / "images" / "other.png")
    llava = [
        {
            "id": "000000033471",
            "image": "images/one.png",
            "conversations": [
                {"from": "human", "value": "<image>\nwhat color is the circle ?"},
                {"from": "gpt", "value": "red"},
                {"from": "human", "value": "where is it ?"},
                {"from": "gpt", "value": "top left"},
            ],
        },
        {
            "id": "000000052846",
            "image": "images/other.png",
            "conversations": [
                {"from": "human", "value": "how many shapes ?\n<image>"},
                {"from": "gpt", "value": "two"},
            ],
        },
    ]
    messages = [
        {
            "id": "000000033471",
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": "images/one.png"},
                        {"type": "text", "text": "what color is the circle ?"},
                    ],
                },
                {"role": "assistant", "content": "red"},
                {"role": "user", "content": "where is it ?"},
                {"role": "assistant", "content": [{"type": "text", "text": "top left"}]},
            ],
        },
        {
            "id": "000000052846",
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "how many shapes ?"},
                        {"type": "image", "image": "images/other.png"},
                    ],
                },
                {"role": "assistant", "content": "two"},
            ],
        },
    ]
    (tmp_path / "llava.json").write_text(json.dumps(llava))
    (tmp_path / "messages.jsonl").write_text("\n".join(map(json.dumps, messages)))
    return tmp_path


def test_records_of_llava_and_messages_of_qwen_are_items(data: Path) -> None:
    stores = [
        capture_dataset(shipped(), data / name, data / f"{name}.run", progress=False)
        for name in ("llava.json", "messages.jsonl")
    ]
    expected = capture(
        shipped(),
        prompt=[
            {"role": "user", "content": [image_part(ONE), text_part("what color is the circle ?")]},
            {"role": "assistant", "content": "red"},
            {"role": "user", "content": "where is it ?"},
        ],
    )
    for store in stores:
        assert store.names == ("000000033471", "000000052846")
        assert [each.labels for each in store] == [{"answer": "top left"}, {"answer": "two"}]
        assert [each.question for each in store] == ["where is it ?", "how many shapes ?"]
        assert [each.answer for each in store] == ["", ""]
        pd.testing.assert_frame_equal(store[0].tokens, expected.tokens)
        assert torch.equal(store[0].probs(), expected.probs())
        assert store[0].provenance["messages"] == expected.provenance["messages"]
        assert store[1].text == "<bos>user: how many shapes ? <image> assistant:"
        assert store[1].images[0].tobytes() == OTHER.tobytes()
    assert torch.equal(stores[0][1].probs(), stores[1][1].probs())
    crossed = capture_dataset(
        shipped(), data / "messages.jsonl", data / "llava.json.run", progress=False
    )
    assert len(crossed) == 2  # the same items


def test_another_history_is_another_item(data: Path, tmp_path: Path) -> None:
    records = json.loads((data / "llava.json").read_text())
    for record in records:
        record["image"] = str(data / record["image"])
    capture_dataset(shipped(), records[:1], tmp_path / "run", progress=False)
    records[0]["conversations"][1]["value"] = "blue"
    with pytest.raises(StoreError, match=r"^Item 0 \('000000033471'\) differs in prompt, labels"):
        capture_dataset(shipped(), records[:1], tmp_path / "run", progress=False)


def test_answers_of_chats_are_known_answers(data: Path) -> None:
    """Items of the analyses that score answers may be chats."""
    vlm = shipped()
    batches = batches_of(vlm, data / "llava.json", batch_size=1)
    decoded = {vlm.tokenizer.decode(batch.answers[0]) for batch in batches}
    assert decoded == {"top left", "two"}
    table = xi.answer_accuracy(vlm, data / "llava.json", batch_size=1)
    assert table["answer"].tolist() == ["top left", "two"]
    assert table["prompt"].tolist() == ["where is it ?", "how many shapes ?"]


ITEMS = {
    "two prompts": (
        {"prompt": "where ?", "messages": CHAT},
        "Item 0 ('item-000000') has both 'prompt' and 'messages' (its entries are prompt, messages)"
        ". Give exactly one that is not None.",
    ),
    "two answers": (
        {"messages": CHAT[:3], "answer": "blue"},
        "Item 0 ('item-000000') has the answer 'blue', and its messages end with 'red'. Leave out "
        "one of them.",
    ),
    "an unknown role": (
        {"conversations": [{"from": "bot", "value": "?"}]},
        "Item 0 ('item-000000'): A message must have one of the roles system, user, assistant, "
        "tool, human, gpt, observation; got 'bot' in {'from': 'bot', 'value': '?'}.",
    ),
    "a wrong picture": (
        {"messages": [{"role": "user", "content": [image_part(7)]}]},
        "Item 0 ('item-000000'): An image must be a path, a URL, a PIL image, an array, the bytes "
        "of a file or a dict with bytes or path; got int.",
    ),
}


@pytest.mark.usefixtures("any_type")
@pytest.mark.parametrize("case", ITEMS)
def test_unusable_chats_of_items(case: str, tmp_path: Path) -> None:
    item, message = ITEMS[case]
    with pytest.raises(InputError) as refusal:
        capture_dataset(shipped(), [item], tmp_path / "run", progress=False)
    assert str(refusal.value) == message


def test_a_chat_without_images_is_an_item(tmp_path: Path) -> None:
    item = {"messages": [{"role": "user", "content": "how many ?"}]}
    (sample,) = capture_dataset(shipped(), [item], tmp_path / "run", progress=False)
    assert sample.images == ()
    assert sample.text == "<bos>user: how many ? assistant:"


def test_images_of_a_saved_file_are_opened_from_its_folder(data: Path) -> None:
    rows = xi.models.read_items(data / "messages.jsonl")
    part = rows[0]["messages"][0]["content"][0]
    with Image.open(part["image"]) as image:
        assert image.size == ONE.size


def test_tool_calls_that_the_template_leaves_out_are_an_error() -> None:
    """The sample would claim in its provenance what the model did not read."""
    call = {"type": "function", "function": {"name": "zoom", "arguments": {"x": 1}}}
    chat = [
        {"role": "user", "content": [image_part(ONE), text_part("where is it ?")]},
        {"role": "assistant", "content": "red", "tool_calls": [call]},
        {"role": "tool", "content": "left"},
    ]
    with pytest.raises(InputError) as refusal:
        capture(tiny_vlm("llava"), prompt=chat)
    assert str(refusal.value) == (
        "The chat template of LlavaProcessor does not write the tool_calls of message 1. Write "
        "them into its content, or use a chat template with tools."
    )
