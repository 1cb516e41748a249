"""Torch's own attention modules are recorded, and recording does not change their outputs.

torch 2.14.1: ``nn.MultiheadAttention.forward`` and ``nn.TransformerEncoder.forward`` do not use
their fused path if a ``TorchFunctionMode`` is active (``torch.overrides.has_torch_function``), and
``nn.TransformerEncoderLayer.forward`` does not if any of its modules has a hook. In evaluation mode
the encoder converts a padded batch to a nested tensor, which only the fused path accepts.
"""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import xmodal_interp as xi
from tests.helpers.model_types import tiny
from xmodal_interp.attention import AttentionCall
from xmodal_interp.errors import CaptureError
from xmodal_interp.hooks import attention_modules, record

HEADS, WIDTH, LAYERS = 2, 8, 2


def encoder(**options) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, batch_first=True, **options)
    return nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=not options).eval()


def padding(*lengths: int, side: str = "right") -> Tensor:
    places = torch.arange(max(lengths))
    rows = [places >= n if side == "right" else places < max(lengths) - n for n in lengths]
    return torch.stack(rows)


def expected(model: nn.TransformerEncoder, x: Tensor, hidden: Tensor | None) -> list[Tensor]:
    """Return the probabilities of each layer, computed by the unfused function of torch."""
    found = []
    for layer in model.layers:
        attention = layer.self_attn
        states = layer.norm1(x) if layer.norm_first else x
        found.append(
            attention(
                *(states, states.clone(), states),
                hidden,
                need_weights=True,
                average_attn_weights=False,
            )[1]
        )
        x = layer(x, src_key_padding_mask=hidden)
    return found


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # torch uses them itself
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["whole", "nested", "left", "norm_first"])
def test_an_encoder_is_recorded_without_changes(kind, dtype) -> None:
    model = encoder(**({"norm_first": True} if kind == "norm_first" else {})).to(dtype)
    x = torch.randn(2, 5, WIDTH).to(dtype)
    hidden = {
        "whole": None,
        "nested": padding(5, 3),
        "left": padding(5, 3, side="left"),
        "norm_first": padding(5, 3),
    }[kind]
    with torch.no_grad():
        alone = model(x, src_key_padding_mask=hidden)
        with record(model) as recording:
            assert torch.equal(model(x, src_key_padding_mask=hidden), alone)
        if kind == "nested":
            assert not alone[1, 3:].any()  # shows that the fused path ran on a nested tensor
        probs = expected(model, x, hidden)
    assert [(c.kind, c.layer, c.module) for c in recording.calls] == [
        ("self", i, f"layers.{i}.self_attn") for i in range(LAYERS)
    ]
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    for call, wanted in zip(recording.calls, probs, strict=True):
        ours = call.probs()
        real = torch.ones(2, 5, dtype=torch.bool) if hidden is None else ~hidden
        rows = real[:, None, :, None].expand_as(ours)
        torch.testing.assert_close(ours[rows], wanted.float()[rows], atol=limit, rtol=0)
        if kind == "nested":  # padding positions do not exist in the nested tensor
            assert ours[1, :, 3:].isnan().all()
            assert not call.visible()[1, :, :, 3:].any()


def test_modules_of_torch_get_no_hooks() -> None:
    model = encoder()
    with record(model):
        hooks = [m for m in model.layers.modules() if m._forward_hooks or m._forward_pre_hooks]
        assert hooks == []
        with xi.intervene(model):
            assert not any(m._forward_pre_hooks for m in model.layers.modules())
    assert not any("forward" in vars(module) for module in model.modules())


