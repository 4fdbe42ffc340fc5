"""Records and their places in files with the faults that real files have."""

import json
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.ingest.json_spans import array_elements
from pipelines.ingest.spans import lines, paragraphs, whole
from pipelines.stage import StageFailure

MIB = 2**20


def test_malformed_json_is_named_by_physical_line_column_and_byte(ingested):
    # the blank line counts: 14 + 1 bytes come before line 3, and "oops" is its tenth character
    with pytest.raises(StageFailure, match=r"a.jsonl, line 3, column 10 \(byte 24\): malformed JSON: Expecting value"):
        ingested({"a.jsonl": b'{"text": "a"}\n\n{"text": oops}\n'}, source="json")


def test_a_column_counts_characters_and_a_byte_counts_bytes(ingested):
    # 10 characters, two Chinese ones of 3 bytes each, a quote: "x" is the 14th character, and 17 bytes come before it
    with pytest.raises(StageFailure, match=r"line 1, column 14 \(byte 17\)"):
        ingested({"a.jsonl": '{"text": "唐诗"x}'.encode()}, source="json")


def test_invalid_utf8_is_named_by_its_byte(ingested):
    with pytest.raises(StageFailure, match=r"a.txt, line 2, column 3 \(byte 8\): invalid UTF-8: 0xff"):
        ingested({"a.txt": b"first\nab\xffc\n"}, source="text")


def test_replaced_bytes_are_counted(ingested):
    result = ingested({"a.txt": b"a\xffb\xfe" + "\ufffd".encode()}, source="text", encoding_errors="replace")
    assert result.texts() == ["a\ufffdb\ufffd\ufffd"]
    assert result.metadata("replaced_characters") == 2


@pytest.mark.parametrize("unit", ["file", "paragraph", "line"])
def test_a_bom_is_not_part_of_the_text(ingested, unit):
    assert ingested({"a.txt": b"\xef\xbb\xbftext"}, source="text", unit=unit).texts() == ["text"]


def test_a_bom_counts_in_the_byte_offset(ingested):
    with pytest.raises(StageFailure, match=r"line 1, column 1 \(byte 3\)"):
        ingested({"a.jsonl": b"\xef\xbb\xbfoops"}, source="json")


