"""Recording a model with PEFT adapters."""

import peft
import pytest
import torch
from torch import nn

from tests.helpers.attention_variants import STEPS, assert_complete_and_exact, of
from tests.helpers.tiny import QUESTION, picture, tiny_vlm
from xmodal_interp.capturing.fingerprint import fingerprint
from xmodal_interp.capturing.run import capture
from xmodal_interp.errors import InputError, UnsupportedModelError
from xmodal_interp.hooks import record
from xmodal_interp.models import VLM, load
from xmodal_interp.verification import doctor

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def adapted(seed: int = 0) -> peft.PeftModel:
    torch.manual_seed(seed)
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return peft.get_peft_model(of("llava")[0], settings).eval()


def merged_within(model: peft.PeftModel) -> nn.Module:
    model.merge_adapter()
    return model


WAYS = {
    "unmerged": lambda model: model,
    "merged": merged_within,
    "merged and unloaded": lambda model: model.merge_and_unload(),
}


@pytest.mark.parametrize("way", WAYS)
def test_adapters_change_the_recorded_queries(way) -> None:
    model, (base, inputs) = WAYS[way](adapted()), of("llava")
    with torch.no_grad():
        alone = model(**inputs).logits
        with record(model) as recording:
            recorded = model(**inputs).logits
        with record(base) as without:
            base(**inputs)
    assert torch.equal(alone, recorded)
    assert_complete_and_exact(recording.calls, model)
    keys = [(call.tower, call.kind, call.layer) for call in recording.calls]
    assert keys == [(call.tower, call.kind, call.layer) for call in without.calls]
    for ours, theirs in zip(recording.calls, without.calls, strict=True):
        assert not torch.allclose(ours.q, theirs.q, atol=1e-3)


@pytest.mark.parametrize("way", WAYS)
def test_a_wrapped_model_is_captured_and_checked_as_any_other(way) -> None:
    vlm = VLM(WAYS[way](adapted()), tiny_vlm("llava").processor)
    assert vlm.family.model_type == "llava"
    sample = capture(vlm, picture(), QUESTION, **STEPS)
    assert len(sample.tokens) == sample.call(0).n_queries == 156
    assert sample.provenance["model_type"] == "llava"
    assert doctor(vlm, picture(), QUESTION).ok


def test_a_disabled_adapter_has_no_effect() -> None:
    model, (base, inputs) = adapted(), of("llava")
    with torch.no_grad(), model.disable_adapter(), record(model) as recording:
        model(**inputs)
    with torch.no_grad(), record(base) as without:
        base(**inputs)
    for ours, theirs in zip(recording.calls, without.calls, strict=True):
        assert torch.equal(ours.q, theirs.q)


def test_an_adapter_is_loaded_with_its_base(tmp_path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError) as error:
        load(tmp_path)
    assert str(error.value) == (
        f"{str(tmp_path)!r} holds only a PEFT adapter, not a whole model. Load its base model "
        "and pass VLM(PeftModel.from_pretrained(base.model, folder), base.processor)."
    )
    base, processor = of("llava")[0], tiny_vlm("llava").processor
    again = VLM(peft.PeftModel.from_pretrained(base, tmp_path).eval(), processor)
    plain = capture(VLM(model, processor), picture(), QUESTION)
    assert torch.equal(capture(again, picture(), QUESTION).call(3).q, plain.call(3).q)


def test_another_adapter_changes_the_fingerprint() -> None:
    digests = [fingerprint(VLM(adapted(seed), tiny_vlm("llava").processor)) for seed in (0, 0, 1)]
    assert digests[0] == digests[1] != digests[2]


def test_a_disabled_rescaled_or_merged_adapter_changes_the_fingerprint() -> None:
    model, processor = adapted(), tiny_vlm("llava").processor
    plain = fingerprint(VLM(model, processor))
    found = []
    with model.disable_adapter():
        found.append(fingerprint(VLM(model, processor)))
    layers = [each for each in model.modules() if isinstance(each, peft.tuners.lora.LoraLayer)]
    layers[-1].scale_layer(0.5)
    found.append(fingerprint(VLM(model, processor)))
    layers[-1].unscale_layer()
    assert fingerprint(VLM(model, processor)) == plain
    for each in found:
        assert [name for name in plain if plain[name] != each[name]] == ["modules_digest"]
    assert found[0] != found[1]
    model.merge_adapter()
    assert fingerprint(VLM(model, processor))["weights_digest"] != plain["weights_digest"]


@pytest.mark.parametrize(
    ("kind", "name"),
    [(peft.PromptTuningConfig, "PROMPT_TUNING"), (peft.PrefixTuningConfig, "PREFIX_TUNING")],
)
def test_positions_without_a_token_are_refused_where_tokens_are_labelled(kind, name) -> None:
    sizes = {"num_layers": 4, "token_dim": 128, "num_attention_heads": 8}
    model, inputs = of("llava")
    model = peft.get_peft_model(
        model, kind(task_type="CAUSAL_LM", num_virtual_tokens=4, **sizes)
    ).eval()
    with torch.no_grad():
        alone = model(**inputs).logits
        with record(model) as recording:
            assert torch.equal(model(**inputs).logits, alone)
    assert_complete_and_exact(recording.calls, model)
    assert recording.calls[-1].n_keys == 154 + 4
    with pytest.raises(UnsupportedModelError) as error:
        VLM(model, tiny_vlm("llava").processor)
    assert str(error.value) == (
        f"The adapter 'default' ({name}) adds 4 positions without a token, which cannot be "
        "labelled. Record the bare attention with xi.record(model)."
    )
