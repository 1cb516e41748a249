"""Attention of the answer per segment: system prompt, image, instruction and the answer itself.

Chen et al. 2024 (FastV, arXiv 2403.06764): with ``alpha_qs`` the attention of output token ``q``
summed over segment ``s``,

    lambda_s = sum over q of alpha_qs        epsilon_s = lambda_s / |s|

Every key that is not padding is in one of the four segments. The paper's lambda is a sum over
output tokens and grows with the length of the answer. The mean over output tokens does not; both
are returned. The queries are the positions that predict an output token: the last position of the
prompt, and every generated token that was fed back to the model. (The paper ranks image tokens by
the attention they receive from all other tokens, its code by the last row of one layer. This
function returns neither.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import pandas as pd
import torch

from xmodal_interp.analysis.selection import (
    Layers,
    mass_and_null,
    refuse_cross_attention,
    selected_calls,
)
from xmodal_interp.analysis.tables import Part, call_table, over_samples
from xmodal_interp.arguments import checked
from xmodal_interp.attention import Positions
from xmodal_interp.errors import InputError
from xmodal_interp.sample import Sample, is_visual

SEGMENTS = ("system", "image", "instruction", "output")


@checked
def attention_allocation(
    samples: Sample | Iterable[Sample],
    *,
    layers: Layers = None,
    heads: Positions | None = None,
    workers: int = 1,
) -> pd.DataFrame:
    """Return the attention of the answer per segment, in total and per token (Chen et al. 2024).

    Segments: ``system`` is the prompt up to where the user's turn begins, ``image`` all image and
    video tokens, ``instruction`` the rest of the prompt, ``output`` the generated tokens.

    Args:
        samples: One sample or many.
        layers: Layers, all if not given.
        heads: Heads, all if not given. The paper averages over heads.
        workers: Number of processes that read the samples; results do not depend on it.

    Returns:
        One row per sample, layer, head and segment: ``sample, tower, kind, layer, head, segment``,
        then ``allocation_sum`` (the paper's lambda), ``allocation_mean`` (mean over queries, 0 to
        1), ``efficiency_sum`` (the paper's epsilon, per token of the segment),
        ``efficiency_mean``, ``null`` (the mean allocation if attention were uniform over the
        visible keys), ``lift`` (mean over queries of allocation / null), ``n_tokens``,
        ``n_queries``. NaN for a segment without tokens.

    Raises:
        InputError: The sample has no image, or text attends to the image by cross-attention.
    """

    def table_rows(sample: Sample) -> Iterator[Part]:
        refuse_cross_attention(sample, "The allocation of attention")
        segment = _segments(sample)
        groups = torch.stack([torch.tensor(segment == name) for name in SEGMENTS])
        n_tokens = groups.sum(1)
        queries = torch.arange(sample.last, len(sample))
        for call, chosen in selected_calls(sample, layers, heads):
            mass, null = mass_and_null(call, groups, chosen, queries)
            mass = mass.where(n_tokens > 0, torch.nan)
            values = {
                "allocation_sum": mass.sum(1),
                "allocation_mean": mass.mean(1),
                "efficiency_sum": mass.sum(1) / n_tokens,
                "efficiency_mean": mass.mean(1) / n_tokens,
                "null": null.where(n_tokens > 0, torch.nan).mean(1),
                "lift": (mass / null).nanmean(1),  # 0 / 0 for the first query, which sees no output
                "n_tokens": n_tokens,
                "n_queries": torch.tensor(len(queries)),
            }
            yield call_table(call, {"head": chosen, "segment": SEGMENTS}, values)

    parameters = {"layers": layers, "heads": heads}
    return over_samples(samples, table_rows, "attention_allocation", parameters, workers)


def _segments(sample: Sample) -> np.ndarray:
    """Return the segment of each position; empty for padding."""
    tokens = sample.tokens
    kinds = sample.kinds
    image = is_visual(kinds)
    if not image.any():
        raise InputError(
            f"Sample {sample.name!r} has no image tokens among its {len(sample)} positions. "
            "attention_allocation requires a sample with an image or a video."
        )
    users = image | tokens["role"].eq("user").fillna(value=False).to_numpy(dtype=bool)
    segment = np.full(len(tokens), "instruction", dtype=object)
    segment[: int(users.argmax())] = "system"
    segment[image] = "image"
    segment[sample.n_prompt :] = "output"
    segment[kinds == "padding"] = ""
    return segment
