"""One record per model type: what its tiny offline copy is made of."""

from tests.models.records import fixed, merged, queries, tiled
from tests.models.records.record import Record, Token

RECORDS: dict[str, Record] = {
    record.model_type: record
    for record in (*fixed.RECORDS, *merged.RECORDS, *queries.RECORDS, *tiled.RECORDS)
}

__all__ = ["RECORDS", "Record", "Token"]
