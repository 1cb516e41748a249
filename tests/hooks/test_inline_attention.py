"""Attention that bypasses the interface is recorded with the same exactness."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import BlipConfig, BlipForConditionalGeneration, SiglipVisionConfig
from transformers import SiglipVisionModel as Siglip

from xmodal_interp.hooks import record
from xmodal_interp.hooks.inline_attention import CHUNKED_NOTE, DENSE_NOTE
from xmodal_interp.hooks.torch_attention import KERNEL_NOTE

HEADS, WIDTH = 2, 8


def multihead(**options) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(WIDTH, HEADS, **options).eval()
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(torch.randn(weight.shape))
    return module


def masks(kind: str):
    hidden = torch.ones(3, 5).triu(2)
    given = {
        "none": {},
        "bool": {"attn_mask": hidden.bool()},
        "additive": {"attn_mask": torch.randn(2 * HEADS, 3, 5)},
        "padding": {"key_padding_mask": torch.tensor([[0, 0, 0, 0, 0], [1, 0, 0, 1, 0]]).bool()},
    }
    both = {**given["bool"], **given["padding"]}
    return {**given, "both": both}[kind]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", ["none", "bool", "additive", "padding", "both"])
@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"kdim": 6, "vdim": 4}, {"add_bias_kv": True}]
)
def test_multihead_attention_of_torch(options, kind, batch_first) -> None:
    module = multihead(batch_first=batch_first, **options)
    key = torch.randn(2, 5, options.get("kdim", WIDTH))
    value = torch.randn(2, 5, options.get("vdim", WIDTH))
    operands = [torch.randn(2, 3, WIDTH), key, value]
    if not batch_first:
        operands = [t.transpose(0, 1) for t in operands]
    hidden = masks(kind)
    plain, weights = module(*operands, average_attn_weights=False, **hidden)
    with torch.no_grad(), record(nn.Sequential(module)) as recording:
        recorded = module(*operands, average_attn_weights=False, **hidden)[0]
    assert torch.equal(plain, recorded)
    (call,) = recording.calls
    torch.testing.assert_close(call.probs(), weights, atol=1e-6, rtol=0)
    assert call.note == KERNEL_NOTE


class DirectAttention(nn.Module):
    """Calls the kernel or a softmax directly, with heads in a separate axis or in the batch."""

    num_attention_heads = HEADS

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.projection = way, nn.Linear(4, 4)
        self.probs: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k = 3 * self.projection(x), x
        if self.way == "kernel":
            return functional.scaled_dot_product_attention(q, k, x, is_causal=True, scale=0.7)
        scores = q @ k.transpose(-1, -2)
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -1e9)
        softmax = {
            "torch": lambda: torch.softmax(scores, -1),
            "method": lambda: scores.softmax(dim=-1),
            "functional": lambda: functional.softmax(scores, dim=-1),
            "module": lambda: nn.Softmax(dim=-1)(scores),
        }
        self.probs = softmax[self.way]()
        return self.probs @ x


def expected(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    scores = scale * q @ k.transpose(-1, -2)
    return scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf).softmax(-1)


@pytest.mark.parametrize("way", ["kernel", "torch", "method", "functional", "module"])
@pytest.mark.parametrize("folded", [False, True])
def test_a_direct_kernel_call_and_an_inline_softmax(way, folded) -> None:
    module = DirectAttention(way)
    x = torch.randn(3, HEADS, 5, 4)
    given = x.flatten(0, 1) if folded else x
    with torch.no_grad():
        plain = module(given)
        with record(nn.Sequential(module)) as recording:
            recorded = module(given)
    assert torch.equal(plain, recorded)
    (call,) = recording.calls
    scale = 0.7 if way == "kernel" else 1.0
    with torch.no_grad():
        probs = expected(3 * module.projection(x), x, scale)
    torch.testing.assert_close(call.probs(), probs, atol=1e-6, rtol=0)
    assert call.visible()[0, 0].equal(torch.ones(5, 5).tril().bool())
    assert call.note == (KERNEL_NOTE if way == "kernel" else DENSE_NOTE)
    assert (call.q is None) == (way != "kernel")


def test_chunks_and_rows_without_visible_keys() -> None:
    class ChunkedAttention(DirectAttention):
        def forward(self, scores: torch.Tensor) -> torch.Tensor:
            return (self.projection(scores) * 0 + scores).softmax(-1)

    scores = torch.zeros(1, HEADS, 3, 2, 4)
    scores[0, 0, 1, 1] = torch.finfo(torch.float32).min
    module = ChunkedAttention("chunked")
    with torch.no_grad(), record(nn.Sequential(module)) as recording:
        module(scores)
    (call,) = recording.calls
    assert (call.n_heads, call.n_queries, call.n_keys) == (HEADS, 6, 4)
    assert call.note == CHUNKED_NOTE
    empty = call.probs().isnan().all(-1)[0]
    assert empty[0].tolist() == [False, False, False, True, False, False]
    assert not empty[1].any()


def test_the_pooling_head_of_siglip() -> None:
    config = SiglipVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        image_size=8,
        patch_size=2,
    )
    model = Siglip(config).eval()
    pixels = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        plain = model(pixels).pooler_output
        with record(model) as recording:
            recorded = model(pixels).pooler_output
    assert torch.equal(plain, recorded)
    shapes = [(c.kind, c.layer, c.n_samples, c.n_queries, c.n_keys) for c in recording.calls]
    assert shapes == [("self", 0, 2, 16, 16), ("self", 1, 2, 16, 16), ("cross", 0, 2, 1, 16)]


def test_probabilities_of_a_model_without_the_interface_are_recorded() -> None:
    """BLIP has an inline softmax in vision, text and cross-attention."""
    small = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS}
    config = BlipConfig(
        text_config={**small, "vocab_size": 20, "encoder_hidden_size": WIDTH, "bos_token_id": 1},
        vision_config={**small, "image_size": 8, "patch_size": 4, "intermediate_size": 16},
    )
    torch.manual_seed(0)
    model = BlipForConditionalGeneration(config).eval()
    inputs = {"pixel_values": torch.randn(2, 3, 8, 8), "input_ids": torch.randint(4, 20, (2, 5))}
    with torch.no_grad():
        plain = model(**inputs, output_attentions=True)
        with record(model) as recording:
            recorded = model(**inputs)
    assert torch.equal(plain.image_embeds, recorded.image_embeds)
    of_vision = [call for call in recording.calls if call.tower == "vision"]
    for call, weights in itertools.zip_longest(of_vision, plain.attentions):
        torch.testing.assert_close(call.probs(), weights, atol=1e-6, rtol=0)
    kinds = [(call.tower, call.kind, call.layer) for call in recording.calls]
    assert kinds[2:] == [
        ("language", "self", 0),
        ("language", "cross", 0),
        ("language", "self", 1),
        ("language", "cross", 1),
    ]


def test_recomputation_of_checkpoints_is_not_recorded() -> None:
    from tests.helpers.tiny import QUESTION, picture, tiny_vlm

    vlm = tiny_vlm("llava")
    inputs = vlm.prepare([[picture()]], [QUESTION])[0]
    vlm.model.train()
    vlm.model.activation_checkpointing_enable()
    try:
        with record(vlm.model, towers=["language"]) as recording:
            vlm.model(**inputs, use_cache=False).logits.sum().backward()
    finally:
        vlm.model.activation_checkpointing_disable()
        vlm.model.eval()
        vlm.model.zero_grad()
    assert [call.layer for call in recording.calls] == [0, 1, 2, 3]


@pytest.mark.parametrize("inside", [False, True], ids=["alone", "in a holder"])
def test_reduce_may_call_the_functions_that_the_model_calls(inside) -> None:
    """The kernel and the softmax that ``reduce`` calls are not recorded as calls of the model."""

    class HoldingAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.projection = DirectAttention("kernel"), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.projection(self.inner(x))

    model, x = nn.Sequential(DirectAttention("kernel")), torch.randn(1, HEADS, 5, 4)
    if inside:
        model = nn.Sequential(HoldingAttention())
    groups = torch.eye(5, dtype=torch.bool)

    def reduced(call):
        torch.ones(1, HEADS, 5, 5).softmax(-1)
        return call.mass(groups)

    with torch.no_grad(), record(model) as kept:
        model(x)
    with torch.no_grad(), record(model, reduce=reduced) as recording:
        model(x)
    (mass,), (call,) = recording.results, kept.calls
    torch.testing.assert_close(mass, call.probs(), atol=1e-6, rtol=0)
