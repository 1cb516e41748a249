"""Settings that processors of older checkpoints lack are taken from the model."""

import copy

import pytest

from tests.helpers.real import real, settled
from tests.helpers.tiny import QUESTION, picture, tiny_vlm
from tests.models.test_llava_kinds import llava
from xmodal_interp.capturing.run import capture
from xmodal_interp.errors import InputError
from xmodal_interp.models import VLM

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")

SETTINGS = ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens")


def older(processor):
    """The processor as checkpoints had it before these settings existed."""
    made = copy.copy(processor)
    made.patch_size = made.vision_feature_select_strategy = None
    made.num_additional_image_tokens = 0
    return made


@pytest.mark.parametrize(
    "make",
    [
        lambda: tiny_vlm("llava"),
        lambda: llava("clip"),
        lambda: llava("siglip"),
        lambda: VLM(real("llava_next")[0], settled("llava_next")),
        lambda: VLM(real("vipllava")[0], settled("vipllava")),
    ],
    ids=["llava", "clip full", "siglip full", "llava_next", "vipllava"],
)
def test_missing_settings_are_those_of_the_model(make) -> None:
    vlm = make()
    saved = older(vlm.processor)
    again = VLM(vlm.model, saved)
    expected = {name: getattr(vlm.processor, name) for name in SETTINGS}
    assert {name: getattr(again.processor, name) for name in SETTINGS} == expected
    assert saved.patch_size is None
    found, whole = (capture(each, picture(64, 96), QUESTION) for each in (again, vlm))
    assert found.tokens.equals(whole.tokens)


def test_a_setting_that_the_model_lacks_is_named() -> None:
    vlm = tiny_vlm("llava")
    model = copy.copy(vlm.model)
    model.config = copy.deepcopy(model.config)
    model.config.vision_config.patch_size = None
    with pytest.raises(InputError) as refusal:
        capture(VLM(model, older(vlm.processor)), picture(), QUESTION)
    assert str(refusal.value) == (
        "LlavaProcessor failed on this input: unsupported operand type(s) for //: 'int' and "
        "'NoneType'. Its settings patch_size have no value in the processor or the model's "
        "config. Set processor.patch_size."
    )


def test_a_complete_processor_is_used_itself() -> None:
    vlm = tiny_vlm("llava")
    assert VLM(vlm.model, vlm.processor).processor is vlm.processor
