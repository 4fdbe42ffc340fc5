"""A source's bytes on their way to a format: counted, decompressed, unpacked, and converted to UTF-8 with newlines.

Everything starts from the one stream that `StageContext.open` gives, whose bytes are hashed as they are read. What can't be read
forwards only (zip, Parquet) is copied beside the stage's output first, into a file without a name.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO, Protocol, cast

from pipelines.ingest.files import ARCHIVES, natural_order
from pipelines.stage import StageFailure

PIECE_BYTES = 1 << 20
FIRST_BYTES = 512
FREE_BYTES = 16 * 2**20
"""What every compressed file may grow to, whatever `max_growth` says: small files of one repeated line are compressed very well."""

MAGIC = (
    (b"\x1f\x8b", "gzip data: rename it so that it ends with .gz"),
    (b"\x28\xb5\x2f\xfd", "zstd data: rename it so that it ends with .zst"),
    (b"\xfd7zXZ\x00", "xz data: rename it so that it ends with .xz"),
    (b"BZh", "bzip2 data: rename it so that it ends with .bz2"),
    (b"\x04\x22\x4d\x18", "lz4 data: decompress it first"),
    (b"PK\x03\x04", "a zip archive: rename it so that it ends with .zip"),
    (b"PAR1\x15", 'a Parquet file: set source = "parquet"'),
    (b"ARROW1\x00\x00", "an Arrow IPC file: convert it to Parquet"),
    (b"SQLite format 3\x00", "an SQLite database: export its tables as CSV"),
    (b"%PDF-", "a PDF: extract its text first"),
    (b"version https://git-lfs.github.com/spec/", "a Git LFS pointer and not the file itself: fetch it with `git lfs pull`"),
)


CERTAIN_CHARACTERS = 10
"""A character of Chinese in GBK is one of UTF-8 by chance in about 1 of 7 cases; a run of ten, in 1 of 10^8 files."""


class Stream(Protocol):
    def read(self, size: int = -1, /) -> bytes: ...


class Counted:
    """A stream that reports how many bytes were read."""

    def __init__(self, stream: BinaryIO, report: Callable[[int], None]) -> None:
        self._stream = stream
        self._report = report

    def read(self, size: int = -1, /) -> bytes:
        data = self._stream.read(size)
        self._report(len(data))
        return data


class Peeked:
    """A stream whose first bytes can be looked at before they are read."""

    def __init__(self, stream: Stream, size: int = FIRST_BYTES) -> None:
        self._stream = stream
        self._ahead = b""
        while len(self._ahead) < size and (more := stream.read(size - len(self._ahead))):
            self._ahead += more
        self.first = self._ahead

    def read(self, size: int = -1, /) -> bytes:
        if not self._ahead:
            return self._stream.read(size)
        size = len(self._ahead) if size < 0 else size
        data, self._ahead = self._ahead[:size], self._ahead[size:]
        return data


class _Ceiling:
    """How much a compressed file, with everything in it, may grow to."""

    def __init__(self, name: str, size: int, max_growth: int) -> None:
        self._name = name
        self._size = size
        self._max_growth = max_growth
        self._limit = max(FREE_BYTES, size * max_growth)
        self._grown = 0

    def add(self, size: int) -> None:
        self._grown += size
        if self._grown > self._limit:
            raise StageFailure(
                f"{self._name}: {self._size:,} compressed bytes grow to more than {self._limit:,}: the limit is {self._max_growth:,} times "
                "as many (max_growth), and 16 MiB in any case; if its content is sound, set a higher max_growth"
            )


class _Decompressed:
    """A decompressed stream that names damage with the file's name, and counts against the ceiling."""

    def __init__(self, name: str, stream: Stream, ceiling: _Ceiling) -> None:
        self._name = name
        self._stream = stream
        self._ceiling = ceiling
        self._byte = 0

    def read(self, size: int = -1, /) -> bytes:
        try:
            data = self._stream.read(size)
        except (EOFError, OSError, zlib.error, lzma.LZMAError, zipfile.BadZipFile) as error:
            raise StageFailure(
                f"{self._name}: can't be decompressed after byte {self._byte:,} of its content: {error}; fetch or compress it again"
            ) from error
        self._byte += len(data)
        self._ceiling.add(len(data))
        return data


