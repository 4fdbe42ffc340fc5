"""From records to documents: the text of a record's columns."""

from __future__ import annotations

from typing import Any

from pipelines.ingest.columns import text_columns, text_of
from pipelines.ingest.settings import SourceSettings, Weighted


class WeightedSource(SourceSettings, Weighted):
    """One source of a mixture of documents."""


def to_text(columns: dict[str, Any], source: SourceSettings) -> dict[str, Any]:
    """`{"text": ...}` by `source.text`; ValueError names what is missing or isn't a text. Line ends become LF."""
    return {"text": text_of(columns, source.text).replace("\r\n", "\n")}


def columns_of_text(source: SourceSettings) -> list[str]:
    """The columns that `to_text` reads."""
    return text_columns(source.text)