class ResidualAttentionBlock(nn.Module):
    """The block of open_clip's image tower: named attention, with torch's attention inside."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.mlp = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x, x, x, need_weights=False)[0]
        return x + self.mlp(x).softmax(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_path_runs_inside_a_module_that_is_named_attention(dtype, monkeypatch) -> None:
    model = nn.Sequential(*(ResidualAttentionBlock() for _ in range(3))).to(dtype).eval()
    x = torch.randn(2, 5, WIDTH).to(dtype)
    fused = torch._native_multi_head_attention
    ran = []
    monkeypatch.setattr(
        torch, "_native_multi_head_attention", lambda *args: ran.append(1) or fused(*args)
    )
    with torch.no_grad():
        alone = model(x)
        with record(model) as recording:
            assert torch.equal(model(x), alone)
        wanted = model[0].attn(x, x.clone(), x, average_attn_weights=False)[1]
    assert len(ran) == 6
    assert [call.module for call in recording.calls] == [f"{i}.attn" for i in range(3)]
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(recording.calls[0].probs(), wanted.float(), atol=limit, rtol=0)


class AttentionPool2d(nn.Module):
    """The pooling of CLIP's ResNets, which calls torch's function with its own weights."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "c_proj"):
            self.add_module(name, nn.Linear(WIDTH, WIDTH))

    def pooled(self, x: Tensor, *, need_weights: bool) -> tuple[Tensor, Tensor | None]:
        x = x.flatten(2).permute(2, 0, 1)
        x = torch.cat([x.mean(0, keepdim=True), x])
        biases = torch.cat([self.q_proj.bias, self.k_proj.bias, self.v_proj.bias])
        return functional.multi_head_attention_forward(
            *(x[:1], x, x, WIDTH, HEADS, None, biases, None, None, False, 0.0),
            *(self.c_proj.weight, self.c_proj.bias),
            use_separate_proj_weight=True,
            q_proj_weight=self.q_proj.weight,
            k_proj_weight=self.k_proj.weight,
            v_proj_weight=self.v_proj.weight,
            need_weights=need_weights,
            average_attn_weights=False,
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.pooled(x, need_weights=False)[0]


def test_a_direct_call_of_torchs_multihead_function() -> None:
    model, x = nn.Sequential(AttentionPool2d()).eval(), torch.randn(2, WIDTH, 2, 3)
    with torch.no_grad():
        alone = model(x)
        with record(model, values=True) as recording:
            assert torch.equal(model(x), alone)
        wanted = model[0].pooled(x, need_weights=True)[1]
    (call,) = recording.calls
    assert (call.kind, call.n_queries, call.n_keys) == ("cross", 1, 7)
    torch.testing.assert_close(call.probs(), wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("need_weights", [True, False])
def test_a_causal_hint_has_the_same_meaning_as_in_torch(need_weights) -> None:
    """Without weights and padding, torch 2.14 uses the hint instead of the mask."""
    model = nn.Sequential(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True))
    x, hidden = torch.randn(1, 4, WIDTH), torch.zeros(4, 4).bool()
    options = {"attn_mask": hidden, "is_causal": True, "need_weights": need_weights}
    with torch.no_grad(), record(model, values=True) as recording:
        output = model[0](x, x.clone(), x, **options)[0]
    (call,) = recording.calls
    assert call.visible()[0, 0].all() == need_weights
    mixed = (call.probs() @ call.v).transpose(1, 2).flatten(2)
    with torch.no_grad():
        torch.testing.assert_close(model[0].out_proj(mixed), output, atol=1e-5, rtol=0)


def test_a_subclass_that_computes_its_own_softmax() -> None:
    class Sharper(nn.MultiheadAttention):
        def forward(self, x: Tensor) -> tuple[Tensor, None]:
            q, k, v = functional.linear(x, self.in_proj_weight).chunk(3, -1)
            return (3 * q @ k.transpose(-1, -2)).unsqueeze(1).softmax(-1) @ v[:, None], None

    model, x = nn.Sequential(Sharper(WIDTH, 1)), torch.randn(1, 4, WIDTH)
    with torch.no_grad(), record(model) as recording:
        model(x)
        q, k, _ = functional.linear(x, model[0].in_proj_weight).chunk(3, -1)
    (call,) = recording.calls
    torch.testing.assert_close(call.probs()[:, 0], (3 * q @ k.transpose(-1, -2)).softmax(-1))


def reduced(call: AttentionCall) -> None:
    raise ZeroDivisionError(call.name)


def test_an_error_of_recording_does_not_end_the_forward(monkeypatch) -> None:
    made = tiny("siglip")
    with torch.no_grad():
        alone = made.model(**made.inputs).logits_per_image

        def run(**options) -> None:
            with record(made.model, **options):
                assert torch.equal(made.model(**made.inputs).logits_per_image, alone)
                ended.append(True)

        ended: list[bool] = []
        with pytest.raises(ZeroDivisionError, match="layer 0"):
            run(reduce=reduced)
        failing = "xmodal_interp.hooks.recorder.multihead_call"
        monkeypatch.setattr(failing, lambda *_: [][0])
        with pytest.raises(CaptureError, match="recording its attention failed with IndexError: "):
            run()
    assert ended == [True, True]


def test_blocks_can_be_exited_in_another_order() -> None:
    made = tiny("siglip")
    one, two = record(made.model), record(made.model)
    first, second = one.__enter__(), two.__enter__()
    with torch.no_grad():
        made.model(**made.inputs)
        one.__exit__(None, None, None)
        made.model(**made.inputs)
        two.__exit__(None, None, None)
        made.model(**made.inputs)
    assert len(first.calls) == len(attention_modules(made.model))
    assert len(second.calls) == 2 * len(first.calls)
