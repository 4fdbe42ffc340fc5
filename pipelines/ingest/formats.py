"""Text and JSON: from a file's bytes to rows. At most `max_record_bytes` of a record are held; a longer one is rejected."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

from pipelines.ingest.json_spans import array_elements, elements_at, json_values
from pipelines.ingest.rows import BEGINS_CHARS, Place, Reject, Row
from pipelines.ingest.settings import ReadSettings, SourceSettings
from pipelines.ingest.spans import Span, lines, paragraphs, whole
from pipelines.ingest.streams import Stream, likely_encoding, text_pieces
from pipelines.ingest.templates import short


def stream_rows(name: str, stream: Stream, settings: SourceSettings, limits: ReadSettings) -> Iterator[Row | Reject]:
    """The records of a text or JSON file."""
    parse = _json_row if settings.source == "json" else _text_row
    for record, span in enumerate(_spans(name, stream, settings, limits.max_record_bytes), start=1):
        if span.fault:
            yield reject(name, record, span, b"", span.fault)
        else:
            yield parse(name, record, span, settings.encoding, limits.encoding_errors)


def _spans(name: str, stream: Stream, settings: SourceSettings, limit: int) -> Iterator[Span]:
    pieces, begin = text_pieces(name, stream, settings.encoding)
    if settings.source != "json":
        return {"file": whole, "paragraph": paragraphs, "line": lines}[settings.unit](pieces, begin, limit)
    if settings.records:
        return elements_at(settings.records, pieces, begin, limit)
    first = next(pieces, b"")
    pieces = itertools.chain([first], pieces)
    return (array_elements if first.lstrip().startswith(b"[") else json_values)(pieces, begin, limit)


def reject(source: str, record: int, span: Span, before: bytes, reason: str, lines: int = 1) -> Reject:
    """Reject a record for what follows `before` in its bytes."""
    line, column, byte = span.at(before)
    begins = span.data[: 4 * BEGINS_CHARS].decode("utf-8", "replace")[:BEGINS_CHARS]
    return Reject(Place(source, record, line, column, byte), reason, begins, lines)


def invalid_bytes(source: str, record: int, span: Span, encoding: str, error: UnicodeDecodeError, lines: int = 1) -> Reject:
    """Reject a record for its first byte that the encoding doesn't have."""
    name = "UTF-8" if encoding == "utf-8" else encoding
    hint = ""
    if encoding == "utf-8":
        likely = likely_encoding(span.data)
        hint = f'; it looks like {likely}: set encoding = "{likely}"' if likely else "; if this is text, set encoding to what it is in"
    reason = f"invalid {name}: 0x{span.data[error.start]:02x}{hint}"
    return reject(source, record, span, span.data[: error.start], reason, lines)


def decode(data: bytes, encoding_errors: str) -> tuple[str, int]:
    """The text, and how many characters had to be replaced; UnicodeDecodeError where none may be."""
    text = data.decode("utf-8", encoding_errors)
    replaced = text.count("\ufffd") - data.count("\ufffd".encode()) if encoding_errors == "replace" else 0
    return text, replaced


def _text_row(source: str, record: int, span: Span, encoding: str, encoding_errors: str) -> Row | Reject:
    try:
        text, replaced = decode(span.data, encoding_errors)
    except UnicodeDecodeError as error:
        return invalid_bytes(source, record, span, encoding, error)
    if (nul := span.data.find(b"\0")) >= 0:
        return reject(source, record, span, span.data[:nul], "a NUL character; is this a binary file?")
    return Row(Place(source, record, span.line, span.column, span.byte), {"text": text.removesuffix("\r")}, replaced)


def _json_row(source: str, record: int, span: Span, encoding: str, encoding_errors: str) -> Row | Reject:
    try:
        text, replaced = decode(span.data, encoding_errors)
        columns = json.loads(text, object_pairs_hook=_without_duplicates)
    except UnicodeDecodeError as error:
        return invalid_bytes(source, record, span, encoding, error)
    except json.JSONDecodeError as error:
        before = error.doc[: error.pos].encode()
        return reject(source, record, span, before, f"malformed JSON: {error.msg}; expected an object a line, or one array of objects")
    except RecursionError:
        return reject(source, record, span, b"", "JSON nested too deeply to read")
    except ValueError as error:
        return reject(source, record, span, b"", f"JSON that can't be read: {error}")
    if isinstance(columns, str):
        columns = {"text": columns}
    if not isinstance(columns, dict):
        return reject(source, record, span, b"", f"found {short(columns)}, expected an object of columns, or a text")
    return Row(Place(source, record, span.line, span.column, span.byte), columns, replaced)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    columns = dict(pairs)
    if len(columns) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"an object has the key {twice!r} twice, and only one of the two values could be kept")
    return columns
