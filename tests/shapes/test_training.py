"""Packing does not change logits, and a resumed run equals an uninterrupted one."""

import numpy as np
import pytest
import torch
from transformers import AttentionInterface

from xmodal_interp.models import VLM
from xmodal_interp.shapes import sample_scene
from xmodal_interp.shapes.scenes import ask
from xmodal_interp.shapes.tiny_models import build_processor, untrained
from xmodal_interp.shapes.training import IGNORE, Packer, Settings, Trainer, packed_attention

CANVAS = {"llava": (96, 96), "qwen2_vl": (128, 72)}


@pytest.mark.parametrize("family", CANVAS)
def test_packed_logits_equal_those_of_separate_prompts(family: str) -> None:
    model, processor = untrained(family), build_processor(family)
    packer = Packer(family, *CANVAS[family])
    scene = sample_scene(
        np.random.default_rng(5), width=CANVAS[family][0], height=CANVAS[family][1]
    )
    batch = packer.pack([scene], np.random.default_rng(6))
    rng = np.random.default_rng(6)
    with torch.no_grad():
        hidden = model.model(**batch.inputs, use_cache=False).last_hidden_state
        packed = model.lm_head(hidden)
        for kind, start in zip(packer.slots, packer.starts, strict=True):
            question = ask(scene, kind, rng)
            if question is None:
                assert (batch.labels[0, start : start + 5] == IGNORE).all()
                continue
            inputs, _ = VLM(model, processor).prepare([[scene.image()]], [question.text])
            alone = model(**inputs).logits[0, -1]
            n_words = len(question.text.split()) + 1
            torch.testing.assert_close(packed[0, start + n_words - 1], alone, atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", CANVAS)
def test_packed_attention_equals_attention_with_the_block_mask(family: str) -> None:
    packer, rng = Packer(family, *CANVAS[family]), np.random.default_rng(5)
    scenes = [sample_scene(rng, width=CANVAS[family][0], height=CANVAS[family][1]) for _ in "ab"]
    batch = packer.pack(scenes, rng)
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in batch.inputs.items()}
    masked, packed = untrained(family).double(), untrained(family).double()
    known, states = list(AttentionInterface()), []
    with packed_attention(packed, len(packer.prefix)):
        assert packed.config.text_config._attn_implementation not in known
        for model in (masked, packed):
            hidden = model.model(**inputs, use_cache=False).last_hidden_state
            hidden[batch.labels != IGNORE].square().sum().backward()
            states.append(hidden.detach())
    assert list(AttentionInterface()) == known
    assert packed.config.text_config._attn_implementation == "sdpa"
    torch.testing.assert_close(states[1], states[0], atol=1e-6, rtol=0)
    for ours, theirs in zip(packed.parameters(), masked.parameters(), strict=True):
        if theirs.grad is not None:
            close = 1e-5 * max(1.0, float(theirs.grad.abs().max()))
            torch.testing.assert_close(ours.grad, theirs.grad, atol=close, rtol=0)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path) -> None:
    settings = Settings("llava", steps=2, batch=2, warmup=1, evaluate_every=1)
    whole, first, second = (Trainer(settings) for _ in range(3))
    train(whole, 2)
    train(first, 1)
    first.save(tmp_path)
    assert second.resume(tmp_path)
    train(second, 1)
    for ours, theirs in zip(second.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="was written by a run with the settings"):
        Trainer(Settings("llava", steps=3)).resume(tmp_path)


def train(trainer: Trainer, n_steps: int) -> None:
    with packed_attention(trainer.model, len(trainer.packers[0].prefix)):
        for _ in range(n_steps):
            trainer._train_step()
            trainer.step += 1


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "mllama"])
def test_the_seed_reproduces_the_untrained_weights(family: str) -> None:
    one, two, other = untrained(family), untrained(family), untrained(family, seed=1)
    same = [torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True)]
    differs = [
        not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True)
    ]
    assert all(same)
    assert any(differs)
