"""The share of attention in each token's update equals norms measured by separate hooks."""

import numpy as np
import pytest
import torch
from torch.overrides import _get_current_function_mode_stack

from tests.helpers.real import asked, real, settled
from tests.helpers.tiny import QUESTION, picture, tiny_vlm
from xmodal_interp.analysis import rollout_matrix
from xmodal_interp.capturing.run import Keep, capture, capture_batch
from xmodal_interp.errors import CaptureError, InputError
from xmodal_interp.hooks import record
from xmodal_interp.models import VLM
from xmodal_interp.store import StoreWriter, open_store

NORMS = Keep(norms=True)


def measured_shares(model, run) -> dict[str, list[torch.Tensor]]:
    """Return ``|u| / (|u| + |x|)`` of every block with a ``self_attn`` or ``attn``, run by run.

    ``u`` is the output of the attention, times the block's gate if it has one.
    """
    shares: dict[str, list[torch.Tensor]] = {}
    handles = []
    for name, block in model.named_modules():
        attention = getattr(block, "self_attn", None) or getattr(block, "attn", None)
        if attention is None:
            continue
        entered: list[torch.Tensor] = []

        def enter(_, args, options, entered=entered):
            entered.append(args[0] if args else options["hidden_states"])

        def leave(_, __, output, name=name, entered=entered, block=block):
            o = output[0] if isinstance(output, tuple) else output
            if getattr(block, "is_gated", False):
                o = o * block.gate_attn.tanh()
            o = o.norm(dim=-1)
            x = entered[-1].norm(dim=-1)
            shares.setdefault(name, []).append(o / (o + x))

        handles.append(block.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(attention.register_forward_hook(leave))
    run()
    for handle in handles:
        handle.remove()
    return shares


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "mllama"])
def test_shares_equal_norms_measured_by_hooks(family) -> None:
    vlm = tiny_vlm(family)
    inputs, _ = vlm.prepare([[picture()]], [QUESTION])
    with torch.no_grad():
        measured = measured_shares(vlm.model, lambda: vlm.model(**inputs))
        plain = vlm.model(**inputs).logits
        with record(vlm.model, norms=True) as recording:
            recorded = vlm.model(**inputs).logits
    assert torch.equal(plain, recorded)
    checked = 0
    for call in recording.calls:
        assert call.update_share.shape == (call.n_samples, call.n_queries)
        (share,) = measured.get(call.module.rpartition(".")[0], [None])
        if share is not None:
            torch.testing.assert_close(call.update_share.flatten(), share.flatten())
            checked += 1
    assert checked >= 4


