"""Results do not depend on global precision settings of torch.

``torch.set_float32_matmul_precision("medium")`` multiplies float32 matrices in bfloat16 on the CPU
(torch 2.14.1, oneDNN), ``torch.autocast`` rounds the operands of products, and
``torch.set_default_dtype`` sets the dtype of tensors that are created without one.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn import functional

import xmodal_interp as xi
from tests.helpers.tiny import QUESTION, picture, tiny_vlm
from xmodal_interp.attention import kernels
from xmodal_interp.attention.kernels import full_precision


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def matmul_precision(setting: str) -> Iterator[None]:
    torch.set_float32_matmul_precision(setting)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


SETTINGS = {
    "default bfloat16": lambda: default_dtype(torch.bfloat16),
    "default float64": lambda: default_dtype(torch.float64),
    "products in bfloat16": lambda: matmul_precision("medium"),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}
ANALYSES: list[Callable[[xi.Sample], object]] = [
    xi.cross_modal_ratio,
    xi.attention_entropy,
    xi.attention_distance,
    xi.attention_allocation,
    xi.attention_rollout,
    xi.attention_sinks,
    xi.block_statistics,
    xi.positional_bias,
    xi.raster_map,
    xi.raster_profile,
    xi.recency_index,
]


@pytest.fixture(scope="module")
def sample() -> xi.Sample:
    return xi.capture(xi.load(), picture(), QUESTION, max_new_tokens=3)


@pytest.mark.parametrize("setting", SETTINGS)
def test_tables_are_the_same(sample, setting) -> None:
    for analysis in ANALYSES:
        expected = analysis(sample)
        with SETTINGS[setting]():
            found = analysis(sample)
        assert list(found.columns) == list(expected.columns)
        for name in expected.select_dtypes("number"):
            torch.testing.assert_close(
                torch.tensor(found[name].to_numpy(dtype=float, na_value=float("nan"))),
                torch.tensor(expected[name].to_numpy(dtype=float, na_value=float("nan"))),
                atol=1e-5,
                rtol=1e-5,
                equal_nan=True,
                msg=lambda text, a=analysis, n=name: f"{a.__name__}, {n}: {text}",
            )


@pytest.mark.parametrize("setting", SETTINGS)
def test_probabilities_are_those_of_the_recorded_operands(setting) -> None:
    vlm = tiny_vlm("llava")  # created before, because its weights have the default dtype
    with SETTINGS[setting]():
        sample = xi.capture(vlm, picture(), QUESTION)
        probs = sample.probs(1)
    call = sample.calls["language", "self", 1, 0]
    k = call.k.double().repeat_interleave(call.n_heads // call.n_kv_heads, 1)
    scores = call.q.double() @ k.mT * call.scaling
    scores = scores.masked_fill(~call.visible(), -torch.inf)
    torch.testing.assert_close(probs.double(), scores.softmax(-1)[0], atol=1e-5, rtol=0)


def test_operands_under_autocast_are_those_of_the_kernel() -> None:
    vlm = tiny_vlm("llava")
    seen = []
    kernel = functional.scaled_dot_product_attention

    def spied(query, key, value, *args, **options):
        output = kernel(query, key, value, *args, **options)
        seen.append((query, key, output))
        return output

    functional.scaled_dot_product_attention = spied
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            sample = xi.capture(vlm, picture(), QUESTION, keep=xi.Keep(towers=("language",)))
    finally:
        functional.scaled_dot_product_attention = kernel
    query, _, output = seen[-1]
    assert output.dtype == torch.bfloat16
    call = sample.calls["language", "self", 3, 0]
    assert call.q.dtype == call.k.dtype == torch.bfloat16
    assert torch.equal(call.q, query.bfloat16())
    assert sample.provenance["autocast"] == "bfloat16"
    assert sample.provenance["dtype"] == "float32"  # dtype of the weights
    assert "autocast" not in xi.capture(vlm, picture(), QUESTION).provenance


def test_provenance_states_the_matmul_precision() -> None:
    vlm = tiny_vlm("llava")
    with matmul_precision("medium"):
        sample = xi.capture(vlm, picture(), QUESTION)
    assert sample.provenance["matmul_precision"] == "bf16"


class Padded(nn.Module):
    """``nn.MultiheadAttention`` with a boolean padding mask and a float attention mask."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x, padding, mask):
        return self.attention(x, x, x, key_padding_mask=padding, attn_mask=mask)[0]


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_masks_of_multihead_attention_under_another_default_dtype(dtype) -> None:
    torch.manual_seed(0)
    model, x = Padded().eval(), torch.randn(2, 5, 8)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    mask = torch.zeros(5, 5).masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), -torch.inf)
    probs = []
    for default in (torch.float32, dtype):
        with default_dtype(default), torch.no_grad(), xi.record(model) as recording:
            model(x, padding, mask)
        probs.append(recording.calls[0].probs())
    assert torch.equal(*probs)


def test_full_precision_restores_the_settings() -> None:
    matmul = kernels._BACKENDS[0]
    with matmul_precision("medium"), torch.autocast("cpu", dtype=torch.bfloat16):
        with full_precision():
            assert matmul.fp32_precision == "ieee"
            assert not torch.is_autocast_enabled("cpu")
        assert matmul.fp32_precision == "bf16"
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_float32_matmul_precision() == "medium"
