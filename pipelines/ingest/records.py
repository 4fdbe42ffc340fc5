"""One record on its way into an artifact: what a row becomes, what is hashed of it, and what it is held out by."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.ingest.rows import BEGINS_CHARS, Reject, Row, Unreadable
from pipelines.ingest.settings import SourceSettings
from pipelines.ingest.templates import column_of, short

CONTENT = ("text", "messages", "prompt", "chosen", "rejected", "response", "score", "reference")
"""The keys of a record that are its content; its other keys say where it is from."""

ToContent = Callable[[dict[str, Any], Any], dict[str, Any] | Iterable[dict[str, Any]] | None]
"""`to_content(columns, part)`: the content of a row's record, several where the row holds several, or None to leave the row out."""


@dataclass(frozen=True)
class Record:
    """What may enter the artifact, and what decides its way."""

    raw: bytes
    """The content as UTF-8, a document's text as it is: what is hashed and counted."""
    record: dict[str, Any]
    """`{"text": "...", "source": "books/a.jsonl", "license": "CC0-1.0", "book": "emma"}`"""
    line: bytes
    """The record as it is written."""
    group: bytes = b""
    """What the hold-out is drawn by."""


def to_records(row: Row, source: SourceSettings, by: str, max_record_bytes: int, to_content: ToContent) -> Iterator[Record | Reject]:
    """The records of a row, or the reason why it has none. `by` is what the hold-out keeps together."""
    try:
        content = to_content(row.columns, source)
        if content is None:
            return
        each_content = [content] if isinstance(content, dict) else list(content)
    except (ValueError, TypeError) as error:
        yield _reject(row, f"{error}{_records_hint(row, source, str(error))}")
        return
    for each in each_content:
        yield _to_record(row, each, source, by, max_record_bytes)


def _to_record(row: Row, content: dict[str, Any], source: SourceSettings, by: str, max_record_bytes: int) -> Record | Reject:
    try:
        record = {**content, "source": row.place.source}
        if source.license is not None:
            record["license"] = source.license
        for name in source.fields:
            if name in content:
                raise ValueError(f"fields names {name!r}, which is a key of every record already; remove it")
            record[name] = _json_value(row.columns, name)
        if _has_nul([record[key] for key in CONTENT if key in record]):
            raise ValueError("a NUL character")
        made = record_of(record, group_of(row, record, by))
        if len(made.raw) > max_record_bytes:
            raise ValueError(f"a text of {len(made.raw):,} bytes is longer than max_record_bytes = {max_record_bytes:,}")
        return made
    except UnicodeEncodeError as error:
        reason = f"half of a surrogate pair, U+{ord(error.object[error.start]):04X}, which is no character"
    except (ValueError, TypeError) as error:
        reason = str(error)
    return _reject(row, reason)


def _json_value(columns: Mapping[str, Any], name: str) -> Any:
    value = column_of(columns, name)
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"column {name!r} holds {short(value)}, which JSON can't hold ({error}); remove it from fields") from None
    return value


def _reject(row: Row, reason: str) -> Reject:
    read = {name: value for name, value in row.columns.items() if not isinstance(value, Unreadable)}
    return Reject(row.place, reason, json.dumps(read, ensure_ascii=False, default=str)[:BEGINS_CHARS])


def _records_hint(row: Row, source: SourceSettings, reason: str) -> str:
    """Where a missing column is one of the records in a list that the document wraps."""
    missing = re.match(r"no column '([^']+)'", reason)
    if missing and source.source == "json" and not source.records:
        for path, value in _lists(row.columns):
            if value and isinstance(value[0], dict) and missing[1].split(".")[0] in value[0]:
                return f'; records = "{path}" reads the list in there'
    return ""


def _lists(columns: dict[str, Any], above: str = "", depth: int = 3) -> Iterator[tuple[str, list[Any]]]:
    for key, value in columns.items():
        if isinstance(value, list):
            yield f"{above}{key}", value
        elif isinstance(value, dict) and depth:
            yield from _lists(value, f"{above}{key}.", depth - 1)


def _has_nul(value: Any) -> bool:
    match value:
        case str():
            return "\0" in value
        case dict():
            return any(map(_has_nul, value.values()))
        case list() | tuple():
            return any(map(_has_nul, value))
    return False


def record_of(record: dict[str, Any], group: bytes = b"") -> Record:
    line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    return Record(content_of(record), record, line, group)


def content_of(record: dict[str, Any]) -> bytes:
    if "text" in record:
        return str(record["text"]).encode()
    return json.dumps({key: record[key] for key in CONTENT if key in record}, ensure_ascii=False).encode()


# ---- what records are held out by ----


def group_of(row: Row, record: dict[str, Any], by: str) -> bytes:
    """Records of one group are on the same side of the hold-out."""
    match by:
        case "record":
            return content_of(record)
        case "source":
            return row.place.source.encode()
        case "prompt" if "text" not in record:
            return group_value(first_question(record.get("messages") or record["prompt"]))
        case column:
            return group_value(column_of(row.columns, column))


def group_value(value: Any) -> bytes:
    """A text as its characters and anything else as JSON, so that equal words are one group whatever column they came from."""
    return value.replace("\r\n", "\n").encode() if isinstance(value, str) else json.dumps(value, sort_keys=True).encode()


def first_question(messages: list[dict[str, Any]]) -> str:
    """What the first user's message says."""
    return next(str(message["content"]) for message in messages if message["role"] == "user")
