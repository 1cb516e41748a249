"""Statistics that a call holds instead of its queries and keys.

Queries and keys need ``O(S d)`` memory per head, the statistics of this file a few numbers per head
and position:

* ``mass``: the probability summed over groups of keys, ``[sample, head, query, group]``. The groups
  divide the keys, so the mass of any union of groups is a sum of these numbers.
* ``entropy``: the entropy of each row, ``[sample, head, query]``.
* ``received``: the probability that each key receives, summed over the counted queries,
  ``[sample, head, key]``.

:func:`reduced` computes them while the model runs. Methods of the call return what it holds. They
raise an error for everything that these numbers do not determine.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from xmodal_interp.attention.indexing import brief
from xmodal_interp.attention.kernels import full_precision
from xmodal_interp.errors import NotRecordedError

if TYPE_CHECKING:
    from xmodal_interp.attention.call import AttentionCall

FIELDS = {"mass": "group_mass", "entropy": "row_entropy", "received": "key_received"}
"""The field of :class:`AttentionCall` that holds each statistic."""

HELD = (*FIELDS.values(), "groups", "counted")
"""All fields that hold statistics."""

NO_GROUP = -1
"""Group of a key that no query sees."""


@dataclass(frozen=True, eq=False)
class Labels:
    """What the keys and queries of a call are.

    Attributes:
        groups: The group of each key.
        n_groups: Number of groups; some may have no key.
        counted: Queries that are counted in ``received``.
        rows: Indices of the queries that are computed; None for all.
    """

    groups: Int[Tensor, "sample key"]
    n_groups: int
    counted: Bool[Tensor, "sample query"]
    rows: Int[Tensor, " row"] | None = None


def reduced(
    call: AttentionCall, names: Collection[str], labels: Labels | None = None
) -> AttentionCall:
    """Return the call with statistics instead of q, k, v, dense probabilities and bias.

    Args:
        call: A call that holds q and k, or dense probabilities.
        names: ``"mass"``, ``"entropy"`` or ``"received"``.
        labels: Groups of keys and counted queries. If not given, all keys are in group 0 and all
            queries are counted. In a row that is not computed, mass and entropy are NaN. The mass
            of a single group is left out, unless learned sinks have a share of it or no other
            statistic is asked for.
    """
    if labels is None:
        groups = torch.zeros(call.n_samples, call.n_keys, dtype=torch.int16, device=call.device)
        counted = torch.ones(call.n_samples, call.n_queries, dtype=torch.bool, device=call.device)
        labels = Labels(groups, 1, counted)
    if labels.n_groups == 1 and call.sinks is None:
        names = [name for name in names if name != "mass"] or names
    if "mass" in names and not bool((labels.groups == labels.groups[:1]).all()):
        return _reduced_one_by_one(call, names, labels)
    found: dict[str, Any] = {"groups": labels.groups, "counted": labels.counted}
    if "mass" in names:  # first: it keeps the log-sum-exp, which ``received`` needs
        number = torch.arange(labels.n_groups, device=call.device)
        members = labels.groups[0] == number[:, None]
        found["group_mass"] = _in_place(call.mass(members, queries=labels.rows), call, labels)
    if "entropy" in names:
        found["row_entropy"] = _in_place(call.entropy(queries=labels.rows), call, labels)
    if "received" in names:
        found["key_received"] = call.received(labels.counted.float())
    else:
        found["counted"] = torch.zeros_like(labels.counted)
    return replace(call, q=None, k=None, v=None, dense=None, bias=None, **found)


def _reduced_one_by_one(
    call: AttentionCall, names: Collection[str], labels: Labels
) -> AttentionCall:
    """Return the same as :func:`reduced` for samples that have different groups."""
    samples = []
    for index in range(call.n_samples):
        of_sample = replace(
            labels,
            groups=labels.groups[index : index + 1],
            counted=labels.counted[index : index + 1],
        )
        samples.append(reduced(call.select_sample(index), names, of_sample))
    fields = ("groups", "counted", *(FIELDS[name] for name in names))
    found: dict[str, Any] = {
        name: torch.cat([getattr(each, name) for each in samples]) for name in fields
    }
    return replace(call, q=None, k=None, v=None, dense=None, bias=None, **found)


def _in_place(values: Tensor, call: AttentionCall, labels: Labels) -> Tensor:
    """Return the values of the computed rows at their places among all rows."""
    if labels.rows is None:
        return values
    shape = (*values.shape[:2], call.n_queries, *values.shape[3:])
    whole = values.new_full(shape, torch.nan)
    whole[:, :, labels.rows] = values
    return whole


def finished(call: AttentionCall) -> AttentionCall:
    """Return a call of one sample without groups that have no key, and without k.

    While decode steps are joined, a few numbers of each key are held to compare the keys.
    """
    if not call.holds_statistics or call.groups is None:
        return call
    if call.group_mass is None:
        return replace(call, k=None)
    used, index = call.groups.unique(return_inverse=True)
    n_without = int((used == NO_GROUP).sum())
    return replace(
        call,
        k=None,
        groups=(index - n_without).to(call.groups.dtype),
        group_mass=call.group_mass[..., used[n_without:].long()],
    )


def average(
    call: AttentionCall,
    values: Float[Tensor, "key value"],
    head: Int[Tensor, " head"],
    row: Int[Tensor, " row"],
) -> Float[Tensor, "sample head row value"]:
    """Return ``probs @ values`` for values that are equal for all keys of a group.

    Raises:
        NotRecordedError: The call does not hold the mass, or two keys of a group have different
            values.
    """
    if call.group_mass is None:
        raise missing(call, "mass")
    assert call.groups is not None
    parts = []
    with full_precision():
        for mass, groups in zip(call.group_mass, call.groups.long(), strict=True):
            seen = groups != NO_GROUP
            of_groups = values.new_zeros(mass.shape[-1], values.shape[1])
            of_groups[groups[seen]] = values[seen]
            differs = (of_groups[groups] != values).any(1) & seen
            if bool(differs.any()):
                raise _inseparable(call, groups, of_groups[groups], values, differs)
            parts.append(mass[head][:, row].to(values.dtype) @ of_groups)
    return torch.stack(parts)


def _inseparable(
    call: AttentionCall,
    groups: Int[Tensor, " key"],
    of_groups: Float[Tensor, "key value"],
    values: Float[Tensor, "key value"],
    differs: Bool[Tensor, " key"],
) -> NotRecordedError:
    """Return the error for keys of one group that have different values."""
    key = differs.nonzero()[0, 0]
    column = (of_groups[key] != values[key]).nonzero()[0, 0]
    alike = values[:, column] == values[key, column]
    of_group = groups == groups[key]
    one, other = (keys.nonzero()[:, 0].tolist() for keys in (of_group & alike, of_group & ~alike))
    one, other = sorted((one, other), key=len)
    return NotRecordedError(
        f"{call.name} holds the mass on groups of keys, not q and k: it cannot separate the keys "
        f"{brief(one)} from the keys {brief(other)} of the same group. Choose unions of its groups "
        "(AttentionCall.groups), or capture with Keep() to keep q and k."
    )


def received(
    call: AttentionCall, head: Int[Tensor, " head"], vector: Float[Tensor, "sample query"]
) -> Float[Tensor, "sample head key"]:
    """Return what the keys receive from the counted queries; ``vector`` is 1 there, else 0.

    Raises:
        NotRecordedError: The call does not hold it, or the vector has other entries.
    """
    if call.key_received is None:
        raise missing(call, "received")
    assert call.counted is not None
    vector = vector.to(call.device)
    differs = vector != call.counted.to(vector.dtype)
    if bool(differs.any()):
        differs &= (call.n_visible() > 0).any(1)  # other queries give nothing
    if bool(differs.any()):
        raise NotRecordedError(
            f"{call.name} holds what keys receive from {int(call.counted.sum())} of its "
            f"{call.n_queries} queries, each with weight 1 (AttentionCall.counted), not q and k; "
            f"the statistic needs {int((vector != 0).sum())} queries or other weights. Capture "
            "with Keep(queries=...) to count other queries, or with Keep() to keep q and k."
        )
    found = call.key_received[:, head].to(vector.dtype)
    return found.expand(vector.shape[0], -1, -1) if call.n_samples == 1 else found


def missing(call: AttentionCall, name: str) -> NotRecordedError:
    """Return the error for a statistic, or for q and k, that a call does not hold."""
    held = [each for each, field in FIELDS.items() if getattr(call, field) is not None]
    noun = "statistic" if len(held) == 1 else "statistics"
    can_add = name in FIELDS and (name != "mass" or call.tower == "language")
    how = f"Add {name!r} to Keep(statistics=...), or capture" if can_add else "Capture"
    listed = " and ".join(filter(None, [", ".join(held[:-1]), *held[-1:]])) or "none"
    return NotRecordedError(
        f"{call.name} holds the {noun} {listed}, not {name}. {how} with Keep() to keep q and k."
    )
