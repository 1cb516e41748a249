"""Rollout through the connector: the share of each image patch in each learned-query token.

The output tokens of a Q-Former, a perceiver or a resampler have no row and column: each attends to
the whole image by cross-attention. Rollout (Abnar & Zuidema 2020, arXiv 2005.00928) through the
connector's layers, in the order in which they ran, computes the share of each patch in each token.
With ``S`` the ``[query, patch]`` matrix of shares, initially 0:

    self-attention    S <- alpha A S            + (1 - alpha) S
    cross-attention   S <- alpha (A_p + A_l S)  + (1 - alpha) S

``A`` is the mean over heads, ``A_p`` its columns of patches, ``A_l`` its columns of learned
queries (in a perceiver the learned queries are keys too, after the patches). Each row of the
result is scaled to sum to 1, which removes the part from the learned query embedding and from the
words of the question.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from xmodal_interp.analysis.tables import samples_of
from xmodal_interp.arguments import checked, real_number
from xmodal_interp.attention import AttentionCall
from xmodal_interp.attention.kernels import full_precision
from xmodal_interp.errors import GeometryError, InputError, NotRecordedError, quoted
from xmodal_interp.models import ImageGrid
from xmodal_interp.sample import Sample


@checked
@full_precision()
def query_patches(
    sample: Sample, image: int = 0, *, alpha: float = 0.5
) -> Float[Tensor, "token patch"]:
    """Return the share of each vision patch in each image token, for learned-query tokens.

    Args:
        sample: A sample of a model whose image tokens are learned queries, with all calls of its
            connector.
        image: Index of the image.
        alpha: Weight of attention in each layer, 0 to 1; the residual stream has 1 - alpha. The
            rollout paper uses 0.5. If the connector is a single cross-attention, the result is the
            same for every alpha above 0.

    Returns:
        A float64 tensor. Patches are in the order of ``sample.grids[image].patch_places``,
        including the class token. Rows sum to 1, or are NaN if the token gets nothing from the
        image.

    Raises:
        GeometryError: The image tokens have a row and column, the patches have no row and column,
            or the keys of the connector's attention are not these patches.
        InputError: The image does not exist, or alpha is outside 0 to 1.
        NotRecordedError: Some layers of the connector were not kept.
    """
    alpha = real_number(alpha, "alpha", 0, 1)
    (sample,) = samples_of([sample])
    grid, calls = _grid(sample, image), _calls(sample, image)
    n_patches = len(grid.patch_places)
    shares = torch.zeros(max(call.n_queries for call in calls), n_patches, dtype=torch.float64)
    for call in calls:
        n = call.n_queries
        probs = call.on_float64_device().probs(dtype=torch.float64)[0].nan_to_num().mean(0).cpu()
        attended = probs @ shares[:n] if call.kind == "self" else _across(call, probs, shares[:n])
        shares[:n] = alpha * attended + (1 - alpha) * shares[:n]
    if len(shares) < grid.n_tokens:
        raise GeometryError(
            f"Image {image} has {grid.n_tokens} tokens, but {calls[0].name} has "
            f"{calls[0].n_queries} queries. Every image token must be a query of the connector."
        )
    of_tokens = shares[: grid.n_tokens]
    return of_tokens / of_tokens.sum(1, keepdim=True)


@checked
@full_precision()
def on_patches(
    sample: Sample,
    values: Tensor | np.ndarray,
    image: int = 0,
    *,
    view: str = "image",
    alpha: float = 0.5,
) -> Float[np.ndarray, "row col"]:
    """Distribute values on learned-query tokens over the image patches.

    The result is ``values @ query_patches(sample, image)``, arranged as a grid.

    Args:
        sample: As for :func:`query_patches`.
        values: ``[token]``, such as the attention of a text token on each image token. The sum is
            preserved over both views and the class token together.
        image: Index of the image.
        view: ``"image"``, or ``"thumbnail"`` for models that also encode a downscaled copy of the
            image.
        alpha: As for :func:`query_patches`.

    Returns:
        The grid of patches, NaN where there is no patch.

    Raises:
        GeometryError: As for :func:`query_patches`, or ``values`` has the wrong length.
        InputError: ``values`` are not numbers.
    """
    shares = query_patches(sample, image, alpha=alpha)
    try:
        given = torch.as_tensor(values).detach().cpu().double()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"values must be numbers, one per image token; got {quoted(values)}."
        ) from error
    if given.shape != shares.shape[:1]:
        raise GeometryError(
            f"values has shape {tuple(given.shape)}, but image {image} has {len(shares)} tokens. "
            "Pass one value per image token."
        )
    return sample.grids[image].arranged((given @ shares).numpy(), view, number=image)


def are_queries(grid: ImageGrid) -> bool:
    """Return whether the patches of an image have a row and column, and its tokens do not."""
    placed = grid.places_by_view[:, 0] >= 0
    return not bool(placed.any()) and bool((grid.patch_places[:, 0] >= 0).any())


def _grid(sample: Sample, image: int) -> ImageGrid:
    if not 0 <= image < len(sample.grids):
        raise InputError(f"There is no image {image}: the sample has {len(sample.grids)} images.")
    grid = sample.grids[image]
    if not are_queries(grid):
        placed = bool((grid.places_by_view[:, 0] >= 0).any())
        why = (
            "has tokens with a row and column: use sample.grid instead."
            if placed
            else "has no patches with a row and column, so values cannot be placed on them."
        )
        raise GeometryError(
            f"Image {image} of sample {sample.name!r} {why} {grid.reason or ''}".strip()
        )
    return grid


def _calls(sample: Sample, image: int) -> list[AttentionCall]:
    """Return the connector's calls for one image, in the order in which they ran.

    Raises:
        GeometryError: The model has no connector.
        NotRecordedError: Some layers were not kept.
    """
    keys = [key for key in sample.calls if key[0] == "connector" and key[3] == image]
    wanted = {
        (kind, layer)
        for kind in ("self", "cross")
        for layer in sample.provenance.get("layers", {}).get(f"connector.{kind}", [])
    }
    missing = sorted(wanted - {key[1:3] for key in keys})
    if not wanted and not keys:
        raise GeometryError(
            "This model has no attention in a connector: its learned queries are positions of the "
            "vision tower. Use xi.attention_rollout(sample, positions, tower='vision') instead."
        )
    if missing or not keys:
        named = ", ".join(f"{kind} {layer}" for kind, layer in missing) or "all"
        raise NotRecordedError(
            f"Sample {sample.name!r} lacks these connector layers for image {image}: {named}. "
            "Capture all attention layers of the tower 'connector'."
        )
    return [sample.calls[key] for key in keys]


def _across(
    call: AttentionCall, probs: Float[Tensor, "query key"], shares: Float[Tensor, "query patch"]
) -> Float[Tensor, "query patch"]:
    """Return ``A_p + A_l S`` of a cross-attention: the share of each patch in its output.

    Raises:
        GeometryError: The keys are neither the patches nor the patches and the queries.
    """
    n_queries, n_patches = shares.shape
    n_others = call.n_keys - n_patches
    if n_others not in (0, n_queries):
        raise GeometryError(
            f"{call.name} has {call.n_keys} keys and {n_queries} queries, but the image has "
            f"{n_patches} patches. The keys must be the patches, or the patches and the queries."
        )
    if n_others == 0:
        return probs
    attended = torch.zeros_like(shares)
    patches = queries = 0
    for start, stop, n in _pieces(call):
        patch, query = slice(patches, patches + stop - start - n), slice(queries, queries + n)
        block = probs[query, start:stop]
        attended[query, patch] = block[:, :-n]
        attended[query] += block[:, -n:] @ shares[query]
        patches, queries = patch.stop, query.stop
    return attended


def _pieces(call: AttentionCall) -> Iterator[tuple[int, int, int]]:
    """Yield start and stop of the keys, and the number of queries, of each tile of the image.

    The keys of a tile are its patches, then its queries. Queries see themselves, so the last key
    that a query sees is the last key of its tile.
    """
    visible = call.visible()[0, 0].cpu().numpy()
    stops = call.n_keys - np.argmax(visible[:, ::-1], axis=1)
    ends, counts = np.unique(stops, return_counts=True)
    starts = [0, *ends[:-1].tolist()]
    yield from zip(starts, ends.tolist(), counts.tolist(), strict=True)
