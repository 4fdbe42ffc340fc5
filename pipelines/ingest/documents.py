"""From records to documents: the text of a record's columns."""

from __future__ import annotations

import string
from typing import Any

from pipelines.ingest.gather import column_of
from pipelines.ingest.rows import kind_of
from pipelines.ingest.settings import SourceSettings, Weighted


class WeightedSource(SourceSettings, Weighted):
    """One source of a mixture of documents."""


def to_text(columns: dict[str, Any], source: SourceSettings) -> dict[str, Any]:
    """`{"text": ...}` as `source.text` says: a column, several, or a template. ValueError names what is missing or no text."""
    return {"text": _text(columns, source.text).replace("\r\n", "\n")}


def _text(columns: dict[str, Any], mapping: str | tuple[str, ...]) -> str:
    if isinstance(mapping, tuple):
        return "\n".join(_as_text(columns, name) for name in mapping)
    if "{" not in mapping:
        return _as_text(columns, mapping)
    pieces = string.Formatter().parse(mapping)
    return "".join(literal + (_as_text(columns, name) if name is not None else "") for literal, name, _, _ in pieces)


def _as_text(columns: dict[str, Any], name: str) -> str:
    value = column_of(columns, name)
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return "\n".join(value)
    raise ValueError(f"column {name!r} holds {kind_of(value)}, want a text or a list of texts")
