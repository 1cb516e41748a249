"""Every analysis returns the same numbers for a sample alone and in a padded batch."""

import functools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import xmodal_interp as xi
from tests.helpers.real import real
from tests.helpers.synthetic import grid, random_call, sample_of
from tests.helpers.tiny import QUESTION, picture, tiny_vlm
from xmodal_interp import evaluation
from xmodal_interp.attention import call as call_module
from xmodal_interp.models import VLM, load
from xmodal_interp.sample import Sample

LONGER = "is there a red circle, or a blue square, or anything else to see in this picture ?"
MODELS = {
    "shipped": load,
    "qwen2_vl": lambda: tiny_vlm("qwen2_vl"),
    "paligemma": lambda: VLM(*real("paligemma")),
}
LAYOUTS = {"on the left": "ppp b s vvvv", "in the middle": "b s vvvv ppp"}
KINDS = (*MODELS, *LAYOUTS)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of processors


@functools.cache
def alone_and_padded(kind: str) -> tuple[Sample, Sample]:
    """One sample, alone and as the shorter one of a batch."""
    return bidirectional(LAYOUTS[kind]) if kind in LAYOUTS else captured(MODELS[kind]())


def bidirectional(start: str) -> tuple[Sample, Sample]:
    """Every query, also at padding, sees every key that is not padding."""
    torch.manual_seed(0)
    layout = f"{start} {'t' * 12}"
    held = torch.tensor([letter != "p" for letter in layout.replace(" ", "")])
    whole = [random_call(len(held), layer=layer, causal=False) for layer in range(2)]
    shares = torch.rand(2, 1, len(held))
    calls = [
        replace(call, mask=held.expand(1, 1, len(held), -1), update_share=share)
        for call, share in zip(whole, shares, strict=True)
    ]
    alone = [
        replace(call, q=call.q[:, :, held], k=call.k[:, :, held], update_share=share[:, held])
        for call, share in zip(whole, shares, strict=True)
    ]
    one, other = (
        sample_of(text, of_text, [grid(2, 2)], labels={"box": [0, 0, 10, 20]})
        for text, of_text in ((layout.replace("p", ""), alone), (layout, calls))
    )
    for sample in (one, other):
        sample.tokens.loc[sample.where("image"), ["x0", "y0", "x1", "y1"]] = grid(2, 2).boxes
    other.tokens.loc[held.numpy(), "token"] = one.tokens["token"].to_numpy()
    return one, other


def captured(vlm: VLM) -> tuple[Sample, Sample]:
    """A sample captured alone, and with a longer one."""
    keep = xi.Keep(norms=True, towers=("language",))
    images = [[picture(seed=1)], [picture(seed=2)]]
    alone = xi.capture_batch(vlm, images[:1], [QUESTION], keep=keep)[0]
    padded = xi.capture_batch(vlm, images, [QUESTION, LONGER], keep=keep)[0]
    grid = alone.grids[0]
    for sample in (alone, padded):
        sample.labels["box"] = np.nan_to_num(grid.boxes[grid.n_tokens // 2]).tolist()
    return alone, padded


ANALYSES: dict[str, Callable[[Sample], pd.DataFrame]] = {
    "allocation": xi.attention_allocation,
    "blocks": xi.block_statistics,
    "distance": lambda sample: xi.attention_distance(sample, tower="language"),
    "entropy": xi.attention_entropy,
    "pointing": evaluation.pointing_hits,
    "positional": xi.positional_bias,
    "raster map": xi.raster_map,
    "raster profile": xi.raster_profile,
    "raster bias": xi.raster_bias,
    "ratio": lambda sample: xi.cross_modal_ratio(sample, sink_threshold=0.1),
    "recency": lambda sample: xi.recency_index(sample, window=8),
    "rollout": lambda sample: xi.attention_rollout(sample, baseline="uniform"),
    "rollout by norms": lambda sample: xi.attention_rollout(
        sample, alpha="norm", sinks="drop_first"
    ),
    "rollout, discarding": lambda sample: xi.attention_rollout(sample, discard=0.9),
    "sinks": lambda sample: xi.attention_sinks(sample, threshold=0.1),
    "sinks of the first positions": lambda sample: xi.attention_sinks(
        sample, threshold=0.1, n_positions=64
    ),
    "sink rate": lambda sample: xi.sink_rate(sample, threshold=0.1, n_positions=64),
    "summary": xi.cross_modal_summary,
    "tokens": xi.token_ratio,
}


def comparable(table: pd.DataFrame, sample: Sample) -> pd.DataFrame:
    """The table without rows of padding, with positions counted without padding."""
    place = np.cumsum(sample.tokens["kind"].ne("padding").to_numpy(dtype=bool)) - 1
    if "token_kind" in table:
        table = table[table["token_kind"].ne("padding")].reset_index(drop=True)
    positions = [name for name in ("query", "key") if name in table]
    return table.assign(**{name: place[table[name]] for name in positions})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ANALYSES)
def test_padding_changes_no_number(name: str, kind: str) -> None:
    alone, padded = alone_and_padded(kind)
    assert len(padded.where("padding")) > len(alone.where("padding"))
    tables = [comparable(ANALYSES[name](sample), sample) for sample in (alone, padded)]
    pd.testing.assert_frame_equal(*tables, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("analysis", ANALYSES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_fused_kernel_gives_the_same_table(
    kind: str, analysis: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long calls are computed by the fused kernel, short ones from their probabilities."""
    for sample in alone_and_padded(kind):
        exact = ANALYSES[analysis](without_memo(sample))
        with monkeypatch.context() as patched:
            patched.setattr(call_module, "SMALL_CELLS", 0)
            fused = ANALYSES[analysis](without_memo(sample))
        pd.testing.assert_frame_equal(fused, exact, rtol=1e-5, atol=5e-6)


def without_memo(sample: Sample) -> Sample:
    """The sample with copies of its calls, for which nothing was computed yet."""
    return replace(sample, calls={key: replace(call) for key, call in sample.calls.items()})
