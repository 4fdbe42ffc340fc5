"""A row's values, by name, by path, and as text."""

import pytest

from pipelines.ingest.columns import column_of, template_columns, text_of

ROW = {"meta": {"title": "T", "tags": ["x", {"y": "z"}], "none": None}, "a.b": "literal", "a": {"b": "path"}, "n": 7, "f": 0.5, "yes": True}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 7),
        ("meta.title", "T"),
        ("meta.tags.0", "x"),
        ("meta.tags.1.y", "z"),
        ("a.b", "literal"),
        ("meta.none", None),
        ("meta.none.deeper.0", None),
    ],
)
def test_a_path_leads_into_a_column_unless_a_column_has_exactly_that_name(name, value):
    assert column_of(ROW, name) == value


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("text", "no column 'text'; there are: meta, a.b, a, n, f, yes"),
        ("text.a", "no column 'text.a'; there are: meta"),
        ("meta.author", "'meta' has no key 'author'; there are: title, tags, none"),
        ("meta.tags.first", r"'meta.tags' is a list, expected an index such as meta.tags.0, found meta.tags.first"),
        ("meta.tags.2", r"'meta.tags' is a list of 2, which has no item 2 \(the first is 0\)"),
        ("n.a", "'n' holds the number 7, expected an object or a list to find 'a' in"),
    ],
)
def test_a_path_that_leads_nowhere_says_where_it_ends(name, reason):
    with pytest.raises(ValueError, match=reason):
        column_of(ROW, name)


def test_a_template_renders_numbers_and_booleans_as_json_writes_them():
    assert text_of(ROW, "{n} {f} {yes} {meta.title} {meta.none}|{meta.tags.0}") == "7 0.5 true T |x"
    assert text_of({"a": [1, "x"], "b": 10**30}, "{a} {b}") == "1\nx 1000000000000000000000000000000"
    assert text_of(ROW, ("n", "meta.title")) == "7\nT"


def test_a_number_as_the_only_column_is_refused_since_it_is_probably_the_wrong_column():
    with pytest.raises(ValueError, match="column 'n' holds the number 7, expected a text or a list of texts"):
        text_of(ROW, "n")


@pytest.mark.parametrize(
    ("value", "found"), [({"a": 1}, "an object"), ([[1]], "a list"), (float("nan"), "the number nan"), (b"x", "bytes")]
)
def test_a_value_that_is_not_text_is_refused_in_a_template_too(value, found):
    with pytest.raises(ValueError, match=f"column 'x' holds {found}, expected a text"):
        text_of({"x": value}, "{x}!")


def test_a_template_names_its_columns():
    assert template_columns("{title}\n{author}: {{{paragraphs.0}}}") == ["title", "author", "paragraphs.0"]
