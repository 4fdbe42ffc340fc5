"""A record as it is read: its columns and its place, or the reason why it can't be used."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

BEGINS_CHARS = 120


@dataclass(frozen=True)
class Place:
    """Where something stands in a file, once decompressed: record, line and column (in characters) from 1, byte from 0.

    `Place(source="books/a.jsonl", record=4, line=4, column=12, byte=310)`; a table's rows have no line.
    """

    source: str
    record: int
    line: int | None = None
    column: int | None = None
    byte: int | None = None

    def __str__(self) -> str:
        if self.line is None:
            return f"{self.source}, record {self.record}"
        return f"{self.source}, line {self.line}, column {self.column} (byte {self.byte})"


@dataclass(frozen=True)
class Row:
    """One record that could be read."""

    place: Place
    columns: dict[str, Any]
    replaced: int = 0
    """Invalid bytes that `encoding_errors = "replace"` turned into U+FFFD."""


@dataclass(frozen=True)
class Reject:
    """One record that couldn't be used, and why."""

    place: Place
    reason: str
    begins: str = ""
    """The record's first characters."""


def kind_of(value: object) -> str:
    """What a value is called in JSON's words, with the value where it is short."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, (int, float)):
        return f"the number {value}"
    names: dict[type, str] = {str: "a text", list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")
