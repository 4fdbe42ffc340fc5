"""A record on its way into an artifact."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

CONTENT = ("text", "messages", "prompt", "chosen", "rejected", "response", "score", "reference")
"""The keys of a record that are its content; what else it has says where it is from."""


@dataclass(frozen=True)
class Record:
    """What may enter the artifact, and what decides its way."""

    raw: bytes
    """The content as UTF-8, a document's text as it is: what is hashed and counted."""
    record: dict[str, Any]
    """`{"text": "...", "source": "books/a.jsonl", "license": "CC0-1.0", "book": "emma"}`"""
    line: bytes
    """The record as it is written."""
    group: bytes
    """What the hold-out is drawn by."""


def record_of(record: dict[str, Any], group: bytes = b"") -> Record:
    line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    return Record(content_of(record), record, line, group)


def content_of(record: dict[str, Any]) -> bytes:
    if "text" in record:
        return str(record["text"]).encode()
    return json.dumps({key: record[key] for key in CONTENT if key in record}, ensure_ascii=False).encode()
