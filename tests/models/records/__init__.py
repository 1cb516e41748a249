"""One record per model type: what its tiny offline copy is made of."""

from tests.models.records import merged, tiled
from tests.models.records.record import Record, Token

RECORDS: dict[str, Record] = {
    record.model_type: record for record in (*tiled.RECORDS, *merged.RECORDS)
}

__all__ = ["RECORDS", "Record", "Token"]
