"""CSV and TSV, exactly: every value is the text that stands in the file, and a line that the dialect can't explain is a bad record.

`quotes = "standard"` is RFC 4180. A field that begins with a quote ends at the next quote that isn't doubled, and a delimiter or the
line's end must follow it. Quotes inside a field that doesn't begin with one are ordinary characters. Python's `csv` reads the same
dialect, but it drops an error's place, holds a record of any size, and lets an unclosed quote swallow the lines behind it. Here each line
that a faulty quote spans counts as a bad record, since rows and text can't be told apart there. Blank lines are skipped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pipelines.ingest.formats import decode, invalid_bytes, reject
from pipelines.ingest.rows import Place, Reject, Row
from pipelines.ingest.settings import ReadSettings, SourceSettings
from pipelines.ingest.spans import Growing, Span, lines
from pipelines.ingest.streams import Stream, text_pieces
from pipelines.ingest.templates import listed
from pipelines.stage import StageFailure

QUOTED = re.compile(r'[^"]*(?:""[^"]*)*')
OTHER_DELIMITERS = (";", "\t", "|", ",")


@dataclass(frozen=True)
class _Record:
    """The fields of one record, or why it has none."""

    span: Span
    lines: int
    fields: list[str]
    fault: str = ""


class _Faulty(Exception):
    """A line that the dialect can't explain."""


class _Fields:
    """The fields of one record, line after line."""

    def __init__(self, delimiter: str) -> None:
        self._delimiter = delimiter
        self.fields: list[str] = []
        self._open: list[str] | None = None
        """The lines so far of a quoted field that hasn't ended."""

    def add(self, line: str) -> bool:
        """Whether the record ends with this line; `_Faulty` where it's malformed."""
        at = 0
        if self._open is None and '"' not in line:
            self.fields = line.removesuffix("\r").split(self._delimiter)
            return True
        while True:
            if self._open is None and not line.startswith('"', at):
                end = line.find(self._delimiter, at)
                self.fields.append(line[at:end] if end >= 0 else line[at:].removesuffix("\r"))
                if end < 0:
                    return True
                at = end + 1
                continue
            at += self._open is None
            quoted = QUOTED.match(line, at)
            assert quoted is not None
            parts = [] if self._open is None else self._open
            parts.append(quoted.group().replace('""', '"'))
            at = quoted.end()
            if at == len(line):
                parts.append("\n")
                self._open = parts
                return False
            self._open = None
            self.fields.append("".join(parts))
            after = line[at + 1 :]
            if after in ("", "\r"):
                return True
            if not after.startswith(self._delimiter):
                raise _Faulty(self._misplaced(line[:at], after))
            at += 2

    def forget(self) -> None:
        """Drop the text of a quoted field that is too long to be kept, and go on looking for its end."""
        if self._open is not None:
            self._open = []

    @staticmethod
    def _misplaced(before: str, after: str) -> str:
        found = f"{after[:20]!r} behind a closing quote, expected the delimiter or the line's end"
        if before.endswith("\\"):
            return f'{found}; \\" is not an escape in CSV, where a quote inside a field is doubled: ""'
        return f'{found}; a quote inside a quoted field must be doubled, and quotes = "none" takes quotes as ordinary characters'


def csv_rows(
    name: str, stream: Stream, settings: SourceSettings, limits: ReadSettings, asked: Iterable[str] | None
) -> Iterator[Row | Reject]:
    """The rows of a CSV or TSV file, with the line that each begins on; StageFailure where the header can't be used."""
    pieces, begin = text_pieces(name, stream, settings.encoding)
    records = _records(lines(pieces, begin, limits.max_record_bytes), settings, limits)
    header = list(settings.columns)
    if not header:
        first = next(records, None)
        if first is None:
            return
        header = _header(name, first, settings, asked)
    for number, record in enumerate(records, start=1):
        yield _row(name, number, record, header, settings, limits)


