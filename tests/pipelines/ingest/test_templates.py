"""A column, a path or a template finds a value in a record, or an error says how far it leads."""

from datetime import date

import pytest

from pipelines.ingest.rows import Unreadable
from pipelines.ingest.templates import check, column_of, columns_of, evaluate

RECORD = {
    "question": "2 + 2?",
    "choices": ["3", "4", "5"],
    "answer": 1,
    "label": 2,
    "key": "b",
    "share": 0.5,
    "right": True,
    "meta": {"title": "Sums", "turns": [{"text": "one"}, {"text": "two"}]},
    "options": {"A": "yes", "B": "no"},
    "a.b": "a dot in the name",
    "sure?": "a question mark in the name",
    "none": None,
    "unknown": -1,
    "numbers": [1, 0.5, True],
    "nothing": [],
    "option1": "cat",
    "option2": "dog",
}


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("question", "2 + 2?"),
        ("answer", 1),
        ("meta.title", "Sums"),
        ("meta.turns.0.text", "one"),
        ("meta.turns.*.text", ["one", "two"]),
        ("a.b", "a dot in the name"),
        ("sure?", "a question mark in the name"),
        ("absent?", None),
        ("meta.author?", None),
        ("none", None),
        ("none.title", None),
        ("{question}", "2 + 2?"),
        ("Q: {question}\nA:", "Q: 2 + 2?\nA:"),
        ("{answer} {share} {right} {none}", "1 0.5 true "),
        ("{choices}", "3\n4\n5"),
        ("{numbers}", "1\n0.5\ntrue"),
        ("{nothing}|", "|"),
        ("{meta}", '{"title": "Sums", "turns": [{"text": "one"}, {"text": "two"}]}'),
        ("none.deeper.0", None),
        ("{{{meta.turns.0.text}}}", "{one}"),
        ("{choices:letters}", "A. 3\nB. 4\nC. 5"),
        ("{options:letters}", "A. yes\nB. no"),
        ("{meta.turns.*.text:letters}", "A. one\nB. two"),
        ("{meta.turns}", '[{"text": "one"}, {"text": "two"}]'),
        ("{choices.{answer}}", "4"),
        ("{option{label}}", "dog"),
        ("{options.{answer:letter}}", "no"),
        ("{answer:letter}", "B"),
        ("{label:from_1:letter}", "B"),
        ("{choices.{label:from_1}}", "4"),
        ("{choices.{key:index}}", "4"),
        ("{{question}} is {question}", "{question} is 2 + 2?"),
        ("Tools: {absent?}", None),
        ("Tools: {none?}", None),
    ],
)
def test_an_expression_finds_its_value(expression, value):
    check(expression)
    assert evaluate(expression, RECORD) == value


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("titel", "no column 'titel'; there are: question, choices"),
        ("titel.x", "no column 'titel.x'; there are"),
        ("meta.author", "no 'author' in 'meta', which is an object with title, turns"),
        ("meta.turns.2.text", "no '2' in 'meta.turns', which is a list of 2"),
        ("meta.turns.-1.text", "no '-1' in 'meta.turns', which is a list of 2"),
        ("meta.turns.*.rank", "no 'rank' in 'meta.turns.0', which is an object with text"),
        ("meta.*.text", r"no '\*' in 'meta', which is an object with title, turns"),
        ("{choices.{unknown}}", "no '-1' in 'choices', which is a list of 3"),
        ("meta.turns.first", r"no 'first' in 'meta.turns', which is a list of 2, the first at 0"),
        ("question.0", r"no '0' in 'question', which is '2 \+ 2\?'"),
        ("{question:letters}", r"\{question:letters\} found '2 \+ 2\?', expected a list of 1 to 26 texts, or an object of texts"),
        ("{nothing:letters}", r"\{nothing:letters\} found \[\], expected a list of 1 to 26 texts"),
        ("{meta:letters}", r"a path leads to it, such as \{choices.text:letters\}"),
        ("{meta.turns:letters}", r"or \{choices.\*.text:letters\}"),
        ("{share:letter}", "found 0.5, expected a whole number from 0 to 25"),
        ("{right:letter}", "found True, expected a whole number"),
        ("{answer:index}", "found 1, expected a letter"),
        ("{answer:from_1:from_1}", "found 0, expected a whole number from 1"),
        ("{choices.{label:letter}}", "no 'C' in 'choices', which is a list of 3"),
    ],
)
def test_an_expression_that_finds_nothing_says_how_far_it_leads(expression, reason):
    check(expression)
    with pytest.raises(ValueError, match=reason):
        evaluate(expression, RECORD)


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("{question", "'{' is never closed"),
        ("question}", "'}' without '{' before it"),
        ("{}", "expected a column or path between braces"),
        ("{ question }", "expected a column or path between braces"),
        ("{answer:upper}", "found the conversion 'upper', expected one of letters, letter, index, from_1"),
        ("", "'' is empty; expected a column, a path"),
        ("?", "'\\?' is empty"),
    ],
)
def test_an_expression_with_a_fault_is_refused_before_any_record_is_read(expression, reason):
    with pytest.raises(ValueError, match=reason):
        check(expression)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (float("nan"), "nan"),
        ([1, float("inf")], r"\[1, inf\]"),
        (date(2026, 11, 29), r"datetime.date\(2026"),
        ({"a": b"x"}, r"\{'a': b'x'\}"),
    ],
)
def test_a_value_that_json_cannot_hold_is_not_written_into_a_template(value, found):
    with pytest.raises(ValueError, match=rf"\{{meta.x\}} is {found}.*, expected a text, a finite number, or a value that JSON can hold"):
        evaluate("At {meta.x}", {"meta": {"x": value}})


def test_the_columns_that_an_expression_looks_at_are_known():
    read: set[str] = set()
    evaluate("{question}{meta.title}{choices.{answer}}", RECORD, read)
    assert read == {"question", "meta", "choices", "answer"}


def test_the_columns_that_expressions_may_read_are_known_before_any_record_is():
    assert columns_of(["question", "meta.title?", "{{x}} {choices:letters}{answer:from_1:letter}"]) == [
        "question",
        "meta.title?",
        "choices",
        "answer",
    ]
    assert columns_of(["question", "{option{label}}"]) is None  # option1 or option2: only the record knows


@pytest.mark.parametrize("expression", ["title", "title.x", "title?", "{title}", "{title?}"])
def test_a_value_that_could_not_be_read_is_missed_only_where_it_is_asked_for(expression):
    columns = {"title": Unreadable("a value of type date32[day]: year 10000 is out of range"), "text": "a"}
    assert evaluate("text", columns) == "a"
    with pytest.raises(ValueError, match=r"column 'title' can't be read: .* year 10000 is out of range"):
        evaluate(expression, columns)


def test_a_path_leads_into_a_column_unless_one_has_that_very_name():
    assert column_of({"a.b": "literal", "a": {"b": "path", "c": None}}, "a.b") == "literal"
    assert column_of({"a": {"b": "path", "c": None}}, "a.b") == "path"
    with pytest.raises(ValueError, match="no 'd' in 'a', which is an object with b, ' c'"):
        column_of({"a": {"b": 1, " c": 2}}, "a.d")


def test_a_list_of_many_columns_ends_with_how_many_more_there_are():
    with pytest.raises(ValueError, match=r"there are: c0, c1, .*, c29 and 2 more$"):
        column_of({f"c{number}": 0 for number in range(32)}, "text")