def contents(name: str, stream: Stream, size: int, source: str, max_growth: int, folder: Path) -> Iterator[tuple[str, Stream]]:
    """The files in a file, each with its name: one for all but zip archives, whose members follow in the order of their names.

    StageFailure where the first bytes show that a file isn't what its name or `source` says. `folder` takes copies for a while.
    """
    ceiling = _Ceiling(name, size, max_growth)
    raw = Peeked(stream)
    if Path(name).suffix.lower() != ".zip" or not raw.first:
        yield name, _one_file(name, raw, source, ceiling)
        return
    _refuse_disguise(name, raw.first, source, but=b"PK")
    with TemporaryFile(dir=folder) as copy:
        shutil.copyfileobj(cast(BinaryIO, raw), copy, PIECE_BYTES)
        yield from _members(name, copy, source, ceiling)


def _one_file(name: str, raw: Peeked, source: str, ceiling: _Ceiling) -> Stream:
    opens: dict[str, tuple[Callable[[Any], Any], bytes]] = {
        ".gz": (lambda file: gzip.GzipFile(fileobj=file), b"\x1f\x8b"),
        ".bz2": (bz2.BZ2File, b"BZ"),
        ".xz": (lzma.LZMAFile, b"\xfd7zXZ"),
        ".zst": (_zstd, b"\x28\xb5\x2f\xfd"),
    }
    suffix = Path(name).suffix.lower()
    if suffix not in opens or not raw.first:
        _refuse_disguise(name, raw.first, source)
        return raw
    opened, magic = opens[suffix]
    _refuse_disguise(name, raw.first, source, but=magic)
    inside = Peeked(_Decompressed(name, opened(raw), ceiling))
    _refuse_disguise(name, inside.first, source)
    return inside


def _members(name: str, archive: BinaryIO, source: str, ceiling: _Ceiling) -> Iterator[tuple[str, Stream]]:
    try:
        unpacked = zipfile.ZipFile(archive)
    except zipfile.BadZipFile as error:
        raise StageFailure(f"{name}: not readable as zip: {error}; fetch it again") from error
    with unpacked:
        members = [each for each in unpacked.infolist() if not each.is_dir() and not _is_hidden(each.filename)]
        if not members:
            raise StageFailure(f"{name}: the archive has no files")
        for member in sorted(members, key=lambda each: natural_order(each.filename)):
            inside = f"{name}/{member.filename}"
            if inside.lower().endswith((".zip", *ARCHIVES)):
                raise StageFailure(f"{inside}: an archive inside an archive, which isn't read; unpack the outer one first")
            try:
                opened = unpacked.open(member)
            except (RuntimeError, NotImplementedError, zipfile.BadZipFile) as error:  # encrypted, or an unknown method
                raise StageFailure(f"{inside}: can't be unpacked: {error}; unpack the archive yourself and name its files") from error
            with opened:
                yield inside, _one_file(inside, Peeked(_Decompressed(inside, cast(Stream, opened), ceiling)), source, ceiling)


def _is_hidden(member: str) -> bool:
    """Folders such as __MACOSX, and names that begin with a dot, are no content."""
    return any(part.startswith(".") or part == "__MACOSX" for part in member.split("/"))


def _refuse_disguise(name: str, first: bytes, source: str, but: bytes | None = None) -> None:
    if but is not None and first.startswith(but):
        return
    if source == "parquet" and first.startswith(b"PAR1"):
        return
    for magic, advice in MAGIC:
        if first.startswith(magic) and (magic != b"BZh" or first[4:10] == b"1AY&SY"):
            raise StageFailure(f"{name}: is {advice}")
    if first[257:262] == b"ustar":
        raise StageFailure(f"{name}: is a tar archive: unpack it first")
    text = first.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if source != "text" and text.startswith((b"<!doctype html", b"<html", b"<?xml")):
        page = "an XML document" if text.startswith(b"<?xml") else "an HTML page"
        raise StageFailure(f"{name}: is {page}, perhaps an error page that was saved in its place; download the file again")