AFTER_ADDITION = {
    ("gemma3", "language"): "pre_feedforward_layernorm",  # a norm after the attention
    ("gemma4", "language"): "pre_feedforward_layernorm",
    ("glm4v", "language"): "post_attention_layernorm",
    ("granite_docling", "language"): "post_attention_layernorm",  # a multiplier of .263
    ("internvl", "vision"): "layernorm_after",  # layer scale
    ("llama4", "vision"): "post_attention_layernorm",  # the block's argument is hidden_state
    ("llava", "language"): "post_attention_layernorm",
    ("minimax_m3_vl", "vision"): "layer_norm2",
}
"""The module of a block whose input is the residual stream after the attention's update."""


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("name", "tower"), AFTER_ADDITION)
def test_the_update_is_the_step_of_the_residual_stream(name: str, tower: str) -> None:
    """The update, with its norm, multiplier or layer scale, is the difference of the stream."""
    vlm = VLM(real(name)[0], settled(name))
    inputs, _ = vlm.prepare([[picture()]], [asked(vlm, 1)])
    before: dict[str, torch.Tensor] = {}
    after: dict[str, torch.Tensor] = {}
    handles = []
    for path, block in vlm.model.named_modules():
        next_norm = getattr(block, AFTER_ADDITION[name, tower], None)
        if next_norm is None:
            continue

        def enter(_, args, options, path=path):
            before[path] = first_tensor(args, options).clone()

        def reach(_, args, options, path=path):
            after[path] = first_tensor(args, options).clone()

        handles.append(block.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(next_norm.register_forward_pre_hook(reach, with_kwargs=True))
    with torch.no_grad():
        plain = vlm.model(**inputs).logits
        with record(vlm.model, towers=[tower], norms=True) as recording:
            assert torch.equal(vlm.model(**inputs).logits, plain)
    for handle in handles:
        handle.remove()
    assert len(recording.calls) >= 2
    for call in recording.calls:
        path = next(path for path in before if call.module.startswith(f"{path}."))
        x = before[path]
        u = after[path] - x
        share = u.norm(dim=-1) / (u.norm(dim=-1) + x.norm(dim=-1))
        found = call.update_share.flatten()
        torch.testing.assert_close(found, share.flatten(), atol=1e-5, rtol=0)


def first_tensor(args: tuple, options: dict) -> torch.Tensor:
    return args[0] if args else next(v for v in options.values() if isinstance(v, torch.Tensor))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_post_norm_blocks_add_a_projection_to_the_attentions_input() -> None:
    """A Q-Former computes ``LayerNorm(dense(o) + x)``, also for its cross-attention."""
    vlm = VLM(real("blip-2")[0], settled("blip-2"))
    inputs, _ = vlm.prepare([[picture()]], [asked(vlm, 1)])
    expected: dict[str, torch.Tensor] = {}

    def reach(module, args, path):
        u, x = module.dense(args[0]).norm(dim=-1), args[1].norm(dim=-1)
        expected[path] = u / (u + x)

    handles = [
        module.register_forward_pre_hook(lambda m, a, p=path: reach(m, a, p))
        for path, module in vlm.model.named_modules()
        if type(module).__name__ == "Blip2QFormerSelfOutput"
    ]
    with torch.no_grad(), record(vlm.model, towers=["connector"], norms=True) as recording:
        vlm.model(**inputs)
    for handle in handles:
        handle.remove()
    kinds = [call.kind for call in recording.calls]
    assert kinds.count("self") == 2
    assert kinds.count("cross") == 1
    for call in recording.calls:
        share = expected[f"{call.module.rpartition('.')[0]}.output"]
        torch.testing.assert_close(call.update_share, share, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_pooling_head_without_a_residual_stream_is_refused() -> None:
    vlm = VLM(real("gemma3")[0], settled("gemma3"))
    question = asked(vlm, 1)
    with pytest.raises(CaptureError) as refusal:
        capture(vlm, picture(), question, keep=NORMS)
    assert str(refusal.value) == (
        "norms=True requires that the output of attention is added to the residual stream, but no "
        "addition was found for model.vision_tower.head.attention, the first of 1 such layers "
        "(vision). Record the other towers alone: Keep(norms=True, towers=('language',))."
    )
    sample = capture(vlm, picture(), question, keep=Keep(norms=True, towers=("language",)))
    assert all(call.update_share is not None for call in sample.calls.values())


def test_function_modes_are_exited_after_a_failing_forward() -> None:
    vlm = tiny_vlm("llava")
    inputs, _ = vlm.prepare([[picture()]], [QUESTION])
    mlp = vlm.model.get_decoder().layers[1].mlp

    def fail(*_):
        raise ZeroDivisionError

    handle = mlp.register_forward_pre_hook(fail)
    before = len(_get_current_function_mode_stack())
    with record(vlm.model, norms=True):
        with pytest.raises(ZeroDivisionError):
            vlm.model(**inputs)
        assert len(_get_current_function_mode_stack()) == before
    handle.remove()


def test_a_row_per_token_in_generation_a_batch_and_a_store(tmp_path) -> None:
    vlm = tiny_vlm("llava")
    alone = capture(vlm, picture(), QUESTION, max_new_tokens=3, keep=NORMS)
    without = capture(
        vlm, picture(), QUESTION, max_new_tokens=3, keep=NORMS, generation={"use_cache": False}
    )
    images, prompts = (
        [[picture(seed=1)], [picture()]],
        ["Look, how many shapes are here?", QUESTION],
    )
    together = capture_batch(vlm, images, prompts, max_new_tokens=3, keep=NORMS)[1]
    for layer in alone.layers():
        share = alone.call(layer).update_share
        assert share.shape == (1, alone.call(layer).n_queries)
        assert ((share > 0) & (share < 1)).all()
        n = share.shape[1]
        torch.testing.assert_close(without.call(layer).update_share[:, :n], share)
        n_padding = int(together.tokens["kind"].eq("padding").sum())
        assert n_padding > 0
        padded = together.call(layer).update_share[:, n_padding:]
        torch.testing.assert_close(padded[:, :n], share, atol=1e-5, rtol=1e-4)
    with StoreWriter(tmp_path / "s", settings={}) as writer:
        writer.write(alone)
    stored = open_store(tmp_path / "s")[0]
    expected = rollout_matrix(alone, alpha="norm")
    assert not np.allclose(expected, rollout_matrix(alone), atol=1e-2)
    torch.testing.assert_close(rollout_matrix(stored, alpha="norm"), expected)


def test_norms_and_reduce_exclude_each_other() -> None:
    vlm = tiny_vlm("llava")
    with (
        pytest.raises(InputError, match="Pass one of them"),
        record(vlm.model, norms=True, reduce=lambda call: call.n_bytes),
    ):
        pass
