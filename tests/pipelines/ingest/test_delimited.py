"""CSV and TSV: every value is the text in the file, or its line is a bad record."""

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.ingest.delimited import csv_rows
from pipelines.ingest.rows import Reject, Row
from pipelines.ingest.settings import ReadSettings, SourceSettings
from pipelines.stage import StageFailure

SKIP = {"on_bad_record": "skip", "max_bad_share": 1.0}


def read(content: bytes, limits: ReadSettings | None = None, **settings) -> list[Row | Reject]:
    source = SourceSettings(source="csv", files=("a.csv",), **settings)
    return list(csv_rows("a.csv", io.BytesIO(content), source, limits or ReadSettings(), None))


def values(content: bytes, **settings) -> list[dict[str, str] | str]:
    """The columns of every row, or the line and reason of a reject."""
    return [row.columns if isinstance(row, Row) else f"line {row.place.line}: {row.reason}" for row in read(content, **settings)]


def test_csv_keeps_every_value_as_its_text(ingested):
    table = b'text,id\n"one, ""two""\nthree",007\nNA,\n'
    result = ingested({"a.csv": table}, source="csv", fields=["id"])
    assert [(record["text"], record["id"]) for record in result.documents.records("train")] == [('one, "two"\nthree', "007"), ("NA", "")]


def test_a_csv_without_a_header_takes_its_columns_from_the_settings(ingested):
    settings = dict(source="csv", delimiter="\t", columns=["english", "chinese"], text="{english} = {chinese}")
    assert ingested({"a.tsv": "Hi.\t你好。\n".encode()}, **settings).texts() == ["Hi. = 你好。"]


def test_invalid_utf8_in_a_csv_is_named_by_its_byte(ingested):
    with pytest.raises(StageFailure, match=r"a.csv, line 2, column 2 \(byte 6\): invalid UTF-8: 0xff"):
        ingested({"a.csv": b"text\na\xff\n"}, source="csv")


# ---- quotes = "standard" ----


def test_a_delimiter_a_newline_and_a_doubled_quote_inside_quotes_are_text():
    assert values(b'id,text\n1,"a,b"\n2,"line one\n\nline three"\n3,"she said ""hi"""\n4,""\n') == [
        {"id": "1", "text": "a,b"},
        {"id": "2", "text": "line one\n\nline three"},
        {"id": "3", "text": 'she said "hi"'},
        {"id": "4", "text": ""},
    ]


def test_a_quote_inside_a_field_that_begins_without_one_is_a_character():
    assert values(b'text,b\n5" disk,one\nsixth" end, "x"\n') == [{"text": '5" disk', "b": "one"}, {"text": 'sixth" end', "b": ' "x"'}]


def test_crlf_inside_quotes_is_kept_and_at_a_lines_end_is_dropped(ingested):
    assert values(b'id,text\r\n1,"one\r\ntwo"\r\n2,three\r\n') == [{"id": "1", "text": "one\r\ntwo"}, {"id": "2", "text": "three"}]
    assert ingested({"a.csv": b'id,text\r\n1,"one\r\ntwo"\r\n'}, source="csv").texts() == ["one\ntwo"]


def test_characters_after_a_closing_quote_make_only_their_record_bad():
    assert values(b'text,b\n"Look," she said.,one\nsix,six\n') == [
        "line 2: ' she said.,one' behind a closing quote, expected the delimiter or the line's end; a quote inside a quoted field must be "
        'doubled, and quotes = "none" takes quotes as ordinary characters',
        {"text": "six", "b": "six"},
    ]


def test_a_backslash_escapes_nothing():
    fault, good = values(b'id,text\n1,"she said \\"hi\\""\n2,ok\n')
    assert fault.startswith("line 2: ")
    assert '\\" is not an escape in CSV, where a quote inside a field is doubled' in fault
    assert good == {"id": "2", "text": "ok"}


