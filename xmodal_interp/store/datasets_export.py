"""The samples of a store as a ``datasets.Dataset``: questions, pictures, answers and labels.

Attention is not part of it: tables of an analysis are passed to ``datasets.Dataset.from_pandas``.
"""

from __future__ import annotations

from collections.abc import Iterable
from io import BytesIO
from typing import TYPE_CHECKING, Any

from xmodal_interp.errors import InputError
from xmodal_interp.sample import Sample

if TYPE_CHECKING:
    from datasets import Dataset

_OWN = ("name", "images", "prompt", "captured_answer")


def as_dataset(samples: Iterable[Sample]) -> Dataset:
    """Return a data set with one row per sample; see ``Store.to_dataset``."""
    try:
        import pyarrow as pa
        from datasets import Dataset, Features, Image, List
    except ImportError as error:
        raise InputError(
            "to_dataset requires the package datasets. Install it with pip install datasets."
        ) from error
    rows = [_row(sample) for sample in samples]
    names = [*_OWN, *dict.fromkeys(label for row in rows for label in row if label not in _OWN)]
    columns = {name: [row.get(name) for row in rows] for name in names}
    types: dict[str, Any] = {}
    for name, values in columns.items():
        try:
            types[name] = pa.array(values).type
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise InputError(
                f"The label {name!r} has values of several types, which a column cannot hold "
                f"({error}). Capture the samples with labels of one type."
            ) from error
    features = Features.from_arrow_schema(pa.schema(types))
    features["images"] = List(Image())
    return Dataset.from_dict(columns, features)


def _row(sample: Sample) -> dict[str, Any]:
    """Return the entries of a sample; images as PNG."""
    taken = [name for name in _OWN if name in sample.labels]
    if taken:
        raise InputError(
            f"Sample {sample.name!r} has a label {taken[0]!r}, which is the name of a column of "
            f"the data set. Capture the sample with another name for the label; {', '.join(_OWN)} "
            "are used."
        )
    if sample.video_grids or sample.videos:
        raise InputError(
            f"Sample {sample.name!r} has videos, which to_dataset does not write. Leave it out: "
            "convert samples with images only."
        )
    if sample.grids and not sample.images:
        raise InputError(
            f"The images of sample {sample.name!r} are not in the store. Capture it with "
            "images=True."
        )
    return {
        "name": sample.name,
        "images": [{"bytes": _png(image), "path": None} for image in sample.images],
        "prompt": sample.question,
        "captured_answer": sample.answer,
        **sample.labels,
    }


def _png(image: Any) -> bytes:
    target = BytesIO()
    image.save(target, format="png")
    return target.getvalue()
