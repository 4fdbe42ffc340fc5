"""CSV and Parquet: from a stream to rows."""

from __future__ import annotations

import csv
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from pipelines.ingest.formats import PIECE_BYTES, Stream, stream_rows
from pipelines.ingest.rows import Place, Reject, Row
from pipelines.ingest.settings import ReadSettings, SourceSettings
from pipelines.stage import StageFailure


def table_rows(name: str, stream: Stream, settings: SourceSettings, limits: ReadSettings) -> Iterator[Row]:
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


def _copy_text(name: str, stream: Stream, file: BinaryIO, limits: ReadSettings) -> int:
    """Copy a text file as clean UTF-8 with plain newlines; how many characters were replaced."""
    replaced = 0
    for row in stream_rows(name, stream, SourceSettings(source="text", unit="line"), limits):
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
