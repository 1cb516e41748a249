"""Capture a data set into a store, one item or one batch at a time; resumable at any point.

1. Each item is checked separately, so that an error names the item.
2. An item whose sample is already in the store is skipped.
3. Batches are captured with ``capture_batch``; each sample is written atomically.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, Literal

import pandas as pd
from PIL import Image
from tqdm import tqdm

from xmodal_interp.capturing.fingerprint import fingerprint
from xmodal_interp.capturing.items import Item, item_of, opened_media, sample_name
from xmodal_interp.capturing.run import Keep, capture_batch, provenance
from xmodal_interp.errors import InputError, StoreError
from xmodal_interp.models import VLM, Video, check_vlm
from xmodal_interp.models.known_answers import Items, listed
from xmodal_interp.store import Store, StoreWriter, open_store

_OpenedItem = tuple[Item, tuple[list[Image.Image], list[Video]]]
"""An item with its opened images and videos."""

_logger = logging.getLogger(__name__)


def capture_dataset(  # noqa: PLR0913  # the settings of a run; all but three have defaults
    vlm: VLM,
    items: Items,
    path: str | PathLike[str],
    *,
    max_new_tokens: int = 0,
    batch_size: int = 1,
    keep: Keep | None = None,
    system: str | None = None,
    images: bool = True,
    progress: bool = True,
    on_error: Literal["raise", "skip"] = "raise",
) -> Store:
    """Capture many samples into a store; call it again to resume.

    A second call with the same settings captures the missing samples and reports how many were
    already in the store. Samples are written atomically, so an interrupted run leaves no partial
    sample.

    All weights are read once (about 1 GB/s for each core) to verify that an existing store was made
    with the same model in the same state.

    Args:
        vlm: Model and processor.
        items: Dicts, a ``datasets.Dataset``, or a DataFrame with one row per item. An item has
            ``image`` (a path or PIL image, or a list of these) or ``images``, and/or ``video`` (a
            :class:`Video`) or ``videos`` (a list of videos); ``prompt`` or ``question``; and
            ``name`` or ``id`` (by default made from its index, such as ``item-000003``). All other
            entries become the sample's labels and must be JSON-serialisable.
        path: Folder of the store: new, empty, or a store made with the same settings.
        max_new_tokens: Number of tokens to generate greedily; 0 runs the prompts only.
        batch_size: Number of samples per batch; can be changed when a run is resumed.
        keep: The parts of the attention to keep; by default the queries and keys of all layers.
        system: A system message.
        images: Store the images too (as PNG). If False, a sample reads its images from their
            original paths.
        progress: Show a progress bar.
        on_error: ``"raise"``, or ``"skip"``, which adds items that cannot be captured to the
            ``failures`` of the store and continues. The next call tries them again.

    Returns:
        The store, opened for reading.

    Raises:
        InputError: An invalid item or option.
        StoreError: The store was made with another model or other settings, holds a sample of the
            same name from another item, or cannot be written. Samples that were written before the
            error are kept.
    """
    check_vlm(vlm)
    _check_options(items, batch_size, on_error)
    keep = keep or Keep()
    settings = run_settings(vlm, keep, max_new_tokens, system=system, images=images)
    items = listed(items) if isinstance(items, pd.DataFrame) else items
    n_items = len(items) if isinstance(items, Sized) else None
    with (
        StoreWriter(path, settings, images=images) as writer,
        tqdm(total=n_items, unit="sample", smoothing=0, disable=not progress) as bar,
    ):
        run = _Run(vlm, writer, bar, keep, max_new_tokens, system, skips=on_error == "skip")
        run.capture_all(items, batch_size)
        message = (
            f"{writer.path}: {run.n_stored} of {run.n_items} samples were already in the store, "
            f"{run.n_captured} were captured, {run.n_failed} failed."
        )
        _logger.info(message)
        if progress and (run.n_stored or run.n_failed):
            tqdm.write(message, file=sys.stderr)
    return open_store(path)


def run_settings(
    vlm: VLM, keep: Keep, max_new_tokens: int, *, system: str | None, images: bool
) -> dict[str, Any]:
    """Return the settings that all samples of a store share."""
    about = provenance(vlm, {}, max_new_tokens, keep)
    about["kept"]["images"] = images
    del about["layers"], about["created"], about["versions"]["python"]
    return {**about, "system": system, **fingerprint(vlm)}


@dataclass(eq=False)
class _Run:
    """One call of :func:`capture_dataset`: its arguments, and how many items it processed."""

    vlm: VLM
    writer: StoreWriter
    bar: tqdm[Any]
    keep: Keep
    max_new_tokens: int
    system: str | None
    skips: bool
    n_items: int = 0
    n_stored: int = 0
    n_captured: int = 0
    n_failed: int = 0
    seen: dict[str, int] = field(default_factory=dict)

    def capture_all(self, items: Iterable[Mapping[str, Any]], batch_size: int) -> None:
        batch: list[_OpenedItem] = []
        for opened in self._missing(items):
            batch.append(opened)
            if len(batch) == batch_size:
                self._capture(batch)
                batch = []
        if batch:
            self._capture(batch)

    def _missing(self, items: Iterable[Mapping[str, Any]]) -> Iterator[_OpenedItem]:
        """Yield the items that are not in the store yet, with their images opened."""
        for number, raw in enumerate(items):
            self.n_items += 1
            name = None
            try:
                name = sample_name(number, raw, self.seen)
                item = item_of(number, name, raw, asks=self.vlm.family.language)
                if self._is_stored(item):
                    continue
                opened = opened_media(item)
            except InputError as error:
                if not self.skips:
                    raise
                self._note_failure(number, name, error)
                continue
            yield item, opened

    def _is_stored(self, item: Item) -> bool:
        if item.name not in self.writer:
            return False
        if self.writer.record(item.name)["provenance"].get("item") != item.digest:
            raise StoreError(
                f"{item.title} differs in prompt, labels or images from the sample {item.name!r} "
                f"in {self.writer.path}. Give each item a unique name or id, or write to another "
                "folder."
            )
        self.n_stored += 1
        if not self.bar.disable:
            self.bar.initial += 1  # excluded from the rate that the bar shows
        self.bar.update()
        return True

    def _capture(self, batch: Sequence[_OpenedItem]) -> None:
        try:
            samples = capture_batch(
                self.vlm,
                [images for _, (images, _) in batch],
                [item.prompt for item, _ in batch],
                videos=[videos for _, (_, videos) in batch],
                max_new_tokens=self.max_new_tokens,
                keep=self.keep,
                system=self.system,
            )
        except Exception as error:  # a model may raise any exception on an input
            if not self.skips:
                error.add_note(f"Raised by {', '.join(item.title for item, _ in batch)}.")
                raise
            if len(batch) == 1:
                self._note_failure(batch[0][0].number, batch[0][0].name, error)
                return
            samples = []
        if not samples:  # the batch failed: capture its items one by one
            for each in batch:
                self._capture([each])
            return
        for (item, _), sample in zip(batch, samples, strict=True):
            digests, frame_digests = item.picture_digests
            about: dict[str, Any] = {"images": item.sources, "image_digests": digests}
            if item.videos:
                about |= {"videos": item.frame_sources, "video_digests": frame_digests}
            about |= {"item": item.digest, "system": self.system, "batch_size": len(batch)}
            about = {**sample.provenance, **about}
            self.writer.write(sample.changed(name=item.name, labels=item.labels, provenance=about))
            self.n_captured += 1
            self.bar.set_postfix_str(f"{self.writer.n_bytes / 1e6:.1f} MB", refresh=False)
            self.bar.update()

    def _note_failure(self, number: int, name: str | None, error: Exception) -> None:
        what = {"error": type(error).__name__, "message": str(error)}
        self.writer.note_failure({"item": number, "name": name, **what})
        self.n_failed += 1
        self.bar.update()


def _check_options(items: Any, batch_size: int, on_error: str) -> None:
    if isinstance(items, (Mapping, str)):
        raise InputError(
            "items must be a sequence of dicts, or one split of a data set; got a "
            f"{type(items).__name__}."
        )
    if batch_size < 1:
        raise InputError(f"batch_size must be 1 or more; got {batch_size}.")
    if on_error not in ("raise", "skip"):
        raise InputError(f"on_error must be 'raise' or 'skip'; got {on_error!r}.")
