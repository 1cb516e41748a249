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

from PIL import Image
from tqdm import tqdm

from xmodal_interp.capturing.fingerprint import fingerprint
from xmodal_interp.capturing.items import Item, item_of, opened_media, sample_name
from xmodal_interp.capturing.run import Keep, capture_batch, provenance
from xmodal_interp.errors import InputError, StoreError
from xmodal_interp.models import VLM, Video, check_vlm
from xmodal_interp.models.item_files import each_of, rows_of
from xmodal_interp.models.known_answers import Items
from xmodal_interp.models.media import Composite
from xmodal_interp.models.processor_calls import composite_of
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
    given_answers: bool = False,
    processor_options: Mapping[str, Any] | None = None,
) -> Store:
    """Capture many samples into a store; call it again to resume.

    A second call with the same settings captures the missing samples and reports how many were
    already in the store. Samples are written atomically, so an interrupted run leaves no partial
    sample.

    All weights are read once (about 1 GB/s for each core) to verify that an existing store was made
    with the same model in the same state.

    Args:
        vlm: Model and processor.
        items: Dicts, a ``datasets.Dataset``, a DataFrame with one row per item, or the path of a
            file of items (see :func:`read_items`). An item has ``image`` (a path or PIL image, or a
            list of these) or ``images``, and/or ``video`` (a :class:`Video`) or ``videos`` (a list
            of videos); ``prompt`` or ``question``; and ``name`` or ``id`` (by default made from
            its number, such as ``item-000003``). Instead of a prompt it may have a chat:
            ``messages``, or ``conversations`` as in LLaVA's data (see :mod:`~.models.chats`),
            which may hold the images; its last message, if it is the assistant's, becomes the
            label ``answer``. All other entries become labels and must be JSON-serialisable. An
            entry that is None counts as missing. A named index of a DataFrame is an entry; an index
            of other unique values is the ``id``.
        path: Folder of the store: new, empty, a store made with the same settings, or a store
            without samples.
        max_new_tokens: Number of tokens to generate greedily; 0 runs the prompts only.
        batch_size: Number of samples per batch; can be changed when a run is resumed.
        keep: The parts of the attention to keep; by default the queries and keys of all layers.
        system: A system message.
        images: Store the images too (as PNG). If False, a sample reads its images from their
            original paths.
        progress: Show a progress bar.
        on_error: ``"raise"``, or ``"skip"``, which adds items that cannot be read or captured to
            the ``failures`` of the store and continues. The next call tries them again. An iterator
            that raises an error ends the call.
        given_answers: Run the model on the ``answer`` of each item after its prompt, instead of
            generating one; see ``answer`` of :func:`capture`.
        processor_options: Options of the image and video processor, as in :func:`capture`.

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
    if given_answers and max_new_tokens:
        raise InputError(
            f"given_answers=True and max_new_tokens={max_new_tokens!r} exclude each other. Pass "
            "one of them."
        )
    used = vlm.with_options(processor_options)
    settings = run_settings(used, keep, max_new_tokens, system=system, images=images)
    settings |= {"given_answers": True} if given_answers else {}
    rows = rows_of(items)
    n_items = len(rows) if isinstance(rows, Sized) else None
    with (
        StoreWriter(path, settings, images=images) as writer,
        tqdm(total=n_items, unit="sample", smoothing=0, disable=not progress) as bar,
    ):
        run = _Run(vlm, writer, bar, keep, max_new_tokens, system, skips=on_error == "skip")
        run.given_answers, run.processor_options = given_answers, processor_options
        run.background = composite_of(used.processor)
        run.capture_all(rows, batch_size)
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
    given_answers: bool = False
    processor_options: Mapping[str, Any] | None = None
    background: Composite | None = None
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
        for number, read in enumerate(each_of(items)):
            self.n_items += 1
            name = None
            try:
                raw = read()
                name = sample_name(number, raw, self.seen)
                item = item_of(
                    number,
                    name,
                    raw,
                    self.vlm.placeholders,
                    requires_prompt=self.vlm.family.language,
                    reads_answer=self.given_answers,
                )
                if self.given_answers and item.answer is None:
                    raise InputError(
                        f"{item.title} has no answer, which given_answers=True requires. Add the "
                        "entry answer, or leave out given_answers."
                    )
                if self._is_stored(item):
                    continue
                opened = opened_media(item, self.background)
            except StoreError:
                raise
            except Exception as error:  # a data set may raise any exception when an item is read
                if not self.skips:
                    if not isinstance(error, InputError):
                        error.add_note(f"Raised when item {number} was read.")
                    raise
                self._note_failure(number, name, error)
                continue
            yield item, opened

    def _is_stored(self, item: Item) -> bool:
        if item.name not in self.writer:
            return False
        stored = self.writer.record(item.name)["provenance"].get("item")
        if stored != item.digest and not self._is_same(item):
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

    def _is_same(self, item: Item) -> bool:
        """Return whether an item has the prompt, labels and pixels of the sample of its name.

        Its digest differs from the sample's if one of them came from an image file and the other
        from a picture in memory.
        """
        images, videos = opened_media(item, self.background)
        try:
            stored = self.writer.read(item.name)
            labels = {name: value for name, value in stored.labels.items() if value is not None}
            pixels = [_pixels(stored.images, stored.videos), _pixels(images, videos)]
        except StoreError:  # images that are not stored, and whose files moved or changed
            return False
        asked = stored.provenance.get("messages", stored.question)
        return (asked, labels, pixels[0]) == (item.asked, item.labels, pixels[1])

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
                answers=[item.answer for item, _ in batch] if self.given_answers else None,
                processor_options=self.processor_options,
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


def _pixels(images: Sequence[Image.Image], videos: Sequence[Video]) -> list[Any]:
    """Return the RGB pixels of images and videos, to compare them."""
    of_images = [(image.size, image.convert("RGB").tobytes()) for image in images]
    return [*of_images, *((video.fps, video.pixels().tobytes()) for video in videos)]


def _check_options(items: Any, batch_size: int, on_error: str) -> None:
    if isinstance(items, Mapping):
        raise InputError(
            "items must be a sequence of dicts, or one split of a data set; got a "
            f"{type(items).__name__}."
        )
    if batch_size < 1:
        raise InputError(f"batch_size must be 1 or more; got {batch_size}.")
    if on_error not in ("raise", "skip"):
        raise InputError(f"on_error must be 'raise' or 'skip'; got {on_error!r}.")