def test_an_unclosed_quote_counts_every_line_that_it_swallows_as_bad():
    # lines 3, 4 and 5 are inside the quote
    _, reject = read(b'text,b\none,1\n"two,2\nthree,3\nfour,4\n')
    assert (reject.place.line, reject.lines) == (3, 3)
    assert reject.reason.startswith("a quote that opens a field here is never closed")
    assert reject.reason.endswith("(lines 3 to 5)")


def test_an_unclosed_quote_that_happens_to_meet_another_quote_is_a_bad_record():
    # the quote of line 2 ends in line 4, before "quoted", so three lines are bad
    rows = read(b'a,b\n"Hello,zwei\nthird,drei\nfourth "quoted" word,vier\nfifth,funf\n')
    assert [row.lines if isinstance(row, Reject) else row.columns["a"] for row in rows] == [3, "fifth"]
    assert rows[0].reason.endswith("(lines 2 to 4)")


def test_bad_lines_inside_a_quote_count_against_the_share(ingested):
    # 4 lines read, 3 of them bad
    with pytest.raises(StageFailure, match=r"3 of 4 records are bad, a share of 0.75; max_bad_share allows 0.5"):
        ingested({"a.csv": b'text,b\none,1\n"two,2\nthree,3\nfour,4\n'}, source="csv", on_bad_record="skip", max_bad_share=0.5)


@pytest.mark.parametrize(("row", "count"), [("2", 1), ("2,two,extra", 3), ("2,", 2)])
def test_a_row_with_fewer_or_more_fields_than_the_header_is_a_bad_record(row, count):
    found = values(f"id,text\n1,one\n{row}\n3,three\n".encode())
    assert found[0] == {"id": "1", "text": "one"}
    assert found[2] == {"id": "3", "text": "three"}
    assert found[1] == ({"id": "2", "text": ""} if count == 2 else f"line 3: {count} fields, expected 2 (id, text)")


def test_a_quoted_field_of_a_megabyte_is_read_and_one_above_the_limit_is_a_bad_record():
    lines = b"x" * 99 + b"\n"
    assert len(read(b'text\n"' + lines * 10_000 + b'"\n')[0].columns["text"]) == 1_000_000
    reject, row = read(b'text\n"' + lines * 10_000 + b'"\nnext\n', limits=ReadSettings(max_record_bytes=1000))
    assert reject.reason == "a record of 1,000,002 bytes is longer than max_record_bytes = 1,000 (lines 2 to 10002)"
    assert row.columns == {"text": "next"}


def test_blank_lines_are_skipped_except_inside_quotes():
    assert values(b'text\n\na\n\r\n"b\n\nc"\n') == [{"text": "a"}, {"text": "b\n\nc"}]


def test_a_nul_byte_is_a_bad_record():
    assert values(b"id,text\n1,a\0b\n2,two\n") == ["line 2: a NUL character; is this a binary file?", {"id": "2", "text": "two"}]


