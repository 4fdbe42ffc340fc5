"""Parquet: rows become records, only the columns in use are read, and a fault names its column."""

import datetime
import decimal

import pyarrow
import pyarrow.parquet
import pytest

from pipelines.ingest.parquet import parquet_rows
from pipelines.stage import StageFailure

from .conftest import rejects, write_damaged_parquet

MIB = 2**20


@pytest.fixture
def table(data):
    def write(columns, **settings):
        pyarrow.parquet.write_table(pyarrow.table(columns), data / "a.parquet", **settings)

    return write


def test_parquet_rows_become_documents(ingested, data):
    pyarrow.parquet.write_table(pyarrow.table({"paragraphs": [["a", "b"], ["c"]], "id": [1, 2]}), data / "a.parquet")
    result = ingested({}, files=["a.parquet"], source="parquet", text="paragraphs", fields=["id"])
    assert [(record["text"], record["id"]) for record in result.documents.records("train")] == [("a\nb", 1), ("c", 2)]


def test_a_bad_row_of_a_table_is_named_by_its_record(ingested, data):
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), data / "a.parquet")
    with pytest.raises(StageFailure, match=r"a.parquet, record 1: column 'text' holds 1, expected a text"):
        ingested({}, files=["a.parquet"], source="parquet")


def test_times_and_decimals_are_kept_as_text_and_a_path_leads_into_a_column(ingested, table):
    table(
        {
            "meta": [{"title": "T", "tags": ["x", "y"], "on": datetime.date(2026, 1, 2)}],
            "when": [datetime.datetime(2026, 1, 1, 12)],
            "price": [decimal.Decimal("1.50")],
        }
    )
    result = ingested({}, files=["a.parquet"], source="parquet", text="{meta.title} {meta.tags.1}", fields=["when", "price", "meta.on"])
    (record,) = result.documents.records("train")
    assert record == {
        "text": "T y",
        "source": "a.parquet",
        "when": "2026-01-01T12:00:00",
        "price": "1.50",
        "meta.on": "2026-01-02",
    }


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (b"\0\1", r"b'\\x00\\x01', which JSON can't hold \(Object of type bytes is"),
        ({"raw": [b"a"]}, r"\{'raw': \[b'a'\]\}, which JSON can't hold \(Object of type bytes is"),
        (datetime.timedelta(1), r"datetime.timedelta.*, which JSON can't hold \(Object of type timedelta is"),
        (float("nan"), r"nan, which JSON can't hold \(Out of range float"),
    ],
)
def test_a_field_that_json_cannot_hold_is_named(ingested, table, value, found):
    table({"text": ["a"], "extra": [value]})
    with pytest.raises(StageFailure, match=rf"a.parquet, record 1: column 'extra' holds {found}.*; remove it from fields"):
        ingested({}, files=["a.parquet"], source="parquet", fields=["extra"])


def test_bytes_are_not_text(ingested, table):
    table({"text": [b"a"]})
    with pytest.raises(StageFailure, match="column 'text' holds b'a', expected a text or a list of texts"):
        ingested({}, files=["a.parquet"], source="parquet")


def test_damage_in_a_column_that_is_not_read_does_no_harm(ingested, data):
    write_damaged_parquet(data / "a.parquet", {"text": ["a", "b"]}, "noise")
    assert ingested({}, files=["a.parquet"], source="parquet").texts() == ["a", "b"]
    with pytest.raises(StageFailure, match=r"a.parquet: column 'noise' can't be read as parquet after record 0"):
        ingested({}, files=["a.parquet"], source="parquet", fields=["noise"])


