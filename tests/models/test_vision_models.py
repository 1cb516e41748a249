"""``xi.capture`` of vision models without a language model, of every type that has a rule.

That the keys of the first layer change at the position of a painted patch shows that the names and
places of the positions are right.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CONFIG_MAPPING, ResNetConfig, ResNetModel, SwinConfig, SwinModel
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

import xmodal_interp as xi
from tests.helpers.tiny import picture, tiny_vlm
from tests.helpers.vision import (
    BUILT,
    IN_DUAL_ENCODERS,
    registers_vlm,
    square_processor,
    vision_vlm,
)
from xmodal_interp.errors import (
    GeometryError,
    InputError,
    PhraseError,
    UnsupportedModelError,
)
from xmodal_interp.models import FAMILIES, VLM, Family
from xmodal_interp.models.encoders import DUAL_ENCODERS, ENCODERS, REFUSED
from xmodal_interp.models.geometry import PatchTokens
from xmodal_interp.models.records import family_of
from xmodal_interp.verification.painting import painted_patches

pytestmark = pytest.mark.filterwarnings(  # raised inside the processors
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"
)
BY_PROBABILITIES = {"mgp-str", "vitdet", "flava"}
"""Types whose calls hold no keys, so that their changes cannot be compared."""
NAMES = {
    "vit": ["class"],
    "deit": ["class", "distillation"],
    "ijepa": [],
    "dinov2_with_registers": ["class", *(f"register {i}" for i in range(4))],
    "dinov3_vit": ["class", "register 0", "register 1"],
    "pixio": [f"class {i}" for i in range(8)],
    "tipsv2_vision_model": ["class", "register"],
    "yolos": ["class", "detection 0", "detection 1", "detection 2"],
    "clip": ["class"],
    "siglip": [],
    "depth_anything": ["class"],
}


@pytest.mark.parametrize("name", [*BUILT, "depth_anything"])
def test_a_painted_patch_changes_the_key_at_its_position(name: str) -> None:
    vlm = vision_vlm(name)
    painted = painted_patches(vlm, "", ((64, 48),))
    assert painted.misfit == ""
    assert (painted.patches == ()) == (name in BY_PROBABILITIES)
    assert all(patch.at_its_place for patch in painted.patches)
    sample = xi.capture(vlm, picture(64, 48))
    assert sample.tower == "vision"
    assert {key[0] for key in sample.calls} == {"vision"}
    call = sample.call(0)
    assert call.n_queries == call.n_keys == len(sample)
    special = sample.tokens[sample.tokens["kind"].eq("special")]
    assert special["row"].isna().all()
    if name in NAMES:
        assert special["token"].tolist() == NAMES[name]
    grid = sample.grids[0]
    patches = sample.tokens[sample.tokens["kind"].eq("image")]
    assert len(patches) == grid.rows * grid.cols
    assert patches["token"].eq("patch").all()
    assert patches[["x0", "y0"]].iloc[0].tolist() == [0, 0]
    assert patches[["x1", "y1"]].iloc[-1].tolist() == pytest.approx([64, 48])


def test_every_type_with_an_image_processor_has_a_rule_or_a_reason() -> None:
    video_or_text = {"colpali", "colqwen2", "qwen2_5_omni", "qwen3_omni_moe"}  # retrieval, speech
    unknown = []
    for name in IMAGE_PROCESSOR_MAPPING_NAMES:
        if name in FAMILIES or name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
            continue
        if name in (*ENCODERS, *DUAL_ENCODERS, *REFUSED, *video_or_text):
            continue
        config = CONFIG_MAPPING[name]()
        backbone = getattr(config, "backbone_config", None)
        has_backbone = backbone is not None and backbone.model_type in (*ENCODERS, "resnet")
        if not has_backbone and not hasattr(config, "image_token_id"):
            unknown.append(name)
    assert unknown == ["phi4_multimodal"]  # a language model with images, outside of the VLM types
    assert set(ENCODERS) - set(BUILT) == {*IN_DUAL_ENCODERS, "vitpose_backbone"}
    assert not set(REFUSED) & {*ENCODERS, *DUAL_ENCODERS, *FAMILIES}


def test_the_page_lists_every_type_and_reason() -> None:
    page = (Path(__file__).parents[2] / "docs" / "vision-models.md").read_text()
    missing = [n for n in (*ENCODERS, *DUAL_ENCODERS, *REFUSED) if f"`{n}`" not in page]
    assert missing == []
    assert all(f"| {reason} |" in page for reason in REFUSED.values())
    assert f"{len(ENCODERS)} types" in page


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (
            SwinModel(SwinConfig(image_size=16, embed_dim=16, depths=[1], num_heads=[2])),
            "its layers read windows or stages of different sizes, not one position per patch",
        ),
        (
            ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])),
            "it has no softmax attention over patches, only convolutions",
        ),
    ],
)
def test_types_without_one_position_per_patch_are_refused(
    model: torch.nn.Module, reason: str
) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        VLM(model, square_processor())
    assert str(caught.value) == (
        f"A model of the type {model.config.model_type!r} has no table of tokens: {reason}. "
        "Record its attention with xi.record(model); recording.sample(image, grid=...) makes a "
        "sample of layers whose positions are the patches of one grid."
    )


def test_types_that_read_text_too_are_refused_by_their_configuration() -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        family_of(CONFIG_MAPPING["vilt"]())
    assert str(caught.value).startswith(
        "A model of the type 'vilt' has no table of tokens: it reads image and text in one sequence"
    )


def test_names_select_positions() -> None:
    sample = xi.capture(registers_vlm(), picture())
    assert sample.positions("class").tolist() == [0]
    assert sample.positions("register").tolist() == [1, 2]
    assert sample.positions(["register 1", "class"]).tolist() == [0, 2]
    assert sample.positions("patch").tolist() == list(range(3, 19))
    of_class = sample.probs(-1, queries="class", keys="patch")
    whole = sample.probs(-1, tower="vision")
    torch.testing.assert_close(of_class, whole[:, :1, 3:], atol=1e-6, rtol=1e-5)
    with pytest.raises(PhraseError) as caught:
        sample.positions("cat")
    assert str(caught.value) == (
        "No position of the vision tower of sample 'sample-0' is named 'cat'; the names are "
        "class, register, patch. Pass one of them, or positions as numbers."
    )


def test_names_select_positions_in_the_tower_of_a_vlm() -> None:
    sample = xi.capture(tiny_vlm("llava"), picture(), "what is it?")
    assert sample.tower == "language"
    assert sample.positions("class", tower="vision").tolist() == [0]
    row = sample.probs(0, queries="class", tower="vision")
    torch.testing.assert_close(row, sample.probs(0, tower="vision")[:, :1], atol=1e-6, rtol=1e-5)


def test_probabilities_are_those_of_the_model() -> None:
    vlm = registers_vlm()
    sample = xi.capture(vlm, picture())
    vlm.model.set_attn_implementation("eager")
    inputs, _ = vlm.prepare([[picture()]], [""])
    with torch.no_grad():
        eager = vlm.model(**inputs, output_attentions=True).attentions
    for layer, probs in enumerate(eager):
        assert (sample.probs(layer) - probs[0]).abs().max() < 1e-5


def test_a_batch_gives_the_samples_of_single_images() -> None:
    vlm = registers_vlm()
    images = [[picture(60, 40, 0)], [picture(40, 60, 1)]]
    both = xi.capture_batch(vlm, images)
    for (image,), sample in zip(images, both, strict=True):
        alone = xi.capture(vlm, image)
        assert (sample.probs(2) - alone.probs(2)).abs().max() < 1e-6
        pandas_equal = sample.tokens.equals(alone.tokens)
        assert pandas_equal


def test_what_a_vision_model_cannot_take() -> None:
    vlm, image = registers_vlm(), picture()

    def message(*args: object, **options: object) -> str:
        with pytest.raises(InputError) as caught:
            xi.capture(vlm, *args, **options)
        return str(caught.value)

    assert message(image, "what is it?") == (
        "A dinov2_with_registers model has no language model; got the prompt 'what is it?'. Leave "
        "the prompt out."
    )
    assert message([image, image]) == (
        "A dinov2_with_registers model reads one image per sample; got 2. Use xi.capture_batch "
        "for several images."
    )
    assert message(image, max_new_tokens=3) == (
        "A dinov2_with_registers model generates no tokens; got max_new_tokens=3. Leave it out."
    )
    with pytest.raises(InputError) as caught:
        VLM(vlm.model, object())
    assert str(caught.value) == (
        "The processor of a vision model must be an image processor; got object. Load it with "
        "AutoImageProcessor."
    )
    with pytest.raises(InputError) as caught:
        xi.capture(tiny_vlm("llava"), image)
    assert str(caught.value) == "The prompt is empty or only white space. Pass a question."


def test_a_mis_sized_rule_is_the_message() -> None:
    vlm = registers_vlm()
    rule = PatchTokens(before={"class": 1})
    family = Family(
        "own", None, rule, in_sequence=False, reads_text=False, placeholder=None, language=False
    )
    with pytest.raises(GeometryError) as caught:
        xi.capture(VLM(vlm.model, vlm.processor, family), picture())
    assert str(caught.value) == (
        "By the family's geometry rule, the image has 17 positions, but vision self-attention, "
        "layer 0, call 0 has 19 keys. Pass VLM(model, processor, family=...) with a rule for this "
        "model, such as geometry.PatchTokens(before={'class': 1})."
    )


def test_a_folder_is_loaded_captured_and_stored(tmp_path: Path) -> None:
    vlm = registers_vlm()
    vlm.model.save_pretrained(tmp_path / "model")
    vlm.processor.save_pretrained(tmp_path / "model")
    loaded = xi.load(tmp_path / "model")
    assert type(loaded.model).__name__ == "Dinov2WithRegistersModel"
    items = [{"name": "a", "image": picture()}, {"name": "b", "image": picture(seed=1)}]
    store = xi.capture_dataset(loaded, items, tmp_path / "store", batch_size=2, progress=False)
    fresh, stored = xi.capture(vlm, picture(), name="a"), store["a"]
    assert stored.tower == "vision"
    assert stored.tokens.equals(fresh.tokens)
    assert stored.patch_names().tolist() == fresh.patch_names().tolist()
    assert (stored.probs(1) - fresh.probs(1)).abs().max() < 1e-6
    assert xi.attention_rollout(stored)["rollout"].sum() == pytest.approx(1)


def test_a_dual_encoder_keeps_its_vision_tower() -> None:
    vlm = vision_vlm("clip")
    assert type(vlm.model).__name__ == "CLIPVisionModel"
    assert xi.capture(vlm, picture()).layers() == [0, 1]


def test_the_doctor_trusts_a_vision_model() -> None:
    checkup = xi.doctor(registers_vlm(), picture())
    assert checkup.ok, checkup
    table = checkup.table.set_index("check")
    assert table.loc["the number of vision positions is as predicted", "value"] == 19
    assert table.loc["painting a patch changes the key at its position", "verdict"] == "pass"
    assert table.loc["boxes are those measured with test images", "verdict"] == "pass"


def test_a_repr_shows_the_image_instead_of_a_question() -> None:
    sample = xi.capture(registers_vlm(), Image.fromarray(np.zeros((20, 30, 3), np.uint8)))
    assert repr(sample) == (
        "Sample('sample-0': 30 x 20 px; 16 image, 3 special tokens; layers: 3 vision self)"
    )