@pytest.mark.parametrize("unit", ["file", "paragraph", "line"])
def test_crlf_reads_the_same_as_lf(ingested, unit):
    unix = b"one\ntwo\n\nthree\n"
    result = ingested({"a.txt": unix, "b.txt": unix.replace(b"\n", b"\r\n")}, source="text", unit=unit, deduplicate=False)
    texts = result.texts()
    assert texts[: len(texts) // 2] == texts[len(texts) // 2 :]


def test_crlf_reads_the_same_as_lf_in_json(ingested):
    assert ingested({"a.jsonl": b'{"text": "a\\r\\nb"}\r\n{"text": "c"}\r\n'}, source="json").texts() == ["a\nb", "c"]


def test_paragraphs_end_at_blank_lines(ingested):
    assert ingested({"a.txt": b"\none\ntwo\n \t\n\nthree"}, source="text", unit="paragraph").texts() == ["one\ntwo", "three"]


@pytest.mark.parametrize("unit", ["file", "line"])
def test_a_nul_is_a_bad_record(ingested, unit):
    with pytest.raises(StageFailure, match=r"line 2, column 2 \(byte 5\): a NUL character"):
        ingested({"a.txt": b"one\nt\0wo"}, source="text", unit=unit)


@pytest.mark.parametrize(("escape", "reason"), [("\\u0000", "a NUL character"), ("\\ud800", r"half of a surrogate pair, U\+D800")])
def test_a_character_that_cannot_be_kept_is_a_bad_record(ingested, escape, reason):
    with pytest.raises(StageFailure, match=f"line 2, .*{reason}"):
        ingested({"a.jsonl": b'{"text": "a"}\n{"text": "%s"}' % escape.encode()}, source="json")


def test_a_line_of_20_mb_is_one_reject_and_is_never_held_in_memory(ingested, data):
    (data / "a.jsonl").write_bytes(b'{"text": "' + b"x" * 20_000_000 + b'"}\n{"text": "b"}')
    settings = dict(on_bad_record="skip", max_bad_share=0.5, max_record_bytes=MIB)
    tracemalloc.start()
    result = ingested({}, files=["a.jsonl"], source="json", **settings)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert result.texts() == ["b"]
    assert result.rejects()[0]["line"] == 1
    assert result.rejects()[0]["reason"] == "a record of 20,000,012 bytes is longer than max_record_bytes = 1,048,576"
    assert peak < 8 * MIB


def test_a_long_line_makes_its_paragraph_too_long():
    (span,) = paragraphs([b"short\n" + b"x" * 100], 0, limit=50)
    assert span.fault == "a record of 106 bytes is longer than max_record_bytes = 50"


def test_elements_of_an_array_have_their_own_place(ingested):
    array = b'[\n  {"text": "a"},\n  {"text": 7},\n  {"text": "c"}\n]\n'
    result = ingested({"a.json": array}, source="json", on_bad_record="skip", max_bad_share=0.5)
    assert result.texts() == ["a", "c"]
    (reject,) = result.rejects()
    assert (reject["record"], reject["line"], reject["column"], reject["byte"]) == (2, 3, 3, array.index(b'{"text": 7'))
    assert reject["reason"] == "column 'text' holds 7, expected a text or a list of texts; text = \"{text}\" writes it as text"


def test_a_malformed_element_spoils_no_other(ingested):
    result = ingested({"a.json": b'[{"text": "a"}, {"text": },\n {"text": "c"}]'}, source="json", on_bad_record="skip", max_bad_share=0.5)
    assert result.texts() == ["a", "c"]
    assert [(reject["line"], reject["column"], reject["byte"]) for reject in result.rejects()] == [(1, 26, 25)]


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (b'[{"text": "a"}, {"text": "b', "the file ends before the array is closed"),
        (b'[{"text": "a"}', "the file ends before the array is closed"),
        (b'[{"text": "a"},]', "malformed JSON: Expecting value"),
        (b'[{"text": "a"},,{"text": "b"}]', "malformed JSON: Expecting value"),
        (b'[{"text": "a"} {"text": "b"}]', "malformed JSON: Extra data"),
        (b'[{"text": "a"}] [{"text": "b"}]', "data after the array's end"),
        (b"[7]", "found 7, expected an object of columns, or a text"),
    ],
)
def test_a_faulty_array_is_a_bad_record(ingested, array, reason):
    with pytest.raises(StageFailure, match=reason):
        ingested({"a.json": array}, source="json")


def test_a_missing_column_is_reported_with_those_that_exist(ingested):
    with pytest.raises(StageFailure, match=r"line 1, .*no column 'text'; there are: title, body"):
        ingested({"a.jsonl": b'{"title": "t", "body": "b"}'}, source="json")


@given(
    st.lists(st.dictionaries(st.text(max_size=5), st.text(max_size=5) | st.lists(st.integers()))),
    st.integers(1, 9),
    st.none() | st.integers(0, 3),
)
def test_an_arrays_elements_are_those_json_finds_whatever_the_size_of_pieces(elements, piece_bytes, indent):
    data = json.dumps(elements, ensure_ascii=False, indent=indent).encode()
    pieces = [data[begin : begin + piece_bytes] for begin in range(0, len(data), piece_bytes)]
    spans = list(array_elements(pieces, 0, limit=MIB))
    assert [json.loads(span.data) for span in spans] == elements
    for span in spans:
        assert data[span.byte :].startswith(span.data)
        before = data[: span.byte].decode()
        assert (span.line, span.column) == (before.count("\n") + 1, len(before.rpartition("\n")[2]) + 1)


@given(st.lists(st.sampled_from([b"a", b"bc", b"\n", b"\r\n", b" "])), st.integers(1, 5))
def test_the_units_of_a_text_do_not_depend_on_the_size_of_pieces(parts, piece_bytes):
    data = b"".join(parts)
    pieces = [data[begin : begin + piece_bytes] for begin in range(0, len(data), piece_bytes)]
    for frame in (whole, lines, paragraphs):
        assert list(frame(pieces, 0, limit=MIB)) == list(frame([data], 0, limit=MIB))
    assert [span.data for span in lines(pieces, 0, limit=MIB)] == data.removesuffix(b"\n").split(b"\n") if data else True
