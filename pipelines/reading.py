"""Outside files as records, each with the place it stands at: text, JSON lines, JSON arrays, CSV and Parquet, plain or compressed.

    file --> pieces (decompressed bytes) --> spans (the bytes of one record, and their place) --> rows, or rejects with the reason

Text and JSON are read in pieces, and never more than `max_record_bytes` of a record are held: a longer one becomes a reject.
`datasets` reads CSV and Parquet; for the other formats it accepts invalid UTF-8 in silence and can't name a line.
"""

from __future__ import annotations

import bz2
import csv
import difflib
import glob
import gzip
import itertools
import json
import lzma
import os
import re
import shutil
import string
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

from pydantic import Field, field_validator, model_validator

from gpt.settings import Settings
from pipelines.stage import Source, StageContext, StageFailure

PIECE_BYTES = 1 << 20
BEGINS_CHARS = 120
BOM = b"\xef\xbb\xbf"
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
CONTINUATION_BYTES = bytes(range(0x80, 0xC0))
ARCHIVES = (".zip", ".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")


class ReadSettings(Settings):
    """What holds for every source."""

    max_record_bytes: int = Field(default=16 * 2**20, ge=1)
    """A longer record, or text file read as one document, is a bad record."""
    encoding_errors: Literal["strict", "replace"] = "strict"
    """What invalid UTF-8 becomes: a bad record, or U+FFFD, counted."""


class SourceSettings(Settings):
    """Files of one format and how their columns become documents.

    `SourceSettings(source="json", files=("books/*.jsonl",), license="CC0-1.0", text="text", fields=("book",))`
    """

    source: Literal["text", "json", "csv", "parquet"] | None = None
    """Format. "json" is JSON lines or one JSON array, told apart by the first byte. .gz, .bz2 and .xz are decompressed."""
    files: tuple[str, ...] = ()
    """Names or globs, relative to the pipeline's `data`; `**` goes through folders. Read in this order,
    the files of a glob by name, 2 before 10."""
    license: str | None = None
    """SPDX identifier, carried into every record and the artifact's metadata."""
    unit: Literal["file", "paragraph", "line"] = "file"
    """source = "text": what one document is; a paragraph ends at a blank line."""
    text: str | tuple[str, ...] = "text"
    """Where a document's text is: a column, several columns (joined by newlines), or a template such as "{title}\\n{paragraphs}".
    A list of texts is joined by newlines; null counts as empty."""
    fields: tuple[str, ...] = ()
    """Further columns, kept in the record."""
    delimiter: str = ","
    """source = "csv": the one character that stands between two columns."""
    columns: tuple[str, ...] = ()
    """source = "csv": the columns' names, where the file has no header."""

    @field_validator("delimiter")
    @classmethod
    def _delimiter_can_part_columns(cls, value: str) -> str:
        if len(value) != 1 or value in '"\r\n\0':
            raise ValueError(f'is {value!r}, wanted one character that is no quote and no end of a line, such as ";" or "\\t"')
        return value

    @model_validator(mode="after")
    def _keys_have_an_effect(self) -> SourceSettings:
        without_effect = {
            "text": ("text", "fields", "delimiter", "columns"),
            "json": ("unit", "delimiter", "columns"),
            "csv": ("unit",),
            "parquet": ("unit", "delimiter", "columns"),
        }
        for key in without_effect.get(self.source or "", ()):
            if getattr(self, key) != SourceSettings.model_fields[key].default:
                raise ValueError(f'{key} = {getattr(self, key)!r} has no effect with source = "{self.source}"; remove it')
        return self

    @model_validator(mode="after")
    def _columns_are_named(self) -> SourceSettings:
        if isinstance(self.text, str) and "{" in self.text:
            for name in template_columns(self.text):
                if not name or re.search(r"[.\[\]!:]", name):
                    raise ValueError(f"text = {self.text!r}: {{{name}}} isn't a column's name alone; want, for instance, '{{title}}'")
        if taken := sorted({"text", "source", "license"} & set(self.fields)):
            raise ValueError(f"fields = {list(self.fields)}: {taken[0]!r} is a key of every record already; remove it")
        return self

    def expand(self, data: Path) -> list[str]:
        """The files' names in reading order; ValueError names what is missing, what can't be read, and the nearest names."""
        names: dict[str, str] = {}  # by the file itself: one that has several names is read once, by its first
        faults = []
        for pattern in self.files:
            found = {name for name in _matches(pattern, data) if (data / name).is_file()}
            if not found:
                faults.append(_nothing_found(data, pattern))
            for name in sorted(found, key=_natural_order):
                if names.setdefault(os.path.realpath(data / name), name) == name and (fault := _unreadable(data / name)):
                    faults.append(f"{name}: {fault}")
        if faults:
            raise ValueError("; ".join(faults))
        return list(names.values())


