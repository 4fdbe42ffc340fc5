"""JSON cut into records: one value after another, the elements of an array, or of an array inside a document.

Brackets, commas and strings are all that is understood here, so a malformed record spoils neither the next one nor the memory;
what is between them is for `json` to judge.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Generator, Iterable, Iterator
from dataclasses import replace

from pipelines.ingest.spans import Growing, Span, lines, trimmed

STRUCTURE = re.compile(rb'["\[\]{},]')
IN_STRING = re.compile(rb'["\\]')
TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|["\[\]{},]', re.DOTALL)
"""A whole string, a bracket or a comma; a quote by itself opens a string that doesn't end here."""

STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
NOT_STRUCTURE = bytes(set(range(256)) - set(b'"[]{}'))

Cursor = tuple[int, int, int]
"""Line, column and byte."""


def _moved(cursor: Cursor, over: bytes) -> Cursor:
    return Span(*cursor, b"", 0).at(over)


# ---- one value after another ----


def json_values(pieces: Iterable[bytes], begin: int, limit: int) -> Iterator[Span]:
    """JSON values one after another: one a line, over several lines, or several on a line.

    A value that is broken off costs itself only: it ends with its line inside a string, and otherwise before a line that begins with
    `{` where no value can stand.
    """
    value: Growing | None = None
    scan = _Scan()
    for line in lines(pieces, begin, limit):
        rest: Span | None = line
        while rest is not None:
            if value is None:
                if not rest.data.strip():
                    break
                rest = trimmed(rest)
                if rest.fault or _is_one_object(rest.data) or rest.data[:1] not in (b"{", b"[", b'"'):
                    yield rest
                    break
                value, scan = Growing(rest.line, rest.column, rest.byte, limit), _Scan()
            elif rest.fault:
                value.add(b"\n" + rest.data, 1 + rest.length)
                yield value.span()
                value = None
                break
            elif rest.data.lstrip().startswith(b"{") and not scan.admits_a_value():
                yield value.span()
                value = None
                continue
            else:
                value.add(b"\n")
            end = scan.end_of_value(rest.data)
            after = rest.data[end:].lstrip() if end is not None else b""
            if end is None or (after and after[:1] not in (b"{", b"[", b'"')):
                value.add(rest.data)  # still open, or followed by what can't follow
                following = None
            else:
                value.add(rest.data[:end])
                following = Span(*rest.at(rest.data[:end]), rest.data[end:], len(rest.data) - end) if after else None
            if end is not None:
                yield value.span()
                value = None
            rest = following
    if value is not None:
        yield value.span("the file ends before the JSON value that begins here is closed")


def _is_one_object(data: bytes) -> bool:
    """Whether a line is one object from its first bracket to its last, as in JSON lines: the quick way for nearly all lines."""
    structure = STRING.sub(b"", data).translate(None, NOT_STRUCTURE)
    if not (structure.startswith(b"{") and structure.endswith(b"}") and data.endswith(b"}")):
        return False
    inside = structure[1:-1]
    while inside != (less := inside.replace(b"{}", b"").replace(b"[]", b"")):
        inside = less
    return not inside


class _Scan:
    """Which brackets of a value are open, line after line."""

    def __init__(self) -> None:
        self._open = bytearray()
        self._last = b""

    def end_of_value(self, data: bytes) -> int | None:
        """Where the value ends in this line; None if it goes on in the next one."""
        for match in TOKEN.finditer(data):
            token = match.group()
            if token == b'"':
                return len(data)  # a line can't end inside a string: malformed
            if token in b"[{":
                self._open += token
            elif token in b"]}" and self._open:
                self._open.pop()
            if not self._open:
                return match.end()
        self._last = data.rstrip()[-1:] or self._last
        return None

    def admits_a_value(self) -> bool:
        return self._last in (b":", b"[") or (self._last == b"," and self._open.endswith(b"["))


# ---- the elements of an array ----


def array_elements(pieces: Iterable[bytes], begin: int, limit: int) -> Iterator[Span]:
    """The elements of one JSON array that is the whole file, cut at its own commas."""
    pieces = iter(pieces)
    closed = yield from _elements(pieces, (1, 1, begin), limit)
    if closed is not None:
        rest, cursor = closed
        growing = Growing(*cursor, limit)
        for piece in itertools.chain([rest], pieces):
            growing.add(piece)
        if (after := trimmed(growing.span())).data:
            yield replace(after, fault="data after the array's end; expected one array a file")