@given(st.lists(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0\r")), min_size=2, max_size=2), min_size=1))
def test_what_pythons_csv_writes_is_read_back_unchanged(rows):
    file = io.StringIO()
    csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator="\r\n").writerows([["a", "b"], *rows])
    assert values(file.getvalue().encode()) == [{"a": a, "b": b} for a, b in rows]


@given(st.text(st.sampled_from('",\n\r a'), max_size=12))
def test_any_file_has_the_rows_and_faults_that_pythons_strict_reader_finds(text):
    """Python's reader is laxer in two respects: it accepts a lone CR as a line end, and rows of any width."""
    content = "a,b\n" + text.replace("\r", "\r\n")
    found = values(content.encode())
    try:
        expected = [row for row in csv.reader(io.StringIO(content, newline=""), strict=True) if row][1:]
    except csv.Error:
        assert any(isinstance(row, str) for row in found)
        return
    assert [list(row.values()) for row in found if not isinstance(row, str)] == [row for row in expected if len(row) == 2]


# ---- quotes = "none" ----


def test_a_tsv_has_no_quotes_unless_it_says_so():
    table = b'"Look," she said.\tone\n"A" or "B"?\ttwo\n"\tfive\nsix\tsix\n'
    settings = dict(delimiter="\t", columns=("text", "b"))
    assert [row["text"] for row in values(table, **settings)] == ['"Look," she said.', '"A" or "B"?', '"', "six"]
    assert isinstance(values(table, quotes="standard", **settings)[0], str)
    assert values(b'"a\tb"\tone\n', quotes="standard", **settings) == [{"text": "a\tb", "b": "one"}]


def test_a_csv_can_be_read_without_quotes():
    assert values(b'text,b\n"Look",one\n', quotes="none") == [{"text": '"Look"', "b": "one"}]


def test_a_tsv_whose_quotes_enclose_fields_hints_at_the_setting():
    (reject,) = values(b'"a\tb"\tone\n', delimiter="\t", columns=("text", "b"))
    assert reject == 'line 1: 3 fields, expected 2 (text, b); if quotes enclose fields in this file, set quotes = "standard"'


# ---- the header ----


@pytest.mark.parametrize(("header", "advice"), [(b"id;text", '";"'), (b"id\ttext", r'"\\t"'), (b"id|text", r'"\|"')])
def test_a_header_of_one_column_that_contains_another_delimiter_is_refused_with_that_delimiter(ingested, header, advice):
    with pytest.raises(StageFailure, match=rf"a.csv: the header is one column, .* with delimiter = ','; set delimiter = {advice}"):
        ingested({"a.csv": header + b"\n1;one\n"}, source="csv")


def test_a_line_that_tells_a_spreadsheet_the_delimiter_is_no_header():
    with pytest.raises(
        StageFailure, match=r"a.csv: the first line, 'sep=;', tells a spreadsheet the delimiter and is no header; remove it"
    ):
        read(b"sep=;\nid;text\n1;one\n", delimiter=";")


def test_a_quote_behind_a_space_opens_no_field(ingested):
    with pytest.raises(StageFailure, match=r"3 fields, expected 2 .*; a quote opens a field only directly behind the delimiter, so remove"):
        ingested({"a.csv": b'text,n\none, "1, 2"\n'}, source="csv")


def test_a_mark_that_nobody_sees_is_shown_where_the_column_is_missed(ingested):
    with pytest.raises(StageFailure, match=r"no column 'text'; there are: '\\ufefftext'"):
        ingested({"a.csv": b"\xef\xbb\xbf\xef\xbb\xbftext\na\n"}, source="csv")


def test_two_columns_of_the_same_name_are_refused():
    with pytest.raises(StageFailure, match=r"a.csv: two columns have one name in id, text; rename one"):
        read(b"id,text,id\n1,2,3\n")


def test_a_byte_order_mark_is_not_part_of_the_header():
    assert values(b"\xef\xbb\xbfid,text\n1,one\n") == [{"id": "1", "text": "one"}]


def test_a_space_in_the_header_is_shown_when_the_column_is_missing(ingested):
    with pytest.raises(StageFailure, match=r"a.csv, line 2, .*no column 'text'; there are: id, ' text'"):
        ingested({"a.csv": b"id, text\n1, one\n"}, source="csv")
    assert ingested({"a.csv": b"id, text\n1, one\n"}, source="csv", text=" text").texts() == [" one"]


def test_a_lone_cr_ends_a_line_as_on_old_macs():
    assert values(b"id,text\r1,one\r2,two\r") == [{"id": "1", "text": "one"}, {"id": "2", "text": "two"}]


@pytest.mark.parametrize("content", [b"", b"\n\n", b"id,text\n"])
def test_a_file_without_rows_has_none(content):
    assert values(content) == []


@pytest.mark.parametrize("encoding", ["gbk", "utf-16", "utf-16-le"])
def test_a_csv_in_another_encoding_is_read_as_its_characters(encoding):
    assert values("标题,text\n唐,诗\n".encode(encoding), encoding=encoding) == [{"标题": "唐", "text": "诗"}]


def test_invalid_bytes_are_replaced_and_counted_on_request(ingested):
    result = ingested({"a.csv": b"text\na\xff\n"}, source="csv", encoding_errors="replace")
    assert (result.texts(), result.metadata("replaced_characters")) == (["a\ufffd"], 1)