def template_columns(template: str) -> list[str]:
    """The columns that a template such as "{title}: {text}" names; ValueError where its braces don't match."""
    return [
        name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
        for _, name, spec, conversion in string.Formatter().parse(template)
        if name is not None
    ]


def _matches(pattern: str, root: Path) -> Iterator[str]:
    """As `glob` has it, but `**` enters a folder once: there are 2^40 paths through two links to their own folder."""
    stars = re.search(r"(?:^|(?<=/))\*\*(?:/+|$)", pattern)
    if stars is None:
        yield from glob.iglob(pattern, root_dir=root)
        return
    before, after = pattern[: stars.start()], pattern[stars.end() :] or "*"
    for top in glob.iglob(before, root_dir=root) if before else [""]:
        for folder in _folders(root / top):
            for name in _matches(after, root / top / folder):
                yield os.path.join(top, folder, name)


def _folders(root: Path) -> Iterator[str]:
    """`root` and each folder below that isn't hidden, relative to it: by its own name, or by a link's where it has no other there."""
    entered = set()
    tops = [""]
    for top in tops:  # grows by the links, which so come after all that can be reached without them
        for path, below, _ in os.walk(root / top):
            if (itself := os.path.realpath(path)) in entered:
                below.clear()
                continue
            entered.add(itself)
            below[:] = sorted(name for name in below if not name.startswith("."))
            folder = os.path.relpath(path, root)
            yield folder if folder != "." else ""
            tops += [os.path.join(folder, name) for name in below if os.path.islink(os.path.join(path, name))]


def _natural_order(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"([0-9]+)", name)]


def _nothing_found(data: Path, pattern: str) -> str:
    if not data.is_dir() and not os.path.isabs(pattern):
        return f"files: the data folder {data} doesn't exist; set `data` to the folder that has {pattern!r}"
    folder = data / pattern
    if folder.is_dir():
        return f"files: {pattern!r} is a folder; want files, for instance {pattern.rstrip('/') + '/*'!r}"
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    there = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    nearest = difflib.get_close_matches(Path(pattern).name, there, n=3, cutoff=0.3) or there[:3]
    return f"files: nothing matches {pattern!r} in {data}; {folder} has {', '.join(nearest) or 'no files'}"


def _unreadable(path: Path) -> str | None:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return "its name is not UTF-8, and no record could hold it; rename it"
    name = path.name.lower()
    if name.endswith(ARCHIVES):
        return "an archive of files; unpack it first"
    if name.endswith(".zst"):
        return "zstd isn't read; recompress it, for instance with `zstd -dc FILE.zst | xz > FILE.xz`"
    if not os.access(path, os.R_OK):
        return "no permission to read it; check its mode and owner"
    return None


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


class Reader:
    """Reads a stage's sources, tells its progress and counts what it meets."""

    def __init__(self, stage: StageContext, settings: ReadSettings) -> None:
        self._stage = stage
        self._settings = settings
        self._bytes_total = sum(source.path.stat().st_size for source in stage.sources)
        self._bytes_done = self._bytes_told = 0
        self.records = 0
        self.empty_files = 0
        self.replaced_characters = 0

    def rows(self, settings: SourceSettings, part: int = 0) -> Iterator[Row | Reject]:
        """The records of the stage's sources that this part of the mixture named, in order."""
        for source in self._stage.sources:
            if source.part == part:
                yield from self._file_rows(source, settings)

    def _file_rows(self, source: Source, settings: SourceSettings) -> Iterator[Row | Reject]:
        records_before = self.records
        with self._stage.open(source) as opened:
            stream = _decompressed(source.name, _Counted(opened, self._told))
            reads = _table_rows if settings.source in ("csv", "parquet") else _stream_rows
            for row in reads(source.name, stream, settings, self._settings):
                self.records += 1
                if isinstance(row, Row):
                    self.replaced_characters += row.replaced
                yield row
        self.empty_files += self.records == records_before

    def _told(self, size: int) -> None:
        self._bytes_done += size
        if self._bytes_done - self._bytes_told >= PIECE_BYTES or self._bytes_done == self._bytes_total > self._bytes_told:
            self._stage.progress(self._bytes_done, self._bytes_total, "bytes")
            self._bytes_told = self._bytes_done


class _Stream(Protocol):
    def read(self, size: int = -1, /) -> bytes: ...


class _Counted:
    def __init__(self, stream: BinaryIO, tell: Callable[[int], None]) -> None:
        self._stream = stream
        self._tell = tell

    def read(self, size: int = -1, /) -> bytes:
        data = self._stream.read(size)
        self._tell(len(data))
        return data


