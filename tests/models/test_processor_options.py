"""Options of the processor: image tokens are those of the processor itself with these options."""

import json
import shutil

import pytest
import torch
from typer.testing import CliRunner

import xmodal_interp as xi
from tests.helpers.real import real, settled
from tests.helpers.store_samples import shipped
from tests.helpers.tiny import picture, tiny_vlm
from tests.helpers.vision import vision_vlm
from xmodal_interp.capturing.dataset import capture_dataset
from xmodal_interp.capturing.run import capture, capture_batch
from xmodal_interp.cli.commands import app
from xmodal_interp.errors import InputError, StoreError
from xmodal_interp.models import VLM
from xmodal_interp.shapes.tiny_models import build_processor

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"
)
WIDE = picture(192, 96, seed=1)
QUESTION = "what is it?"
PAN_AND_SCAN = {
    "do_pan_and_scan": True,
    "pan_and_scan_min_crop_size": 32,
    "pan_and_scan_max_num_crops": 4,
    "pan_and_scan_min_ratio_to_activate": 1.2,
}
OPTIONS = {
    "most pixels": ("qwen2_vl", {"max_pixels": 2048}, 32, 8),
    "pixels": ("qwen2_vl", {"min_pixels": 160 * 160, "max_pixels": 320 * 320}, 32, 120),
    "areas": ("qwen2_vl", {"size": {"shortest_edge": 1024, "longest_edge": 4096}}, 32, 10),
    "of images": ("qwen2_5_vl", {"images_kwargs": {"max_pixels": 2048}}, 32, 8),
    "deepstack": ("qwen3_vl", {"max_pixels": 2048}, 32, 8),
    "pan and scan": ("gemma3", PAN_AND_SCAN, 16, 48),
    "longest edge": ("idefics3", {"size": {"longest_edge": 64}}, 28, 12),
    "no tiles": ("idefics3", {"do_image_splitting": False}, 28, 4),
    "native size": ("mistral3", {"size": {"longest_edge": 48}}, 18, 6),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_image_tokens_are_those_of_the_processor_with_the_options(case: str) -> None:
    model_type, options, n_without, n_with = OPTIONS[case]
    vlm = VLM(real(model_type)[0], settled(model_type))
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
    text = vlm.processor.apply_chat_template([message], add_generation_prompt=True)
    given = {"text": text, "images": [[WIDE]] if model_type in ("gemma3", "idefics3") else [WIDE]}
    if text.startswith("<s>"):
        given["add_special_tokens"] = False
    theirs = settled(model_type)(**given, return_tensors="pt", **options)
    ours, (prompt,) = vlm.prepare([WIDE], [QUESTION], processor_options=options)
    for name in theirs.keys() & ours.keys():
        assert torch.equal(ours[name], theirs[name].to(ours[name].dtype)), name
    assert {"input_ids", "pixel_values"} <= theirs.keys() & ours.keys()
    sample = capture(vlm, WIDE, QUESTION, processor_options=options)
    assert len(sample.where("image")) == prompt.columns["kind"].count("image") == n_with
    assert sample.grids[0].n_tokens == n_with
    assert sample.provenance["processor_options"] == options
    without = capture(vlm, WIDE, QUESTION)
    assert len(without.where("image")) == n_without
    assert "processor_options" not in without.provenance
    loaded = VLM(vlm.model, settled(model_type), processor_options=options)
    again = capture(loaded, WIDE, QUESTION)
    assert again.provenance["processor_options"] == options
    assert torch.equal(again.probs(), sample.probs())
    boxes = sample.tokens.loc[sample.where("image"), ["x0", "y0", "x1", "y1"]]
    assert boxes["x0"].min() <= 0
    assert boxes["x1"].max() >= WIDE.width


def test_the_processor_is_not_changed() -> None:
    processor = build_processor("qwen2_vl")
    before = processor.to_json_string()
    vlm = VLM(tiny_vlm("qwen2_vl").model, processor)
    other = vlm.with_options({"max_pixels": 2304})
    assert len(capture(other, WIDE, QUESTION).where("image")) == 32
    assert len(capture(vlm, WIDE, QUESTION, processor_options={"max_pixels": 2304}).tokens) == len(
        capture(other, WIDE, QUESTION).tokens
    )
    assert processor.to_json_string() == vlm.processor.to_json_string() == before
    assert vlm.processor_options == {}


def test_options_of_a_call_are_added_to_those_of_the_model() -> None:
    vlm = VLM(real("gemma3")[0], settled("gemma3"), processor_options={"do_pan_and_scan": True})
    others = {name: value for name, value in PAN_AND_SCAN.items() if name != "do_pan_and_scan"}
    sample = capture(vlm, WIDE, QUESTION, processor_options=others)
    assert len(sample.where("image")) == 48
    assert sample.provenance["processor_options"] == PAN_AND_SCAN
    off = capture(vlm, WIDE, QUESTION, processor_options={"do_pan_and_scan": False})
    assert len(off.where("image")) == 16


def test_load_takes_options(tmp_path) -> None:
    vlm = xi.load("qwen2_vl", processor_options={"max_pixels": 2304})
    sample = capture(vlm, WIDE, QUESTION)
    expected = capture(shipped("qwen2_vl"), WIDE, QUESTION, processor_options={"max_pixels": 2304})
    assert torch.equal(sample.probs(), expected.probs())
    folder = tmp_path / "saved"
    shutil.copytree(xi.models.loading.shipped_path("qwen2_vl"), folder)
    path = folder / "preprocessor_config.json"
    if path.is_file():
        settings = json.loads(path.read_text())
    else:
        path = folder / "processor_config.json"
        settings = json.loads(path.read_text())
    inner = settings.get("image_processor", settings)
    inner["size"]["longest_edge"] = 2304
    inner.pop("max_pixels", None)
    path.write_text(json.dumps(settings))
    saved = capture(xi.load(str(folder), dtype="float32"), WIDE, QUESTION)
    assert torch.equal(saved.probs(), sample.probs())


def test_a_batch_with_options_equals_single_samples() -> None:
    vlm, options = tiny_vlm("qwen2_vl"), {"max_pixels": 2304}
    images, prompts = [WIDE, picture(seed=2)], [QUESTION, "how many shapes are in the image ?"]
    batch = capture_batch(vlm, images, prompts, processor_options=options, max_new_tokens=2)
    for sample, image, prompt in zip(batch, images, prompts, strict=True):
        alone = capture(vlm, image, prompt, processor_options=options, max_new_tokens=2)
        pad = len(sample.where("padding"))
        assert sample.answer == alone.answer
        torch.testing.assert_close(sample.probs()[:, pad:, pad:], alone.probs(), atol=1e-5, rtol=0)


def test_interventions_at_positions_of_a_model_with_options() -> None:
    """The positions of an intervention are those of the prompt with the options."""
    vlm, options = tiny_vlm("qwen2_vl"), {"max_pixels": 2304}
    plain = capture(vlm, WIDE, QUESTION, processor_options=options)
    blocked = xi.knock_out_attention("last", lambda of: of.where("image"))
    with xi.intervene(vlm, blocked):
        sample = capture(vlm, WIDE, QUESTION, processor_options=options)
    image = sample.where("image")
    assert plain.probs(1)[:, -1, image].sum() > 0
    assert sample.probs(1)[:, -1, image].sum() == 0


def test_options_are_settings_of_a_store(tmp_path) -> None:
    items = [{"id": "a", "image": WIDE, "prompt": QUESTION}]
    vlm, options = shipped("qwen2_vl"), {"max_pixels": 2304}
    store = capture_dataset(vlm, items, tmp_path / "run", processor_options=options, progress=False)
    assert store.manifest["settings"]["processor_options"] == options
    assert store[0].provenance["processor_options"] == options
    assert len(store[0].where("image")) == 32
    assert len(capture(vlm, WIDE, QUESTION).where("image")) == 128
    loaded = xi.load("qwen2_vl", processor_options=options)
    assert len(capture_dataset(loaded, items, tmp_path / "run", progress=False)) == 1
    for other, words in (
        (None, "processor_options.max_pixels is 2304 in the store and not set now"),
        ({"max_pixels": 4096}, "processor_options.max_pixels is 2304 in the store and 4096 now"),
    ):
        with pytest.raises(StoreError) as refusal:
            capture_dataset(vlm, items, tmp_path / "run", processor_options=other, progress=False)
        assert words in str(refusal.value)


def test_the_command_line_takes_options(tmp_path) -> None:
    run = CliRunner().invoke
    WIDE.save(tmp_path / "wide.png")
    asked = ["--model", "qwen2_vl", "--image", str(tmp_path / "wide.png"), "--prompt", QUESTION]
    options = ["--processor-option", "max_pixels=2304", "--max-new-tokens", "2"]
    shown = run(app, ["capture", str(tmp_path / "run"), *asked, *options])
    assert shown.exit_code == 0, shown.output
    (sample,) = xi.open_store(tmp_path / "run")
    assert sample.provenance["processor_options"] == {"max_pixels": 2304}
    expected = capture(
        shipped("qwen2_vl"),
        WIDE,
        QUESTION,
        processor_options={"max_pixels": 2304},
        max_new_tokens=2,
    )
    assert torch.equal(sample.probs(), expected.probs())
    wrong = {
        "max_pixel=2304": "error: The processor Qwen2VLProcessor has no option 'max_pixel' for "
        "images or videos. Similar options are max_pixels, min_pixels.",
        "max_pixels": "error: --processor-option must be name=value; got 'max_pixels'.",
    }
    for written, message in wrong.items():
        shown = run(app, ["capture", str(tmp_path / "no"), *asked, "--processor-option", written])
        assert shown.exit_code == 1
        assert " ".join(shown.output.split()) == message


WRONG = {
    "unknown": (
        {"max_pixel": 1},
        "The processor Qwen2VLProcessor has no option 'max_pixel' for images or videos. Similar "
        "options are max_pixels, min_pixels.",
    ),
    "of another family": (
        {"do_pan_and_scan": True},
        "The processor Qwen2VLProcessor has no option 'do_pan_and_scan' for images or videos. "
        "Its options are",
    ),
    "not a dict": (
        ["max_pixels"],
        "processor_options must be a dict of names and values, such as {'max_pixels': 50176}; got "
        "['max_pixels'].",
    ),
}


def test_wrong_options_are_errors_before_the_weights_are_loaded(monkeypatch) -> None:
    def refuse(*_):
        raise AssertionError("the weights are loaded")

    monkeypatch.setattr(xi.models.loading, "_model", refuse)
    with pytest.raises(InputError, match="has no option 'max_pixel' for images or videos"):
        xi.load("qwen2_vl", processor_options={"max_pixel": 1})


@pytest.mark.usefixtures("any_type")
@pytest.mark.parametrize("case", WRONG)
def test_options_that_cannot_be_set(case: str) -> None:
    options, message = WRONG[case]
    for refused in (
        lambda: capture(tiny_vlm("qwen2_vl"), WIDE, QUESTION, processor_options=options),
        lambda: xi.load("qwen2_vl", processor_options=options),
    ):
        with pytest.raises(InputError) as refusal:
            refused()
        assert str(refusal.value).startswith(message)
        assert case == "of another family" or str(refusal.value) == message


def test_an_option_that_the_processor_overrides_is_an_error() -> None:
    """``Gemma3Processor`` of transformers passes ``do_pan_and_scan`` itself if it has a default."""
    vlm = VLM(real("gemma3")[0], settled("gemma3"))
    for value, n_tokens in ((True, 48), (False, 16)):
        options = {**PAN_AND_SCAN, "do_pan_and_scan": value}
        assert len(capture(vlm, WIDE, QUESTION, processor_options=options).where("image")) == (
            n_tokens
        )


def test_options_of_the_image_processor_of_a_vision_model() -> None:
    vlm = vision_vlm("vit")
    side = vlm.processor.size["height"]
    unknown = {"max_pixels": 4}
    with pytest.raises(InputError, match="has no option 'max_pixels' for images or videos"):
        capture(vlm, WIDE, processor_options=unknown)
    sample = capture(vlm, WIDE, processor_options={"image_mean": [0.0, 0.0, 0.0]})
    assert vlm.processor.size["height"] == side
    assert sample.provenance["processor_options"] == {"image_mean": [0.0, 0.0, 0.0]}
    theirs = vlm.processor(images=[WIDE], image_mean=[0.0, 0.0, 0.0], return_tensors="pt")
    ours, _ = vlm.prepare([WIDE], [""], processor_options={"image_mean": [0.0, 0.0, 0.0]})
    assert torch.equal(ours["pixel_values"], theirs["pixel_values"])
    assert not torch.equal(
        sample.probs(0, tower="vision"), capture(vlm, WIDE).probs(0, tower="vision")
    )
