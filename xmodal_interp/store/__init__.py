"""The on-disk format of samples: schema, writer, reader and integrity check."""

from xmodal_interp.store.files import store_around
from xmodal_interp.store.integrity import check_store
from xmodal_interp.store.reader import Store, open_store
from xmodal_interp.store.schema import check_name, digest_of, json_text
from xmodal_interp.store.writer import StoreWriter

__all__ = [
    "Store",
    "StoreWriter",
    "check_name",
    "check_store",
    "digest_of",
    "json_text",
    "open_store",
    "store_around",
]