class _Decompressed:
    """A compressed stream whose damage is told with the file's name."""

    def __init__(self, name: str, stream: _Stream) -> None:
        self._name = name
        self._stream = stream
        self._byte = 0

    def read(self, size: int = -1, /) -> bytes:
        try:
            data = self._stream.read(size)
        except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            raise StageFailure(
                f"{self._name}: can't be decompressed after byte {self._byte:,} of its content: {error}; fetch or compress it again"
            ) from error
        self._byte += len(data)
        return data


def _decompressed(name: str, stream: _Stream) -> _Stream:
    opens: dict[str, Callable[[Any], Any]] = {
        ".gz": lambda file: gzip.GzipFile(fileobj=file),
        ".bz2": bz2.BZ2File,
        ".xz": lzma.LZMAFile,
    }
    suffix = Path(name).suffix.lower()
    return _Decompressed(name, opens[suffix](stream)) if suffix in opens else stream


def _stream_rows(name: str, stream: _Stream, settings: SourceSettings, limits: ReadSettings) -> Iterator[Row | Reject]:
    parse = _json_row if settings.source == "json" else _text_row
    for record, span in enumerate(_spans(stream, settings, limits.max_record_bytes), start=1):
        if span.fault:
            yield _reject(name, record, span, b"", span.fault)
        else:
            yield parse(name, record, span, limits.encoding_errors)


def _spans(stream: _Stream, settings: SourceSettings, limit: int) -> Iterator[Span]:
    first = stream.read(PIECE_BYTES)
    begin = len(BOM) if first.startswith(BOM) else 0
    pieces = itertools.chain([first[begin:]], iter(lambda: stream.read(PIECE_BYTES), b""))
    if settings.source == "json":
        is_array = first[begin:].lstrip().startswith(b"[")
        return array_elements(pieces, begin, limit) if is_array else (span for span in lines(pieces, begin, limit) if span.data.strip())
    return {"file": whole, "paragraph": paragraphs, "line": lines}[settings.unit](pieces, begin, limit)


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


def kind_of(value: object) -> str:
    """What a value is called in JSON's words, with the value where it is short."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, (int, float)):
        return f"the number {value}"
    names: dict[type, str] = {str: "a text", list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")


def _table_rows(name: str, stream: _Stream, settings: SourceSettings, limits: ReadSettings) -> Iterator[Row]:
    """Rows of CSV or Parquet; a file that `datasets` can't read is a failure as a whole.

    It reads by path, so a copy is made from the stage's stream: only then is what was read what was hashed.
    """
    from datasets import Features, IterableDataset, Value

    with tempfile.TemporaryDirectory(prefix="gptline-ingest-") as folder:
        copy = Path(folder) / f"table.{settings.source}"
        replaced = 0
        with open(copy, "wb") as file:
            if settings.source == "csv":
                replaced = _copy_text(name, stream, file, limits)
            else:
                shutil.copyfileobj(stream, file, PIECE_BYTES)
        if not copy.stat().st_size:
            return
        try:
            if settings.source == "parquet":
                table = IterableDataset.from_parquet(str(copy), cache_dir=folder, batch_size=1000)
            else:
                header = list(settings.columns) or _csv_header(name, copy, settings.delimiter)
                table = IterableDataset.from_csv(
                    str(copy),
                    cache_dir=folder,
                    delimiter=settings.delimiter,
                    names=header,
                    header=None if settings.columns else 0,
                    features=Features({column: Value("string") for column in header}),
                    keep_default_na=False,
                    index_col=False,  # or a first row with more fields than the header would shift all columns
                )
            warnings.filterwarnings("error", message="Length of header or names", module="datasets|pandas")
            for record, columns in enumerate(table, start=1):
                yield Row(Place(name, record), dict(columns), replaced if record == 1 else 0)
        except (ValueError, OSError, Warning) as error:
            raise StageFailure(f"{name}: not readable as {settings.source}: {error}") from error


def _copy_text(name: str, stream: _Stream, file: BinaryIO, limits: ReadSettings) -> int:
    """Copy a text file as clean UTF-8 with plain newlines; how many characters were replaced."""
    replaced = 0
    for row in _stream_rows(name, stream, SourceSettings(source="text", unit="line"), limits):
        if isinstance(row, Reject):
            raise StageFailure(
                f"{row.place}: {row.reason}; a CSV file is read as a whole or not at all: mend it, or take it out of `files`"
            )
        file.write(row.columns["text"].encode() + b"\n")
        replaced += row.replaced
    return replaced


def _csv_header(name: str, path: Path, delimiter: str) -> list[str]:
    with open(path, encoding="utf-8", newline="") as file:
        header: list[str] = next(csv.reader(file, delimiter=delimiter), [])
    if len(set(header)) < len(header):
        raise StageFailure(f"{name}: two columns have one name in {', '.join(header)}; give others, or `columns` if there is no header")
    return header
