"""JSON: one value per line, values over several lines, one array, or an array inside a document; and faults in values."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.ingest.json_spans import elements_at, json_values
from pipelines.stage import StageFailure

MIB = 2**20
SKIP = {"on_bad_record": "skip", "max_bad_share": 1.0}
VALUES = st.dictionaries(st.text(max_size=5), st.text(max_size=5) | st.lists(st.dictionaries(st.text(max_size=2), st.none()), max_size=3))


def cut(data: bytes, piece_bytes: int) -> list[bytes]:
    return [data[begin : begin + piece_bytes] for begin in range(0, len(data), piece_bytes)]


# ---- one value after another ----


@pytest.mark.parametrize(
    "content",
    [
        b'{"text": "a"}\n\n{"text": "b"}\n',
        b'{\n  "text": "a"\n}\n{\n  "text": "b"\n}\n',
        b'{"text": "a"}{"text": "b"}',
        b'  {"text": "a"} \t {"text":\n"b"}',
        b'{"text": "a"}\r\n{\r\n"text": "b"}\r\n',
        b'"a"\n"b"\n',
        b'["a", {"text": "b"}]',
    ],
)
def test_successive_objects_and_texts_are_records(ingested, content):
    assert ingested({"a.json": content}, source="json").texts() == ["a", "b"]


def test_a_file_that_is_one_object_over_several_lines_is_one_record(ingested):
    assert ingested({"a.json": b'{\n  "text": "one object over lines",\n  "more": {\n    "x": [\n{}\n]}\n}'}, source="json").texts() == [
        "one object over lines"
    ]


@given(st.lists(VALUES, min_size=1), st.integers(1, 9), st.none() | st.integers(0, 3), st.sampled_from(["", " ", "\n", "\n\n"]))
def test_values_are_read_as_json_wrote_them_whatever_their_layout_and_the_size_of_pieces(values, piece_bytes, indent, between):
    data = between.join(json.dumps(value, ensure_ascii=False, indent=indent) for value in values).encode()
    spans = list(json_values(cut(data, piece_bytes), 0, limit=MIB))
    assert [json.loads(span.data) for span in spans] == values
    for span in spans:
        assert data[span.byte :].startswith(span.data)
        before = data[: span.byte].decode()
        assert (span.line, span.column) == (before.count("\n") + 1, len(before.rpartition("\n")[2]) + 1)


@pytest.mark.parametrize(
    "broken",
    [
        b'{"text": "broken',
        b'{"text": {"deep": 1',
        b'{"text": [1, 2',
        b'{"text": "x", ',
        b'{"text": oops}',
        b'{"text": "x"]',
        b'{"text": "x"},',
        b"oops",
        b"}",
    ],
)
def test_a_broken_line_spoils_only_itself(ingested, broken):
    content = b'{"text": "a"}\n' + broken + b'\n{"text": "b"}\n{\n"text": "c"\n}\n'
    result = ingested({"a.jsonl": content}, source="json", **SKIP)
    assert result.texts() == ["a", "b", "c"]
    assert [reject["line"] for reject in result.rejects()] == [2]
    assert result.rejects()[0]["reason"].startswith("malformed JSON")


def test_a_value_cut_off_by_the_end_of_the_file_is_a_bad_record(ingested):
    with pytest.raises(StageFailure, match=r"line 2, column 1 .*: the file ends before the JSON value that begins here is closed"):
        ingested({"a.json": b'{"text": "a"}\n{\n"text":\n'}, source="json")


def test_an_object_over_several_lines_that_is_too_long_is_one_bad_record():
    lines = b'{"a": [\n' + b'"xxxxxxxxx",\n' * 1000 + b'"x"]}\n{"b": 1}\n'
    spans = list(json_values([lines], 0, limit=100))
    assert [(span.line, len(span.data), bool(span.fault)) for span in spans] == [(1, 100, True), (1003, 8, False)]


# ---- what a value holds ----


@pytest.mark.parametrize("value", [b"7", b"true", b"null", b"[1]"])
def test_a_value_that_is_neither_an_object_nor_a_text_is_a_bad_record(ingested, value):
    with pytest.raises(StageFailure, match=r"found .*, expected an object of columns, or a text"):
        ingested({"a.json": b'{"text": "a"}\n' + value + b"\n"}, source="json")


@pytest.mark.parametrize("record", [b'{"text": "a", "text": "b"}', b'{"text": "a", "more": [{"x": 1, "x": 1}]}'])
def test_a_duplicate_key_is_a_bad_record(ingested, record):
    with pytest.raises(StageFailure, match=r"an object has the key '(text|x)' twice, and only one of the two values could be kept"):
        ingested({"a.jsonl": record}, source="json")


def test_a_nul_is_refused_but_the_six_characters_of_its_escape_are_text(ingested):
    assert ingested({"a.jsonl": rb'{"text": "written \\u0000 in JSON"}'}, source="json").texts() == [r"written \u0000 in JSON"]
    with pytest.raises(StageFailure, match="a NUL character"):
        ingested({"a.jsonl": rb'{"text": "a \u0000"}'}, source="json")
    with pytest.raises(StageFailure, match="a NUL character"):
        ingested({"a.jsonl": rb'{"text": "a \\\u0000"}'}, source="json")


def test_a_number_that_json_lacks_is_refused_where_it_is_kept_and_ignored_elsewhere(ingested):
    content = b'{"text": "ok", "x": NaN}\n{"text": "inf", "x": Infinity}\n{"text": "big", "x": 1e999}\n'
    assert ingested({"a.jsonl": content}, source="json").texts() == ["ok", "inf", "big"]
    with pytest.raises(StageFailure, match=r"line 1, .*column 'x' holds nan, which JSON can't hold"):
        ingested({"a.jsonl": content}, source="json", fields=["x"])


# ---- records = "data.examples" ----


def test_the_records_of_a_wrapped_array_have_their_own_places(ingested):
    content = b'{"version": "1.0 [{", "data": {"n": [1, [2]], "examples": [\n{"text": "a"},\n{"text": 7}\n]}, "end": {}}\n'
    result = ingested({"a.json": content}, source="json", records="data.examples", **SKIP)
    assert result.texts() == ["a"]
    (reject,) = result.rejects()
    assert (reject["record"], reject["line"], reject["column"], reject["byte"]) == (2, 3, 1, content.index(b'{"text": 7'))


def test_every_document_of_a_file_is_searched_and_a_path_may_have_indices(ingested):
    content = b'{"data": [{"text": "a"}, "b"]}\n{"data": [{"text": "c"}]}\n'
    assert ingested({"a.jsonl": content}, source="json", records="data").texts() == ["a", "b", "c"]
    content = b'[{"rows": [{"text": "no"}]}, {"rows": [{"text": "yes"}]}]'
    assert ingested({"b.json": content}, source="json", records="1.rows").texts() == ["yes"]


@given(st.lists(VALUES), st.integers(1, 9), st.none() | st.integers(0, 3), VALUES)
def test_the_records_at_a_path_are_read_as_json_wrote_them_whatever_the_layout(values, piece_bytes, indent, beside):
    document = {"z": beside, "data": {"a": beside, "examples": values, "b": beside}, "y": [beside]}
    data = json.dumps(document, ensure_ascii=False, indent=indent).encode()
    spans = list(elements_at("data.examples", cut(data, piece_bytes), 0, limit=MIB))
    assert [json.loads(span.data) for span in spans] == values
    assert all(data[span.byte :].startswith(span.data) for span in spans)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"data": {"rows": [], "n": 1}}', r"records = \"data.examples\" leads to no list; 'data' has the keys: rows, n"),
        (b'{"rows": []}', r"records = \"data.examples\" leads to no list; the document has the keys: rows"),
        (b'{"data": {"examples": {"a": 1}}}', "leads to no list"),
        (b'{"data": {"examples": [{"text": "a"}', "the file ends before the array is closed"),
        (b'{"data": {"examples": [{"text": "a"}]', "the file ends before the document is closed"),
        (b"[]", "leads to no list: the document is a list itself; remove records"),
        (b"hello", "malformed JSON: no document begins here, expected an object or a list"),
        (b'"hello"', "leads to no list; the document has the keys: none"),
    ],
)
def test_a_document_without_that_list_is_refused_with_the_keys_that_it_has(ingested, content, reason):
    with pytest.raises(StageFailure, match=reason):
        ingested({"a.json": content}, source="json", records="data.examples")


@pytest.mark.parametrize("newline", [b"\n", b"", b" "])
def test_each_document_without_its_list_is_a_bad_record(ingested, newline):
    content = newline.join(
        [b'{"data": [{"text": "a"}]}', b'{"dta": [{"text": "b"}]}', b'{"data": null}', b'{"n": 1, "data": [{"text": "c"}]}']
    )
    result = ingested({"a.json": content + newline}, source="json", records="data", **SKIP)
    assert result.texts() == ["a", "c"]
    assert [(each["byte"], each["reason"]) for each in result.rejects()] == [
        (25 + len(newline), 'records = "data" leads to no list; the document has the keys: dta'),
        (49 + 2 * len(newline), 'records = "data" leads to no list; the document has the keys: data'),
    ]


def test_a_document_that_wraps_its_records_hints_at_the_setting(ingested):
    with pytest.raises(StageFailure, match=r'no column \'text\'; there are: data; records = "data" reads the list in there'):
        ingested({"a.json": b'{"data": [{"text": "a"}]}'}, source="json")
    with pytest.raises(StageFailure, match=r'records = "data.examples" reads the list'):
        ingested({"a.json": b'{"data": {"examples": [{"text": "a"}]}}'}, source="json")


def test_a_list_of_other_values_gives_no_hint(ingested):
    with pytest.raises(StageFailure, match=r"no column 'text'; there are: messages\. Fix"):
        ingested({"a.json": b'{"messages": [{"content": "a"}]}'}, source="json")
