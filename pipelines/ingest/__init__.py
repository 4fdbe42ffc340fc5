"""The public face of ingest: what a stage of one's own needs to read files and to write records."""

from pipelines.ingest.documents import WeightedSource, to_text
from pipelines.ingest.gather import column_of, gather, to_record
from pipelines.ingest.reader import Reader
from pipelines.ingest.records import Record
from pipelines.ingest.rows import Place, Reject, Row
from pipelines.ingest.settings import HoldOut, IngestSettings, ReadSettings, SourceSettings, Weighted

__all__ = [
    "HoldOut",
    "IngestSettings",
    "Place",
    "ReadSettings",
    "Reader",
    "Record",
    "Reject",
    "Row",
    "SourceSettings",
    "Weighted",
    "WeightedSource",
    "column_of",
    "gather",
    "to_record",
    "to_text",
]
