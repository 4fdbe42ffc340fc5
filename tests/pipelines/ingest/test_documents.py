"""A document's text is a column, several columns or a template."""

import pytest

from pipelines.ingest.documents import text_of

ROW = {
    "title": "T",
    "body": ["one", "two"],
    "n": 7,
    "share": 0.5,
    "yes": True,
    "none": None,
    "empty": [],
    "turns": [{"text": "a"}, {"text": "b"}],
}


@pytest.mark.parametrize(
    ("mapping", "text"),
    [
        ("title", "T"),
        ("body", "one\ntwo"),
        ("turns.*.text", "a\nb"),
        ("none", ""),
        ("absent?", ""),
        ("{n} {share} {yes} {none}|{empty}", "7 0.5 true |"),
        ("{title}: {body}", "T: one\ntwo"),
        ("{absent?}: {title}", ""),
        (("n", "title"), "7\nT"),
        (("title", "absent?", "{n}."), "T\n\n7."),
    ],
)
def test_a_text_is_found_or_composed(mapping, text):
    assert text_of(ROW, mapping) == text


def test_a_number_as_the_only_column_is_more_likely_the_wrong_column():
    with pytest.raises(ValueError, match=r"column 'n' holds 7, expected a text or a list of texts; text = \"\{n\}\" writes it as text"):
        text_of(ROW, "n")


@pytest.mark.parametrize(("value", "found"), [(float("nan"), "nan"), (b"x", "b'x'")])
@pytest.mark.parametrize(("mapping", "what"), [("{x}!", r"\{x\}"), (("x",), "column 'x'")])
def test_what_json_cannot_hold_is_refused_in_a_composed_text_too(value, found, mapping, what):
    with pytest.raises(ValueError, match=f"{what} is {found}, expected a text, a finite number"):
        text_of({"x": value}, mapping)
