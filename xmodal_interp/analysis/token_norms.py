"""Norms of hidden states: the test for tokens with artefacts.

Darcet et al. 2023 (arXiv 2309.16588) find that large Vision Transformers without registers turn a
few patches of low information into storage: after the middle layers, the norm of their hidden state
is about ten times that of the other patches. ``norm`` is the Euclidean norm of a token's hidden
state after the block of a layer, before any final norm of the model, and ``ratio`` is this norm
divided by the median norm of the patches (in the language tower: of all tokens) in this layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import pandas as pd

from xmodal_interp.analysis.selection import (
    Layers,
    counted_positions,
    position_columns,
    position_table,
    selected_calls,
    visual_number,
)
from xmodal_interp.analysis.tables import Part, over_samples
from xmodal_interp.arguments import checked
from xmodal_interp.errors import InputError, NotRecordedError
from xmodal_interp.sample import Sample, is_visual
from xmodal_interp.vocabulary import Tower


@checked
def token_norms(
    samples: Sample | Iterable[Sample],
    *,
    tower: Tower | None = None,
    layers: Layers = None,
    image: int = 0,
    workers: int = 1,
) -> pd.DataFrame:
    """Return the norm of each token's hidden state after each layer (Darcet et al. 2023).

    Args:
        samples: One sample or many, captured with ``Keep(norms=True)``.
        tower: ``"language"`` or ``"vision"``; ``Sample.tower`` if not given.
        layers: Layers, all if not given.
        image: Index of the image in the vision tower; videos are numbered after the images.
        workers: Number of processes that read the samples; results do not depend on it.

    Returns:
        One row per sample, layer and position that is not padding: ``sample, tower, kind, layer,
        position, token, token_kind, image, row, col, video, frame``, then ``norm`` (Euclidean norm
        of the hidden state after the block) and ``ratio`` (norm divided by the median over the
        patches of the layer, or over all its tokens in the language tower).

    Raises:
        InputError: The tower is neither ``"language"`` nor ``"vision"``.
        NotRecordedError: Norms were not kept.
    """
    if tower not in (None, "language", "vision"):
        raise InputError(
            f"token_norms is not defined for tower={tower!r}. Choose 'language' or 'vision'."
        )

    def table_rows(sample: Sample) -> Iterator[Part]:
        of = tower or sample.tower
        number = visual_number(sample, of, image)
        for call, _ in selected_calls(sample, layers, tower=of, call=number):
            if call.token_norm is None:
                raise NotRecordedError(
                    f"{call.name} was captured without token norms. Capture with Keep(norms=True)."
                )
            table = position_table(sample, of, image, call.n_keys)
            counted = counted_positions(sample, of, image, call.n_keys)
            rows = call.query_positions.cpu()
            present = counted[rows]
            positions = rows[present].numpy()
            norm = call.token_norm[0].cpu().double().numpy()[present.numpy()]
            kinds = table["token_kind"].to_numpy(dtype=object)[positions]
            usual = is_visual(kinds) if of == "vision" else np.ones(len(kinds), dtype=bool)
            yield {
                **{"tower": call.tower, "kind": call.kind, "layer": call.layer},
                "position": positions,
                **position_columns(table, positions),
                "norm": norm,
                "ratio": norm / np.median(norm[usual]),
            }

    parameters = {"tower": tower, "layers": layers, "image": image}
    return over_samples(samples, table_rows, "token_norms", parameters, workers)
