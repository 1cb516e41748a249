"""One record per model type, with the settings of its tiny offline copy."""

from tests.helpers.families import (
    dual_encoders,
    fixed_grids,
    merged_patches,
    native_sizes,
    no_placeholder,
    query_tokens,
    tiled_images,
)
from tests.helpers.families.family_record import Record, Token

_KINDS = (fixed_grids, query_tokens, merged_patches, native_sizes, no_placeholder, tiled_images)
RECORDS: dict[str, Record] = {each.model_type: each for kind in _KINDS for each in kind.RECORDS}
DUAL_ENCODERS: dict[str, Record] = {each.model_type: each for each in dual_encoders.RECORDS}

__all__ = ["DUAL_ENCODERS", "RECORDS", "Record", "Token"]
