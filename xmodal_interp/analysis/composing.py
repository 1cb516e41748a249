"""Which patches are in an image token that is a learned query: through the connector's attention.

The tokens of a Q-Former, a perceiver or a resampler have no row and column: each reads all of the
image by cross-attention. Rollout (Abnar & Zuidema 2020, arXiv 2005.00928) through the connector's
own layers, in the order in which they ran, tells what each took. With ``S`` the share of every
patch in every query, at first 0:

    self-attention    S <- alpha A S            + (1 - alpha) S
    cross-attention   S <- alpha (A_p + A_l S)  + (1 - alpha) S

``A`` is the mean over heads; ``A_p`` are its columns of patches, ``A_l`` those of the queries
themselves, which a perceiver has among the keys, behind the patches. What a query has from its
learned start and from the question's words is left out at the end: each row is scaled to sum to 1.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from xmodal_interp.analysis.frames import samples_of
from xmodal_interp.arguments import checked, real_number
from xmodal_interp.attention import AttentionCall
from xmodal_interp.attention.precision import full_precision
from xmodal_interp.errors import GeometryError, InputError, NotRecordedError, quoted
from xmodal_interp.models import ImageGrid
from xmodal_interp.sample import Sample


@checked
@full_precision()
def query_patches(
    sample: Sample, image: int = 0, *, alpha: float = 0.5
) -> Float[Tensor, "token patch"]:
    """The share of each vision-tower patch in each image token that is a learned query.

    Args:
        sample: A sample of a model whose image tokens are queries, with its connector's calls.
        image: Which image.
        alpha: Share of attention against the residual stream in each layer, 0 to 1; 0.5 is that of
            the rollout paper. A single cross-attention gives the same for every alpha above 0.

    Returns:
        float64; patches in the order of ``sample.grids[image].patch_places``, class token included.
        Rows sum to 1; NaN where a token takes nothing from the image.

    Raises:
        GeometryError: The image's tokens have places of their own, its patches have none, or the
            connector's attention is not about these patches.
        InputError: There is no such image, or alpha is no share.
        NotRecordedError: Not all of the connector's layers were kept.
    """
    alpha = real_number(alpha, "alpha", 0, 1)
    (sample,) = samples_of([sample])
    grid, calls = _grid(sample, image), _calls(sample, image)
    n_patches = len(grid.patch_places)
    shares = torch.zeros(max(call.n_queries for call in calls), n_patches, dtype=torch.float64)
    for call in calls:
        n = call.n_queries
        probs = call.in_float64().probs(dtype=torch.float64)[0].nan_to_num().mean(0).cpu()
        taken = probs @ shares[:n] if call.kind == "self" else _across(call, probs, shares[:n])
        shares[:n] = alpha * taken + (1 - alpha) * shares[:n]
    if len(shares) < grid.n_tokens:
        raise GeometryError(
            "The connector's queries must be the image's tokens. Image "
            f"{image} has {grid.n_tokens} tokens, {calls[0].name} has {calls[0].n_queries} queries."
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
    """An amount on each image token that is a learned query, on the patches that are in it.

    Args:
        sample: As for :func:`query_patches`.
        values: ``[token]``, such as the attention of a text token on each; their sum stays, over
            both views and the class token.
        image: Which image.
        view: ``"image"``, or the ``"thumbnail"`` that is read beside its tiles.
        alpha: As for :func:`query_patches`.

    Returns:
        The patches' grid, NaN where the image has no patch.

    Raises:
        GeometryError: As for :func:`query_patches`, or not one value per token.
    """
    shares = query_patches(sample, image, alpha=alpha)
    try:
        given = torch.as_tensor(values).detach().cpu().double()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"values are numbers, one per token; got {quoted(values)}.") from error
    if given.shape != shares.shape[:1]:
        raise GeometryError(
            f"Each image token must have one value. Image {image} has {len(shares)} tokens; got "
            f"values of shape {tuple(given.shape)}."
        )
    return sample.grids[image].arranged((given @ shares).numpy(), view, number=image)


def are_queries(grid: ImageGrid) -> bool:
    """Whether an image's tokens have no place, but its patches have."""
    placed = grid.places_by_view[:, 0] >= 0
    return not bool(placed.any()) and bool((grid.patch_places[:, 0] >= 0).any())


def _grid(sample: Sample, image: int) -> ImageGrid:
    if not 0 <= image < len(sample.grids):
        raise InputError(f"The sample has {len(sample.grids)} images; there is no image {image}.")
    grid = sample.grids[image]
    if not are_queries(grid):
        placed = bool((grid.places_by_view[:, 0] >= 0).any())
        why = "tokens have places of their own: use sample.grid" if placed else "patches have none"
        raise GeometryError(
            "Query tokens are composed onto patches where the tokens have no place and the "
            f"patches have. Image {image} of sample {sample.name!r}: its {why}. "
            f"{grid.reason or ''}".strip()
        )
    return grid


def _calls(sample: Sample, image: int) -> list[AttentionCall]:
    """The connector's calls about an image, in the order in which they ran.

    Raises:
        GeometryError: The model has no connector.
        NotRecordedError: Layers or rows are missing.
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
            "Query tokens are composed through the attention of a connector. This model has none: "
            "its queries are positions of the vision tower, beside the patches; ask "
            "xi.attention_rollout(sample, positions, tower='vision')."
        )
    if missing or not keys:
        named = ", ".join(f"{kind} {layer}" for kind, layer in missing) or "all"
        raise NotRecordedError(
            "Composing query tokens needs every attention layer of the connector. Sample "
            f"{sample.name!r} lacks for image {image}: {named}. Capture with all layers of the "
            "tower 'connector'."
        )
    return [sample.calls[key] for key in keys]


def _across(
    call: AttentionCall, probs: Float[Tensor, "query key"], shares: Float[Tensor, "query patch"]
) -> Float[Tensor, "query patch"]:
    """What the queries take in a cross-attention.

    Raises:
        GeometryError: Its keys are neither the patches nor the patches and the queries.
    """
    n_queries, n_patches = shares.shape
    n_others = call.n_keys - n_patches
    if n_others not in (0, n_queries):
        raise GeometryError(
            "The keys of a connector's cross-attention must be an image's patches, or these and "
            f"the queries. {call.name} has {call.n_keys} keys and {n_queries} queries; the image "
            f"has {n_patches} patches."
        )
    if n_others == 0:
        return probs
    taken = torch.zeros_like(shares)
    patches = queries = 0
    for start, stop, n in _pieces(call):
        patch, query = slice(patches, patches + stop - start - n), slice(queries, queries + n)
        block = probs[query, start:stop]
        taken[query, patch] = block[:, :-n]
        taken[query] += block[:, -n:] @ shares[query]
        patches, queries = patch.stop, query.stop
    return taken


def _pieces(call: AttentionCall) -> Iterator[tuple[int, int, int]]:
    """Start and stop of the keys of each picture that the image was read in, and its queries.

    Each picture's queries are the last of its keys, and see themselves: there a block ends.
    """
    visible = call.visible()[0, 0].cpu().numpy()
    stops = call.n_keys - np.argmax(visible[:, ::-1], axis=1)
    ends, counts = np.unique(stops, return_counts=True)
    starts = [0, *ends[:-1].tolist()]
    yield from zip(starts, ends.tolist(), counts.tolist(), strict=True)