def _elements(pieces: Iterator[bytes], cursor: Cursor, limit: int) -> Generator[Span, None, tuple[bytes, Cursor] | None]:
    """Yield the elements of the array that the first piece begins with; return what follows it, and where."""
    growing = Growing(*cursor, limit)
    depth, in_string, after_comma = 0, False, False
    skip = 0
    for piece in pieces:
        taken, look, skip = 0, skip, 0
        while match := (IN_STRING if in_string else STRUCTURE).search(piece, look):
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
                growing.add(piece[taken : match.start()])
                element = trimmed(growing.span())
                if element.data or after_comma or (mark == b"," and depth == 1):
                    yield element
                cursor = _moved(cursor, piece[taken : match.end()])
                growing = Growing(*cursor, limit)
                taken = match.end()
                if mark == b"]":
                    return piece[taken:], cursor
                depth = 1
                after_comma = mark == b","
            elif mark in b"[{":
                depth += 1
            elif mark in b"]}" and depth > 1:
                depth -= 1
        skip = max(0, look - len(piece))
        growing.add(piece[taken:])
        cursor = _moved(cursor, piece[taken:])
    yield replace(trimmed(growing.span()), fault="the file ends before the array is closed with ']'")
    return None


# ---- an array inside a document ----


def elements_at(path: str, pieces: Iterable[bytes], begin: int, limit: int) -> Iterator[Span]:
    """The elements of the array at `path` ("data.examples", by keys or indices) in each document of a file, wherever it stands in there.

    A document without such an array is a span with a fault.
    """
    pieces = iter(pieces)
    way = _Way(path)
    cursor: Cursor = (1, 1, begin)
    document: Cursor | None = None
    blank = True
    buffer, at = b"", 0
    while True:
        used, event = way.follow(buffer, at)
        cursor, at = _moved(cursor, buffer[at:used]), used
        match event:
            case "document":
                document = cursor
            case "records":
                closed = yield from _elements(itertools.chain([buffer[at:]], pieces), cursor, limit)
                if closed is None:
                    return
                (buffer, cursor), at = closed, 0
            case "missing":
                yield Span(*(document or cursor), b"", 0, way.fault())
            case "":
                blank = blank and not buffer.strip()
                buffer, at = buffer[at:], 0
                if len(buffer) > limit:
                    reason = f"before the records, a string longer than max_record_bytes = {limit:,}"
                    yield Span(*cursor, buffer[:limit], len(buffer), reason)
                    return
                piece = next(pieces, None)
                if piece is None:
                    break
                buffer += piece
    if way.is_open():
        yield Span(*(document or cursor), b"", 0, "the file ends before the document is closed")
    elif document is None and not blank:
        yield Span(1, 1, begin, b"", 0, "malformed JSON: no document begins here, expected an object or a list")


class _Way:
    """Follows the brackets of each document to the array at one path."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._keys = path.split(".")
        self._here: list[tuple[bytes, str]] = []
        """The open brackets, each with the key or index that is being read in it."""
        self._expects_key = False
        self._begun = self._found = False
        """Of the document that is being read: whether it was reported, and whether it has the array."""
        self._is_list = False
        self._nearest: dict[int, list[str]] = {}
        """By depth of agreement with the path, the keys that stand there."""

    def follow(self, data: bytes, begin: int) -> tuple[int, str]:
        """How far the bytes were read from `begin`, and what is there.

        "document": one begins; "records": its wanted array begins; "missing": it ended without one; "": more bytes are needed.
        """
        for match in TOKEN.finditer(data, begin):
            token = match.group()
            if token == b'"':
                return match.start(), ""
            if not self._here and token in (b",", b"]", b"}"):
                continue
            if not self._begun:
                self._begun, self._found, self._is_list, self._nearest = True, False, token == b"[", {}
                return match.start(), "document"
            if token[:1] == b'"':
                self._string(token)
            elif token == b"[" and [key for _, key in self._here] == self._keys:
                self._found = True
                return match.start(), "records"
            else:
                self._bracket(token)
            if not self._here:
                self._begun = False
                if not self._found:
                    return match.end(), "missing"
        return len(data), ""

    def is_open(self) -> bool:
        return bool(self._here)

    def fault(self) -> str:
        """Why a document has no records."""
        if self._is_list and not self._keys[0].isdecimal():
            return f'records = "{self._path}" leads to no list: the document is a list itself; remove records'
        depth = max(self._nearest, default=0)
        where = ".".join(self._keys[:depth])
        keys = ", ".join(self._nearest.get(depth, [])) or "none"
        return f'records = "{self._path}" leads to no list; {f"{where!r} has" if where else "the document has"} the keys: {keys}'

    def _string(self, token: bytes) -> None:
        if not (self._expects_key and self._here):
            return
        self._expects_key = False
        try:
            key = str(json.loads(token))
        except ValueError:
            key = token.decode("utf-8", "replace")
        self._here[-1] = (b"{", key)
        above = [key for _, key in self._here[:-1]]
        if above == self._keys[: len(above)]:
            nearest = self._nearest.setdefault(len(above), [])
            if key not in nearest and len(nearest) < 30:
                nearest.append(key)

    def _bracket(self, token: bytes) -> None:
        match token:
            case b"{":
                self._here.append((token, ""))
                self._expects_key = True
            case b"[":
                self._here.append((token, "0"))
                self._expects_key = False
            case b",":
                if self._here and self._here[-1][0] == b"[":
                    self._here[-1] = (b"[", str(int(self._here[-1][1]) + 1))
                self._expects_key = bool(self._here) and self._here[-1][0] == b"{"
            case _:
                if self._here:
                    self._here.pop()
                self._expects_key = False
