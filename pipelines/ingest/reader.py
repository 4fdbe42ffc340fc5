"""The records of a stage's sources: text, JSON, CSV and Parquet, plain or compressed.

    file --> bytes (counted, decompressed) --> spans (the bytes of one record, and their place) --> rows, or rejects with the reason

A stage of your own that decides everything itself loops over `Reader(stage, config).rows(part)`; `gather` does the rest for the others.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from tempfile import TemporaryFile
from typing import BinaryIO, cast

from pipelines.ingest.delimited import csv_rows
from pipelines.ingest.formats import stream_rows
from pipelines.ingest.parquet import parquet_rows
from pipelines.ingest.rows import Reject, Row
from pipelines.ingest.settings import ReadSettings, SourceSettings
from pipelines.ingest.streams import PIECE_BYTES, Counted, Stream, contents
from pipelines.stage import Source, StageContext

ROWS_PER_REPORT = 100


class Reader:
    """Reads a stage's sources, reports progress in bytes and counts what it finds."""

    def __init__(self, stage: StageContext, settings: ReadSettings) -> None:
        self._stage = stage
        self._settings = settings
        self._bytes_total = sum(source.path.stat().st_size for source in stage.sources)
        self._bytes_done = self._bytes_reported = 0
        self.records = 0
        self.empty_files = 0
        self.replaced_characters = 0

    def rows(self, settings: SourceSettings, part: int = 0, asked: Iterable[str] | None = None) -> Iterator[Row | Reject]:
        """The records of the sources that this part of the mixture named, in order.

        `asked` are the columns (or paths) that will be used, so that others need not be read; None: all of them.
        """
        for source in self._stage.sources:
            if source.part == part:
                yield from self._file_rows(source, settings, None if asked is None else list(asked))

    def _file_rows(self, source: Source, settings: SourceSettings, asked: list[str] | None) -> Iterator[Row | Reject]:
        records_before = self.records
        size = source.path.stat().st_size
        with self._stage.open(source) as opened:
            counted = Counted(opened, self._count)
            for name, stream in contents(source.name, counted, size, settings.source or "", self._settings.max_growth, self._stage.output):
                for row in self._rows_of(name, stream, settings, asked):
                    if isinstance(row, Row):
                        self.records += 1
                        self.replaced_characters += row.replaced
                    else:
                        self.records += row.lines
                    yield row
        self.empty_files += self.records == records_before

    def _rows_of(self, name: str, stream: Stream, settings: SourceSettings, asked: list[str] | None) -> Iterator[Row | Reject]:
        match settings.source:
            case "csv":
                return csv_rows(name, stream, settings, self._settings, asked)
            case "parquet":
                return self._table_rows(name, stream, asked)
            case _:
                return stream_rows(name, stream, settings, self._settings)

    def _table_rows(self, name: str, stream: Stream, asked: list[str] | None) -> Iterator[Row]:
        """Parquet begins at its end, so it is read from a copy: then what is read is what was hashed."""
        with TemporaryFile(dir=self._stage.output) as copy:
            shutil.copyfileobj(cast(BinaryIO, stream), copy, PIECE_BYTES)
            if not copy.tell():
                return
            copy.seek(0)
            for row, done, total in parquet_rows(name, copy, asked):
                if done % ROWS_PER_REPORT == 0:
                    self._stage.progress(done, total, "records")
                yield row

    def _count(self, size: int) -> None:
        self._bytes_done += size
        if self._bytes_done - self._bytes_reported >= PIECE_BYTES or self._bytes_done == self._bytes_total > self._bytes_reported:
            self._stage.progress(self._bytes_done, self._bytes_total, "bytes")
            self._bytes_reported = self._bytes_done