def _records(physical: Iterator[Span], settings: SourceSettings, limits: ReadSettings) -> Iterator[_Record]:
    quoted = settings.dialect() == "standard"
    errors = "replace" if limits.encoding_errors == "replace" else "surrogateescape"
    growing: Growing | None = None
    fields = _Fields(settings.delimiter)
    count = 0
    for line in physical:
        if growing is None:
            if line.data in (b"", b"\r"):
                continue
            growing, fields, count = Growing(line.line, 1, line.byte, limits.max_record_bytes), _Fields(settings.delimiter), 0
        else:
            growing.add(b"\n")
        growing.add(line.data, line.length)
        count += 1
        try:
            text = line.data.decode("utf-8", errors)
            if line.fault:
                raise _Faulty(line.fault)
            ended = True
            if quoted:
                ended = fields.add(text)
            else:
                fields.fields = text.removesuffix("\r").split(settings.delimiter)
        except _Faulty as fault:
            yield _Record(growing.span(), count, [], str(fault))
            growing = None
        else:
            if ended:
                yield _Record(growing.span(), count, fields.fields)
                growing = None
            elif growing.is_too_long():
                fields.forget()
    if growing is not None:
        yield _Record(growing.span(), count, [], 'a quote that opens a field here is never closed; quotes = "none" takes it as a character')


def _header(name: str, record: _Record, settings: SourceSettings, asked: Iterable[str] | None) -> list[str]:
    header = record.fields
    if fault := record.fault or record.span.fault:
        raise StageFailure(f"{name}, line {record.span.line}: the header can't be read: {fault}")
    try:
        record.span.data.decode("utf-8")
    except UnicodeDecodeError as error:
        invalid = invalid_bytes(name, 0, record.span, settings.encoding, error)
        raise StageFailure(f"{invalid.place}: the header can't be read: {invalid.reason}") from error
    if header[0].lower().startswith("sep="):
        raise StageFailure(
            f"{name}: the first line, {settings.delimiter.join(header)!r}, tells a spreadsheet the delimiter and is no header; remove it"
        )
    if len(set(header)) < len(header):
        raise StageFailure(
            f"{name}: two columns have one name in {listed(dict.fromkeys(header))}; rename one, or set columns if there is no header"
        )
    if len(header) == 1 and header[0] not in (asked or ()):
        for other in OTHER_DELIMITERS:
            if other != settings.delimiter and other in header[0]:
                raise StageFailure(
                    f"{name}: the header is one column, {header[0][:60]!r}, with delimiter = {settings.delimiter!r}; "
                    f"set delimiter = {_toml_quoted(other)}, or columns if there is no header"
                )
    return header


def _toml_quoted(delimiter: str) -> str:
    """As it's written in TOML."""
    return '"\\t"' if delimiter == "\t" else f'"{delimiter}"'


def _row(name: str, number: int, record: _Record, header: list[str], settings: SourceSettings, limits: ReadSettings) -> Row | Reject:
    span = record.span
    if fault := span.fault or record.fault:
        through = f" (lines {span.line} to {span.line + record.lines - 1})" if record.lines > 1 else ""
        return reject(name, number, span, b"", fault + through, record.lines)
    try:
        _, replaced = decode(span.data, limits.encoding_errors)
    except UnicodeDecodeError as error:
        return invalid_bytes(name, number, span, settings.encoding, error, record.lines)
    if (nul := span.data.find(b"\0")) >= 0:
        return reject(name, number, span, span.data[:nul], "a NUL character; is this a binary file?", record.lines)
    if len(record.fields) != len(header):
        return reject(name, number, span, b"", _wrong_width(record, header, settings), record.lines)
    place = Place(name, number, span.line, span.column, span.byte)
    return Row(place, dict(zip(header, record.fields, strict=True)), replaced)


def _wrong_width(record: _Record, header: list[str], settings: SourceSettings) -> str:
    found = f"{len(record.fields)} fields, expected {len(header)} ({listed(dict.fromkeys(header))})"
    if record.lines > 1:
        last = record.span.line + record.lines - 1
        return f'{found}; a quoted field goes on to line {last}: if a quote is no more than a character, set quotes = "none"'
    if settings.dialect() == "none" and any(field.startswith('"') for field in record.fields):
        return f'{found}; if quotes enclose fields in this file, set quotes = "standard"'
    if settings.dialect() == "standard" and any(re.match(r'\s+"', field) for field in record.fields):
        return f"{found}; a quote opens a field only directly behind the delimiter, so remove the space before it"
    return found
