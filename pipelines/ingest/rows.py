"""One record as it was read, its columns and its place; or the reason why it was rejected."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

BEGINS_CHARS = 120


@dataclass(frozen=True)
class Place:
    """Where a record stands in a file: record, line and column (in characters) from 1, byte from 0.

    Lines, columns and bytes are those of the file once decompressed, and converted to UTF-8 where `encoding` is given.
    `Place(source="books/a.jsonl", record=4, line=4, column=12, byte=310)`; rows of Parquet have no line.
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
class Unreadable:
    """Stands where a table's value could not be read; only a stage that asks for the value fails."""

    reason: str


@dataclass(frozen=True)
class Row:
    """A record that could be read."""

    place: Place
    columns: dict[str, Any]
    replaced: int = 0
    """Invalid bytes that `encoding_errors = "replace"` turned into U+FFFD."""


@dataclass(frozen=True)
class Reject:
    """A record that can't be used."""

    place: Place
    reason: str
    begins: str = ""
    """The record's first characters."""
    lines: int = 1
    """How many records are lost with it: each line that a faulty quote of a CSV file spans counts as one."""
