"""Outside files as records, each with the place it stands at: text, JSON lines, JSON arrays, CSV and Parquet, plain or compressed.

    file --> pieces (decompressed bytes) --> spans (the bytes of one record, and their place) --> rows, or rejects with the reason

Text and JSON are read in pieces, and never more than `max_record_bytes` of a record are held: a longer one becomes a reject.
`datasets` reads CSV and Parquet; for the other formats it accepts invalid UTF-8 in silence and can't name a line.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from pipelines.ingest.formats import PIECE_BYTES, Stream, stream_rows
from pipelines.ingest.rows import Reject, Row
from pipelines.ingest.settings import ReadSettings, SourceSettings
from pipelines.ingest.tables import table_rows
from pipelines.stage import Source, StageContext, StageFailure


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
            reads = table_rows if settings.source in ("csv", "parquet") else stream_rows
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

    def __init__(self, name: str, stream: Stream) -> None:
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


def _decompressed(name: str, stream: Stream) -> Stream:
    opens: dict[str, Callable[[Any], Any]] = {
        ".gz": lambda file: gzip.GzipFile(fileobj=file),
        ".bz2": bz2.BZ2File,
        ".xz": lzma.LZMAFile,
    }
    suffix = Path(name).suffix.lower()
    return _Decompressed(name, opens[suffix](stream)) if suffix in opens else stream
