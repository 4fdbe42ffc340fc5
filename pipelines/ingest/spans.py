"""The bytes of one record, and where they stand. Files of text are cut here without being understood; JSON is cut in `json_spans`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

CONTINUATION_BYTES = bytes(range(0x80, 0xC0))


@dataclass(frozen=True)
class Span:
    """The bytes of one record: `Span(line=3, column=1, byte=42, data=b'{"text": "a"}', length=13)`."""

    line: int
    column: int
    byte: int
    data: bytes
    """At most `max_record_bytes` of the record."""
    length: int
    """The record's whole length."""
    fault: str = ""
    """Why this can't be a record, where the bytes show it: too long, or the file ended."""

    def at(self, data_before: bytes) -> tuple[int, int, int]:
        """Line, column and byte of what follows `data_before` in this span."""
        lines = data_before.count(b"\n")
        column = 1 if lines else self.column
        last = data_before.rpartition(b"\n")[2]
        return self.line + lines, column + len(last.translate(None, CONTINUATION_BYTES)), self.byte + len(data_before)


class Growing:
    """A span that grows piece by piece and keeps at most `limit` bytes of what it is given."""

    def __init__(self, line: int, column: int, byte: int, limit: int) -> None:
        self.line, self.column, self.byte = line, column, byte
        self._limit = limit
        self._kept = bytearray()
        self.length = 0

    def add(self, data: bytes, length: int | None = None) -> None:
        self._kept += data[: self._limit - len(self._kept)]
        self.length += len(data) if length is None else length

    def is_too_long(self) -> bool:
        return self.length > self._limit

    def span(self, fault: str = "") -> Span:
        if self.is_too_long():
            fault = f"a record of {self.length:,} bytes is longer than max_record_bytes = {self._limit:,}"
        return Span(self.line, self.column, self.byte, bytes(self._kept), self.length, fault)


def whole(pieces: Iterable[bytes], begin: int, limit: int) -> Iterator[Span]:
    """The whole file as one span; an empty file has none."""
    growing = Growing(1, 1, begin, limit)
    for piece in pieces:
        growing.add(piece)
    if growing.length:
        yield growing.span()


def lines(pieces: Iterable[bytes], begin: int, limit: int) -> Iterator[Span]:
    """Physical lines without their newline, blank ones included."""
    growing = Growing(1, 1, begin, limit)
    for piece in pieces:
        *ended, rest = piece.split(b"\n")
        for data in ended:
            growing.add(data)
            yield growing.span()
            growing = Growing(growing.line + 1, 1, growing.byte + growing.length + 1, limit)
        growing.add(rest)
    if growing.length:
        yield growing.span()


def paragraphs(pieces: Iterable[bytes], begin: int, limit: int) -> Iterator[Span]:
    """Runs of lines that aren't blank."""
    growing: Growing | None = None
    for span in lines(pieces, begin, limit):
        if not span.data.strip():
            if growing:
                yield growing.span()
            growing = None
        elif growing:
            growing.add(b"\n" + span.data, 1 + span.length)
        else:
            growing = Growing(span.line, 1, span.byte, limit)
            growing.add(span.data, span.length)
    if growing:
        yield growing.span()


def trimmed(span: Span) -> Span:
    """The span without the white space around it."""
    data = span.data.lstrip(b" \t\r\n")
    if len(data) == len(span.data):
        return replace(span, data=data.rstrip(b" \t\r\n"))
    before = span.data[: len(span.data) - len(data)]
    line, column, byte = span.at(before)
    return replace(span, line=line, column=column, byte=byte, data=data.rstrip(b" \t\r\n"))
