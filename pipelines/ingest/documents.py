"""From records to documents: the text of a record's columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipelines.ingest.settings import SourceSettings, Weighted
from pipelines.ingest.templates import columns_of, evaluate, expressions, is_template, rendered, short


class WeightedSource(SourceSettings, Weighted):
    """One source of a mixture of documents."""


def to_text(columns: dict[str, Any], source: SourceSettings) -> dict[str, Any]:
    """`{"text": ...}` by `source.text`; ValueError names what is missing or isn't a text. Line ends become LF."""
    return {"text": text_of(columns, source.text).replace("\r\n", "\n")}


def text_of(columns: Mapping[str, Any], mapping: str | tuple[str, ...]) -> str:
    """Return the text of one column, of several values joined by newlines, or of a template.

    Null is empty and a list of texts is joined by newlines. Where a text is composed of several values, numbers and objects are written
    as in JSON. As the only column they are refused: more likely than not it's the wrong column.
    """
    if isinstance(mapping, tuple):
        return "\n".join(rendered(evaluate(each, columns), f"column {each!r}") for each in mapping)
    value = evaluate(mapping, columns)
    if value is None:
        return ""
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        template = "" if is_template(mapping) or isinstance(value, list) else f'; text = "{{{mapping}}}" writes it as text'
        raise ValueError(f"column {mapping!r} holds {short(value)}, expected a text or a list of texts{template}")
    return "\n".join(texts)


def columns_of_text(source: SourceSettings) -> list[str] | None:
    """The columns that `to_text` reads."""
    return columns_of(expressions(source.text))
