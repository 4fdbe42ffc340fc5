"""Parquet: the rows of a table, of which only the columns that a stage asks for are read.

Times and decimals become text (ISO 8601, and all digits), as JSON has neither. The file is read in batches of some megabytes, so memory
depends on the size of its pages (a megabyte, as a rule), and not on that of the file or its row groups.
"""

from __future__ import annotations

import datetime
import decimal
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

from pipelines.ingest.rows import Place, Row, Unreadable
from pipelines.stage import StageFailure

NOT_READ = Unreadable("no setting asks for it")
"""The value of a column that isn't read: its name still counts where a message lists the columns."""
BATCH_BYTES = 8 << 20
BATCH_ROWS = 1000


def parquet_rows(name: str, file: BinaryIO, asked: Iterable[str] | None) -> Iterator[tuple[Row, int, int]]:
    """Rows, each with its number and how many there are; StageFailure where the table, or a column that is read, can't be."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)
        schema = table.schema_arrow
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise StageFailure(f"{name}: not readable as parquet: {error}") from error
    wanted = _wanted(schema.names, asked)
    if twice := next((column for column in wanted if schema.names.count(column) > 1), None):
        raise StageFailure(f"{name}: two columns are called {twice!r}; rename one of them")
    not_read = dict.fromkeys(schema.names, NOT_READ)
    total = table.metadata.num_rows
    record = 0
    try:
        for batch in table.iter_batches(batch_size=_batch_rows(table.metadata), columns=wanted, use_threads=False):
            values = {column: _values(batch.column(column)) for column in wanted}
            for index in range(batch.num_rows):
                record += 1
                yield Row(Place(name, record), not_read | {column: values[column][index] for column in wanted}), record, total
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        culprit = _unreadable_column(table, wanted)
        raise StageFailure(f"{name}: {culprit}can't be read as parquet after record {record:,}: {error}") from error


def _wanted(names: list[str], asked: Iterable[str] | None) -> list[str]:
    """The columns that hold what is asked for, by name or by path; all of them for None."""
    if asked is None:
        return names
    wanted = set()
    for path in asked:
        path = path if path in names else path.removesuffix("?")
        wanted.add(path if path in names else path.split(".")[0])
    return [name for name in names if name in wanted]


def _batch_rows(metadata: Any) -> int:
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    row_bytes = max((group.total_byte_size / max(1, group.num_rows) for group in groups), default=1)
    return max(1, min(BATCH_ROWS, int(BATCH_BYTES / max(1, row_bytes))))


def _unreadable_column(table: Any, names: list[str]) -> str:
    """Which column is to blame, as the beginning of a sentence."""
    import pyarrow

    for column in names:
        try:
            for _ in table.iter_batches(batch_size=BATCH_ROWS, columns=[column], use_threads=False):
                pass
        except (pyarrow.ArrowException, OSError, ValueError):
            return f"column {column!r} "
    return ""


def _values(array: Any) -> list[Any]:
    """The values of a column as JSON's types; one that Python can't hold only fails the stage that asks for it."""
    convert = _plain if _has_foreign(array.type) else None
    try:
        values = array.to_pylist(maps_as_pydicts="strict")
    except Exception:  # text that isn't UTF-8, a date beyond Python's, a map with equal keys: by value, to find which
        values = [_value(scalar) for scalar in array]
    return [convert(value) for value in values] if convert else values


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py(maps_as_pydicts="strict")
    except Exception as error:
        return Unreadable(f"a value of type {scalar.type}: {error}")


def _has_foreign(kind: Any) -> bool:
    import pyarrow

    if kind.num_fields:
        return any(_has_foreign(kind.field(index).type) for index in range(kind.num_fields))
    if pyarrow.types.is_dictionary(kind):
        return _has_foreign(kind.value_type)
    return bool(pyarrow.types.is_temporal(kind) or pyarrow.types.is_decimal(kind))


def _plain(value: Any) -> Any:
    match value:
        case dict():
            return {key: _plain(each) for key, each in value.items()}
        case list():
            return [_plain(each) for each in value]
        case datetime.date() | datetime.time():  # a datetime is a date
            return value.isoformat()
        case decimal.Decimal():
            return str(value)
    return value
