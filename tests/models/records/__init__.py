"""One record per model type: what its tiny offline copy is made of."""

from tests.models.records import elsewhere, fixed, merged, queries, tiled
from tests.models.records.record import Record, Token

RECORDS: dict[str, Record] = {
    record.model_type: record
    for family in (elsewhere, fixed, merged, queries, tiled)
    for record in family.RECORDS
}

__all__ = ["RECORDS", "Record", "Token"]
