"""The format on disk: what it is, writing it, reading it, checking it."""

from xmodal_interp.store.checking import check_store as check_store
from xmodal_interp.store.reader import Store as Store
from xmodal_interp.store.reader import open_store as open_store
from xmodal_interp.store.schema import check_name as check_name
from xmodal_interp.store.schema import digest_of as digest_of
from xmodal_interp.store.schema import json_text as json_text
from xmodal_interp.store.writer import StoreWriter as StoreWriter