def _zstd(stream: Stream) -> Stream:
    import pyarrow

    return cast(Stream, pyarrow.CompressedInputStream(pyarrow.PythonFile(_Readable(stream), "r"), "zstd"))


class _Readable(io.RawIOBase):
    """A stream as the file object that pyarrow asks for."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes:
        return self._stream.read(size)


# ---- text ----


def text_pieces(name: str, stream: Stream, encoding: str) -> tuple[Iterator[bytes], int]:
    """The pieces of a text file as UTF-8 without a byte order mark, and how many bytes the mark took.

    Where a file's lines end with CR only, as old Macs wrote them, each becomes LF. Bytes that `encoding` doesn't have stay invalid
    UTF-8, so that the record that holds them can be named.
    """
    read = _utf8(name, stream, encoding)
    first = read()
    begin = len(codecs.BOM_UTF8) if first.startswith(codecs.BOM_UTF8) else 0
    cr_only = b"\r" in first[:-1] and b"\n" not in first

    def pieces() -> Iterator[bytes]:
        piece = first[begin:]
        while piece:
            yield piece.replace(b"\r", b"\n") if cr_only else piece
            piece = read()

    return pieces(), begin


def _utf8(name: str, stream: Stream, encoding: str) -> Callable[[], bytes]:
    if codecs.lookup(encoding).name in ("utf-8", "utf-8-sig"):
        return lambda: stream.read(PIECE_BYTES)
    codecs.register_error("gptline.keep", _keep)
    decoder = codecs.getincrementaldecoder(encoding)("gptline.keep")
    first = True
    ended = False

    def read() -> bytes:
        nonlocal first, ended
        converted = b""
        while not converted and not ended:
            data = stream.read(PIECE_BYTES)
            if first and _is_utf8(data):
                raise StageFailure(
                    f'{name}: is UTF-8 already, and encoding = "{encoding}" would make other characters of it; remove encoding'
                )
            first = False
            ended = not data
            converted = decoder.decode(data, final=ended).encode("utf-8", "surrogateescape")
        return converted

    return read


def _is_utf8(data: bytes) -> bool:
    """Whether there are so many characters of UTF-8, and nothing else, that another encoding can't have made them by chance."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(data)
    except UnicodeDecodeError:
        return False
    return sum(character > "\x7f" for character in text) >= CERTAIN_CHARACTERS


def _keep(error: UnicodeError) -> tuple[str, int]:
    """Bytes that can't be decoded become lone surrogates, which `surrogateescape` writes as those bytes again."""
    assert isinstance(error, UnicodeDecodeError)
    invalid = error.object[error.start : error.end]
    return "".join(chr(0xDC00 + byte) for byte in invalid if byte >= 0x80) or "\udcff", error.end


def likely_encoding(data: bytes) -> str:
    """What bytes that aren't UTF-8 are probably encoded in, by its first bytes or by what a sample looks like; empty if nothing is."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    sample = data[:PIECE_BYTES]
    low, high = sample[::2].count(0), sample[1::2].count(0)  # ASCII in UTF-16 has a zero in every second byte
    if max(low, high) > len(sample) // 4:
        return "utf-16-le" if high > low else "utf-16-be"
    try:
        text = codecs.getincrementaldecoder("gbk")().decode(sample, final=len(data) <= PIECE_BYTES)
    except UnicodeDecodeError:
        text = ""
    characters = [character for character in text if ord(character) > 0x7F]
    # a Western text can be valid GBK by chance, but it gives characters that nobody uses; those of GB 2312 are the common ones
    common = sum(bool(character.encode("gb2312", "ignore")) for character in characters)
    if characters and common >= 0.7 * len(characters):
        return "gbk"
    high = sum(byte >= 0x80 for byte in sample)
    if any(byte < 0x20 and byte not in b"\t\n\f\r" for byte in sample) or high > max(2, len(sample) // 2):
        return ""  # binary, or a script in which most letters are beyond ASCII
    return "cp1252" if any(0x80 <= byte < 0xA0 for byte in sample) else "latin-1"
