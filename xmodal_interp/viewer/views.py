"""``view`` makes a page of samples to look at their attention: in a notebook or as an HTML file."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from xmodal_interp.arguments import as_list, checked, user_path, whole_number
from xmodal_interp.at import Selector
from xmodal_interp.attention import Positions
from xmodal_interp.errors import InputError, counted, quoted
from xmodal_interp.escaping import portable
from xmodal_interp.sample import Sample
from xmodal_interp.store import Store, store_around
from xmodal_interp.viewer.header import header_of
from xmodal_interp.viewer.page import packed, page
from xmodal_interp.viewer.rows import Heads, ShownRows, shown_rows
from xmodal_interp.vocabulary import Tower

MOST_BYTES = 16 * 2**20
"""Size of the values of a page, before compression, to which heads are limited by default."""

MOST_SAMPLES = 12
"""Number of samples that a page shows by default."""

_FRAME_HEIGHT = 860  # px, of the page in a notebook


@checked
def view(  # noqa: PLR0913  every option has a default
    samples: Sample | Iterable[Sample] | Mapping[str, Sample],
    *,
    layers: Positions | None = None,
    queries: Selector | None = None,
    heads: Heads = None,
    tower: Tower | None = None,
    image: int = 0,
    rollout: bool = True,
    names: Sequence[str] | None = None,
    n_samples: int = MOST_SAMPLES,
) -> View:
    """Return a view of samples: displayed in a notebook, or saved as a self-contained HTML file.

    Args:
        samples: A sample, several samples (such as a store), or a mapping of titles to samples,
            such as ``{"before": one, "after": other}``.
        layers: Layers to show; all kept ones if not given.
        queries: Query tokens to show, such as a phrase or positions; all words of prompt and answer
            if not given. The positions that predict them are included. In the vision tower: all
            positions if they fit, otherwise the class and register tokens.
        heads: Heads whose rows are shown: ``"all"``; ``"top 64"``, those with the largest share of
            attention on images; or numbers of heads of every layer. If not given, all if they take
            at most 16 MiB, otherwise the strongest that fit. Means over all heads and sums are
            exact for every head in all cases.
        tower: ``"language"`` or ``"vision"``; ``Sample.tower`` if not given.
        image: Index of the image in the vision tower.
        rollout: Whether to compute attention rollout, if all its layers and rows were kept.
        names: Names of the samples of a store to show, in this order; the first ones if not given.
        n_samples: Show at most this many samples, the first ones.

    Raises:
        InputError: No samples, or a selection that selects nothing.
        NotRecordedError: A sample holds no attention rows of this tower.
    """
    whole_number(n_samples, "n_samples", 1)
    shown, n_given, store_path = _titled(samples, names, n_samples)
    if not shown:
        raise InputError("samples is empty. Pass at least one sample.")
    rows = [
        shown_rows(
            sample,
            tower=tower,
            image=image,
            layers=layers,
            queries=queries,
            heads=heads,
            rollout=rollout,
            most_bytes=MOST_BYTES / len(shown),
        )
        for _, sample in shown
    ]
    return View(tuple(rows), tuple(title for title, _ in shown), store_path, n_given)


class View:
    """Samples to look at; made by :func:`view`.

    Attributes:
        rows: The rows of each shown sample.
        titles: The title of each shown sample.
        n_given: Number of samples that were given; more than are shown if there were too many.
    """

    def __init__(
        self, rows: tuple[ShownRows, ...], titles: tuple[str, ...], store_path: str, n_given: int
    ) -> None:
        self.rows, self.titles, self.n_given = rows, titles, n_given
        self._store_path = store_path

    def __repr__(self) -> str:
        """Return a line with the number of samples, rows and bytes."""
        n_rows = sum(len(rows.queries) for rows in self.rows)
        return (
            f"View({len(self.rows)} of {counted(self.n_given, 'sample')}, "
            f"{counted(n_rows, 'query row')}, "
            f"{self.n_bytes / 1e6:.1f} MB of values before compression)"
        )

    @property
    def n_bytes(self) -> int:
        """Size of the values in bytes, before compression; known before they are computed."""
        return sum(rows.n_bytes for rows in self.rows)

    @cached_property
    def html(self) -> str:
        """The page: one HTML document that requests nothing."""
        return self._document(self.header)

    def _document(self, header: Mapping[str, Any]) -> str:
        arrays: dict[str, np.ndarray] = {}
        worst = 0.0
        for i, rows in enumerate(self.rows):
            of_sample = {**rows.codes(), **rows.sums()}
            worst = max(worst, float(of_sample.pop("error")))
            arrays |= {f"{i}.{name}": array for name, array in of_sample.items()}
        about, blocks = packed(arrays)
        return page({**header, "blocks": about, "largest_error": worst}, blocks, self._page_title)

    @cached_property
    def header(self) -> dict[str, Any]:
        """Description of the samples."""
        return self._described(self._store_path)

    def _described(self, store_path: str) -> dict[str, Any]:
        return {
            "samples": [
                header_of(rows, title, self._expression(rows.sample, i, store_path))
                for i, (rows, title) in enumerate(zip(self.rows, self.titles, strict=True))
            ],
            "n_given": self.n_given,
        }

    @property
    def _page_title(self) -> str:
        first = self.rows[0].sample
        return f"{first.question or first.name}: attention"

    def _expression(self, sample: Sample, index: int, store_path: str) -> str:
        """Return Python that gives the sample, for the code that the page copies."""
        if store_path:
            return f"xi.open_store({store_path!r})[{sample.name!r}]"
        return "sample" if self.n_given == 1 else f"samples[{index}]"

    def save(self, path: str | PathLike[str]) -> Path:
        """Write the page to a file; missing folders are created.

        The file may be mailed: Python calls on the page have the name of a store, without the
        folders of an absolute path.

        Args:
            path: The file; its name must end in ``.html``.

        Returns:
            The path.

        Raises:
            InputError: The name does not end in ``.html``, the path is inside a store, or the file
                cannot be written.
            StoreError: A file of a stored sample is damaged.
        """
        target = user_path(path)
        if target.suffix.lower() not in (".html", ".htm"):
            raise InputError(f"The file of a page must end in .html; got {quoted(str(path))}.")
        around = store_around(target)
        if around is not None:
            raise InputError(
                f"{str(path)!r} is inside the store {str(around)!r}, where pages must not be "
                "saved. Choose another path."
            )
        document = self._document(self._described(portable(self._store_path)))
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(document, "utf-8")
        except OSError as error:
            raise InputError(f"Cannot write the page to {str(path)!r}: {error}.") from error
        return target

    def _repr_html_(self) -> str:
        """Return the page in a frame, for notebooks; it needs no extension and no network."""
        return (
            f'<iframe srcdoc="{html.escape(self.html)}" sandbox="allow-scripts allow-downloads" '
            f'title="Attention viewer" style="width:100%;height:{_FRAME_HEIGHT}px;border:0">'
            "</iframe>"
        )


def _titled(
    samples: Any, names: Sequence[str] | None, most: int
) -> tuple[list[tuple[str, Sample]], int, str]:
    """Return the first samples by title, the number of all, and the path of their store."""
    if names is not None and not isinstance(samples, Store):
        raise InputError(
            "names selects samples of a store, but samples is none. Pass the samples to show "
            "instead."
        )
    if isinstance(samples, Sample):
        return [(samples.name, samples)], 1, ""
    if isinstance(samples, Store):
        first = samples[:most] if names is None else samples[list(names)[:most]]
        titled = [(sample.name, sample) for sample in first]
        return (
            titled,
            len(samples if names is None else names),
            str(samples.path),
        )
    if isinstance(samples, Mapping):
        given = [(str(title), sample) for title, sample in samples.items()]
    else:
        given = [(getattr(each, "name", ""), each) for each in as_list(samples, "samples")]
    for _, sample in given:
        if not isinstance(sample, Sample):
            raise InputError(f"samples must be samples; got {quoted(sample)}.")
    return given[:most], len(given), ""
