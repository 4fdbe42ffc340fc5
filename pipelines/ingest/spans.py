"""The bytes of one record, and where they stand: files are cut without being understood."""

from __future__ import annotations

import re
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
    """No more than `max_record_bytes` of it."""
    length: int
    fault: str = ""
    """Why it is no record, where the bytes alone say so: too long, or the file ended."""

    def at(self, data_before: bytes) -> tuple[int, int, int]:
        """Line, column and byte of what follows `data_before` in this span."""
        lines = data_before.count(b"\n")
        column = 1 if lines else self.column
        last = data_before.rpartition(b"\n")[2]
        return self.line + lines, column + len(last.translate(None, CONTINUATION_BYTES)), self.byte + len(data_before)


class _Growing:
    """A span in the making, which keeps no more than `limit` bytes of what it is given."""

    def __init__(self, line: int, column: int, byte: int, limit: int) -> None:
        self.line, self.column, self.byte = line, column, byte
        self._limit = limit
        self._kept = bytearray()
        self.length = 0

    def add(self, data: bytes, length: int | None = None) -> None:
        self._kept += data[: self._limit - len(self._kept)]
        self.length += len(data) if length is None else length

    def span(self, fault: str = "") -> Span:
        if self.length > self._limit:
            fault = f"a record of {self.length:,} bytes is longer than max_record_bytes = {self._limit:,}"
        return Span(self.line, self.column, self.byte, bytes(self._kept), self.length, fault)


def whole(pieces: Iterable[bytes], begin: int, limit: int) -> Iterator[Span]:
    """The whole file as one span; an empty file has none."""
    growing = _Growing(1, 1, begin, limit)
    for piece in pieces:
        growing.add(piece)
    if growing.length:
        yield growing.span()


def lines(pieces: Iterable[bytes], begin: int, limit: int) -> Iterator[Span]:
    """Physical lines without their newline; blank ones too."""
    growing = _Growing(1, 1, begin, limit)
    for piece in pieces:
        *ended, rest = piece.split(b"\n")
        for data in ended:
            growing.add(data)
            yield growing.span()
            growing = _Growing(growing.line + 1, 1, growing.byte + growing.length + 1, limit)
        growing.add(rest)
    if growing.length:
        yield growing.span()


def paragraphs(pieces: Iterable[bytes], begin: int, limit: int) -> Iterator[Span]:
    """Runs of lines that aren't blank."""
    growing: _Growing | None = None
    for span in lines(pieces, begin, limit):
        if not span.data.strip():
            if growing:
                yield growing.span()
            growing = None
        elif growing:
            growing.add(b"\n" + span.data, 1 + span.length)
        else:
            growing = _Growing(span.line, 1, span.byte, limit)
            growing.add(span.data, span.length)
    if growing:
        yield growing.span()


STRUCTURE = re.compile(rb'["\[\]{},]')
IN_STRING = re.compile(rb'["\\]')


def array_elements(pieces: Iterable[bytes], begin: int, limit: int) -> Iterator[Span]:
    """The elements of one JSON array, cut at its own commas; what is between them is for `json` to judge.

    Brackets and strings are all it knows, so that a malformed element spoils neither the next one nor the memory.
    """
    cursor = Span(1, 1, begin, b"", 0)
    growing = _Growing(1, 1, begin, limit)
    depth, in_string, after_comma, closed = 0, False, False, False
    skip = 0
    for piece in pieces:
        taken, look, skip = 0, skip, 0
        while match := (IN_STRING if in_string else STRUCTURE).search(piece, look):
            if closed:
                break
            look = match.end()
            mark = match.group()
            if in_string:
                if mark == b'"':
                    in_string = False
                else:
                    look += 1  # the escaped character, which may be the next piece's first
            elif mark == b'"':
                in_string = True
            elif (depth == 1 and mark in b",]") or (depth == 0 and mark == b"["):
                data = piece[taken : match.start()]
                growing.add(data)
                element = _trimmed(growing.span())
                if element.data or after_comma or (mark == b"," and depth == 1):
                    yield element
                cursor = Span(*cursor.at(piece[taken : match.end()]), b"", 0)
                growing = _Growing(cursor.line, cursor.column, cursor.byte, limit)
                taken = match.end()
                depth = 0 if mark == b"]" else 1
                closed = mark == b"]"
                after_comma = mark == b","
            elif mark in b"[{":
                depth += 1
            elif mark in b"]}" and depth > 1:
                depth -= 1
        skip = max(0, look - len(piece))
        growing.add(piece[taken:])
        cursor = Span(*cursor.at(piece[taken:]), b"", 0)
    rest = _trimmed(growing.span())
    if closed and rest.data:
        yield replace(rest, fault="data after the array's end; want one array a file")
    elif not closed:
        yield replace(rest, fault="the file ends before the array is closed with ']'")


def _trimmed(span: Span) -> Span:
    data = span.data.lstrip(b" \t\r\n")
    before = span.data[: len(span.data) - len(data)]
    line, column, byte = span.at(before)
    return replace(span, line=line, column=column, byte=byte, data=data.rstrip(b" \t\r\n"))
