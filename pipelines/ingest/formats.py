"""Text and JSON: from a stream to rows."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Protocol

from pipelines.ingest.rows import BEGINS_CHARS, Place, Reject, Row, kind_of
from pipelines.ingest.settings import ReadSettings, SourceSettings
from pipelines.ingest.spans import Span, array_elements, lines, paragraphs, whole

PIECE_BYTES = 1 << 20
BOM = b"\xef\xbb\xbf"
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


class Stream(Protocol):
    def read(self, size: int = -1, /) -> bytes: ...


def stream_rows(name: str, stream: Stream, settings: SourceSettings, limits: ReadSettings) -> Iterator[Row | Reject]:
    parse = _json_row if settings.source == "json" else _text_row
    for record, span in enumerate(_spans(stream, settings, limits.max_record_bytes), start=1):
        if span.fault:
            yield _reject(name, record, span, b"", span.fault)
        else:
            yield parse(name, record, span, limits.encoding_errors)


def _spans(stream: Stream, settings: SourceSettings, limit: int) -> Iterator[Span]:
    first = stream.read(PIECE_BYTES)
    begin = len(BOM) if first.startswith(BOM) else 0
    pieces = itertools.chain([first[begin:]], iter(lambda: stream.read(PIECE_BYTES), b""))
    if settings.source == "json":
        is_array = first[begin:].lstrip().startswith(b"[")
        return array_elements(pieces, begin, limit) if is_array else (span for span in lines(pieces, begin, limit) if span.data.strip())
    return {"file": whole, "paragraph": paragraphs, "line": lines}[settings.unit](pieces, begin, limit)


def _reject(source: str, record: int, span: Span, before: bytes, reason: str) -> Reject:
    line, column, byte = span.at(before)
    return Reject(
        Place(source, record, line, column, byte), reason, span.data[: 4 * BEGINS_CHARS].decode("utf-8", "replace")[:BEGINS_CHARS]
    )


def _decode(span: Span, encoding_errors: str) -> tuple[str, int]:
    """The span's text, and how many characters had to be replaced; UnicodeDecodeError when none may be."""
    text = span.data.decode("utf-8", encoding_errors)
    replaced = text.count("\ufffd") - span.data.count("\ufffd".encode()) if encoding_errors == "replace" else 0
    return text, replaced


def _invalid_utf8(source: str, record: int, span: Span, error: UnicodeDecodeError) -> Reject:
    hint = ""
    if span.byte == 0 and span.data.startswith(UTF16_MARKS):
        hint = " (the file looks like UTF-16: convert it, for instance with `iconv -f UTF-16 -t UTF-8`)"
    return _reject(source, record, span, span.data[: error.start], f"invalid UTF-8: 0x{span.data[error.start]:02x}{hint}")


def _text_row(source: str, record: int, span: Span, encoding_errors: str) -> Row | Reject:
    try:
        text, replaced = _decode(span, encoding_errors)
    except UnicodeDecodeError as error:
        return _invalid_utf8(source, record, span, error)
    if (nul := span.data.find(b"\0")) >= 0:
        return _reject(source, record, span, span.data[:nul], "a NUL character; is this a binary file?")
    return Row(Place(source, record, span.line, span.column, span.byte), {"text": text.removesuffix("\r")}, replaced)


def _json_row(source: str, record: int, span: Span, encoding_errors: str) -> Row | Reject:
    try:
        text, replaced = _decode(span, encoding_errors)
        columns = json.loads(text)
    except UnicodeDecodeError as error:
        return _invalid_utf8(source, record, span, error)
    except json.JSONDecodeError as error:
        before = error.doc[: error.pos].encode()
        return _reject(source, record, span, before, f"malformed JSON: {error.msg}; want an object per line, or one array of objects")
    except RecursionError:
        return _reject(source, record, span, b"", "JSON nested too deeply to read")
    except ValueError as error:
        return _reject(source, record, span, b"", f"JSON that can't be read: {error}")
    if not isinstance(columns, dict):
        return _reject(source, record, span, b"", f"found {kind_of(columns)}, want an object of columns")
    return Row(Place(source, record, span.line, span.column, span.byte), columns, replaced)
