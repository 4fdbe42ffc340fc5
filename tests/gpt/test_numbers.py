from __future__ import annotations

from decimal import Decimal

import pytest

from gpt.numbers import has_number, number_after, reference_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 42", "42"),
        ("so it is ####42.", "42"),
        ("#### 1,234", "1234"),
        ("#### 1234.0 apples", "1234"),
        ("#### 1,234,567.50\nand more", "1234567.5"),
        ("#### -7", "-7"),
        ("#### +7", "7"),
        ("#### -0", "0"),
        ("#### .5", "0.5"),
        ("####\n5", "5"),
        ("#### 1 #### 2", "2"),
        ("#### 123456789012345678901234567890", "123456789012345678901234567890"),
        ("42", None),
        ("####", None),
        ("#### forty-two", None),
        ("#### 1 ####", None),
        ("#### 1,23", None),
        ("#### 1,2345", None),
        ("#### 1.2.3", None),
        ("#### 3/4", None),
        ("#### 1e5", None),
        ("#### 2024-01-02", None),
        ("#### 12:30", None),
        ("#### - 5", None),
        ("#### \u0665", None),
    ],
)
def test_the_number_after_the_last_marker(text, number):
    assert number_after(text, "####") == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("reference", "number"),
    [
        ("1,234", "1234"),
        (" -3.50 \n", "-3.5"),
        ("2 + 2 = 4\n#### 4", "4"),
        ("4 apples", None),
        ("four", None),
        ("", None),
        (None, None),
        ("#### x", None),
    ],
)
def test_a_reference_is_a_number_or_a_worked_answer(reference, number):
    assert reference_number(reference, "####") == (None if number is None else Decimal(number))


def test_numbers_are_compared_by_value_rather_than_spelling():
    assert has_number("#### 1,234.0", Decimal(1234), "####")
    assert not has_number("#### 1234.01", Decimal(1234), "####")
    assert not has_number("1234", Decimal(1234), "####")
