"""Exceptions to the generic rules, as one short record for each type that requires one."""

from tests.conformance.overrides.clips import CLIPS, Clip
from tests.conformance.overrides.dual_encoders import DUAL_ENCODERS
from tests.conformance.overrides.images import IMAGES
from tests.conformance.overrides.other_ways import OTHER_WAYS
from tests.conformance.overrides.packed import PACKED
from tests.conformance.overrides.record import Record

RECORDS: dict[str, Record] = IMAGES | PACKED | OTHER_WAYS

__all__ = ["CLIPS", "DUAL_ENCODERS", "RECORDS", "Clip", "Record"]
