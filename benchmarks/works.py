"""The analyses that are measured: every public function that takes a sample."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy_statistics as usual
import torch
from random_models import package

N_QUERIES = 32  # of the rollout of many queries
ALL = "all of these on one sample"
CAPTURE = "capture"


@dataclass(frozen=True)
class Work:
    """An analysis that is measured.

    Attributes:
        name: Row of the table.
        run: The analysis of a sample (or of a list of samples).
        needs: Public names that it uses.
        towers: Parts of the model that the capture keeps for it.
        numpy: The same statistic of whole attention matrices.
        in_all: Whether it is one of "all of these".
        takes_many: Whether it takes a list of samples.
    """

    name: str
    run: Callable[[Any], object]
    needs: tuple[str, ...] = ()
    towers: tuple[str, ...] = ("language",)
    numpy: Callable[[usual.Attentions, usual.Layout], dict[str, np.ndarray]] | None = None
    in_all: bool = False
    takes_many: bool = True

    def run_many(self, samples: Sequence[Any]) -> object:
        """Run the analysis of several samples."""
        return self.run(samples) if self.takes_many else [self.run(each) for each in samples]


def image_mass(sample: Any) -> list[torch.Tensor]:
    """Return the image mass of text rows of every layer: no null, no sinks, no table."""
    image = torch.zeros(1, len(sample), dtype=torch.bool)
    image[0, sample.visual] = True
    text = torch.from_numpy(sample.text_after_image())
    return [sample.call(layer).mass(image, queries=text) for layer in sample.layers()]


def _call(name: str, **settings: Any) -> Callable[[Any], object]:
    return lambda samples: getattr(package(), name)(samples, **settings)


def _rollout_of_many(sample: Any) -> object:
    rows = list(range(len(sample) - N_QUERIES, len(sample)))
    return package().attention_rollout(sample, queries=rows)


def _last_rows(n: int) -> Callable[[usual.Attentions, usual.Layout], dict[str, np.ndarray]]:
    def of(attentions: usual.Attentions, layout: usual.Layout) -> dict[str, np.ndarray]:
        end = len(layout.kind)
        return usual.rollout(range(end - n, end))(attentions, layout)

    return of


MAIN = (
    Work(
        "image mass of text rows", image_mass, numpy=usual.image_mass, in_all=True, takes_many=False
    ),
    *(
        Work(name, _call(name), (name,), numpy=getattr(usual, name), in_all=True)
        for name in ("token_ratio", "cross_modal_ratio")
    ),
    Work(
        "attention_rollout, 1 query",
        _call("attention_rollout", queries="last"),
        ("attention_rollout",),
        numpy=_last_rows(1),
        in_all=True,
    ),
    Work(
        f"attention_rollout, {N_QUERIES} queries",
        _rollout_of_many,
        ("attention_rollout",),
        numpy=_last_rows(N_QUERIES),
        in_all=True,
        takes_many=False,
    ),
    *(
        Work(name, _call(name), (name,), numpy=getattr(usual, name), in_all=True)
        for name in ("attention_sinks", "block_statistics", "attention_entropy")
    ),
)
"""The works that the table begins with."""

TOWERS = {"attention_distance": ("vision",)}
LEARNED_QUERIES = ("query_patches", "on_patches")
"""Analyses of models whose image tokens are learned queries."""
OF_NORMS = ("token_norms",)
"""Analyses of norms of hidden states. They only read what the capture has computed."""


def works() -> list[Work]:
    """Return the works of this package: the main ones, all together, then all other analyses."""
    xi = package()
    main = [work for work in MAIN if all(hasattr(xi, name) for name in work.needs)]
    together = [work.run for work in main if work.in_all]
    everything = Work(ALL, lambda sample: [run(sample) for run in together], takes_many=False)
    used = {name for work in MAIN for name in work.needs} | {*LEARNED_QUERIES, *OF_NORMS}
    others = [
        Work(
            name,
            _call(name),
            (name,),
            towers=TOWERS.get(name, ("language",)),
            numpy=getattr(usual, name, None),
            takes_many=first_argument(getattr(xi, name)) == "samples",
        )
        for name in xi.analysis.__all__
        if name not in used and first_argument(getattr(xi, name)) in ("sample", "samples")
    ]
    return [*main, everything, *others]


def first_argument(function: Any) -> str:
    """Return the name of the first argument of a public function."""
    return next(iter(inspect.signature(function).parameters), "")