@pytest.mark.parametrize(
    ("settings", "texts"),
    [
        ({"text": "meta.title?"}, ["T", "U"]),
        ({"text": ["{meta.title}", "absent?"]}, ["T\n", "U\n"]),
        ({"text": "meta.title", "hold_out": {"share": 0.001, "by": "meta.title"}}, ["T", "U"]),
        ({"text": "sure?"}, ["yes", "no"]),
    ],
)
def test_only_the_columns_that_an_expression_names_are_read(ingested, data, settings, texts):
    write_damaged_parquet(data / "a.parquet", {"meta": [{"title": "T"}, {"title": "U"}], "sure?": ["yes", "no"]}, "noise")
    if "hold_out" in settings:
        with pytest.raises(StageFailure, match="no held_out documents are left"):  # all were read, and 0.001 of two is none
            ingested({}, files=["a.parquet"], source="parquet", **settings)
    else:
        assert ingested({}, files=["a.parquet"], source="parquet", **settings).texts() == texts


def test_a_column_that_is_not_read_is_listed_where_another_one_is_missing(ingested, data):
    write_damaged_parquet(data / "a.parquet", {"title": ["T"], "n": [1]}, "noise")
    with pytest.raises(StageFailure, match="record 1: no column 'text'; there are: title, n, noise"):
        ingested({}, files=["a.parquet"], source="parquet")


def test_a_rejected_row_begins_with_what_was_read_of_it(ingested, data, output):
    write_damaged_parquet(data / "a.parquet", {"text": [7]}, "noise")
    with pytest.raises(StageFailure, match="column 'text' holds 7"):
        ingested({}, files=["a.parquet"], source="parquet")
    assert rejects(output)[0]["begins"] == '{"text": 7}'


def test_invalid_utf8_fails_only_its_row_and_only_if_its_column_is_read(ingested, table):
    broken = pyarrow.Array.from_buffers(
        pyarrow.string(), 2, [None, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"a\xff")]
    )
    table({"text": broken})
    with pytest.raises(StageFailure, match=r"a.parquet, record 2: column 'text' can't be read: a value of type string: .*utf-8"):
        ingested({}, files=["a.parquet"], source="parquet")


def test_a_missing_column_is_reported_with_all_columns(ingested, table):
    table({"title": ["t"], "body": ["b"]})
    with pytest.raises(StageFailure, match="no column 'text'; there are: title, body"):
        ingested({}, files=["a.parquet"], source="parquet", fields=["title"])


def test_two_columns_of_one_name_are_refused_where_that_name_is_asked_for(ingested, data):
    columns = [pyarrow.array(["a"]), pyarrow.array([1]), pyarrow.array([2])]
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(columns, names=["text", "id", "id"]), data / "a.parquet")
    assert ingested({}, files=["a.parquet"], source="parquet").texts() == ["a"]
    with pytest.raises(StageFailure, match=r"a.parquet: two columns are called 'id'; rename one of them"):
        ingested({}, files=["a.parquet"], source="parquet", fields=["id"])


def test_a_file_that_is_not_parquet_is_named(ingested):
    with pytest.raises(StageFailure, match=r"a.parquet: not readable as parquet: .*(magic bytes|footer)"):
        ingested({"a.parquet": b"PAR1 but no more than this"}, source="parquet")


def test_an_empty_file_and_a_table_without_rows_are_counted(ingested, table, data):
    table({"text": ["a"]})
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), data / "rows.parquet")
    result = ingested({"none.parquet": b""}, files=["*.parquet"], source="parquet")
    assert (result.texts(), result.metadata("empty_files")) == (["a"], 2)


def test_memory_depends_on_the_batch_and_not_on_the_row_group(table, data):
    # 64 documents of 1 MiB, each on a page of its own, in one row group; a batch holds 8
    table({"text": [f"{number} " + "x" * MIB for number in range(64)]}, compression="none", use_dictionary=False, write_batch_size=1)
    before = pyarrow.total_allocated_bytes()
    with (data / "a.parquet").open("rb") as file:
        held = [pyarrow.total_allocated_bytes() - before for _ in parquet_rows("a.parquet", file, None)]
    assert len(held) == 64
    assert max(held) < 32 * MIB
