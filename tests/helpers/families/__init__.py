"""One record per model type, with the settings of its tiny offline copy."""

from tests.helpers.families import (
    elsewhere,
    fixed,
    fixed_others,
    merged,
    merged_glm,
    merged_others,
    native,
    queries,
    tiled,
    tiled_others,
)
from tests.helpers.families.record import Record, Token

_KINDS = (
    *(elsewhere, fixed, fixed_others, merged),
    *(merged_glm, merged_others, native, queries, tiled, tiled_others),
)
RECORDS: dict[str, Record] = {
    record.model_type: record for kind in _KINDS for record in kind.RECORDS
}

__all__ = ["RECORDS", "Record", "Token"]
