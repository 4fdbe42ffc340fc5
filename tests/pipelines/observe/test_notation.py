"""notation.py: how numbers, durations and text from data are written."""

from __future__ import annotations

import math

import pytest

from pipelines.observe.notation import clock_time, duration, number, printable, shortened


@pytest.mark.parametrize(
    ("seconds", "clock", "words"),
    [
        (4.52, "0:05", "4.5 s"),
        (61, "1:01", "1 min 01 s"),
        (3820, "1:03:40", "1 h 03 min"),
        (-4382, "0:00", "0.0 s"),  # where two machines' clocks differ
    ],
)
def test_durations(seconds: float, clock: str, words: str) -> None:
    assert (clock_time(seconds), duration(seconds)) == (clock, words)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.123456, "0.1235"), (1234.5, "1,234"), (1_074_304.0, "1,074,304"), (math.nan, "not a number"), (-math.inf, "-infinite")],
)
def test_numbers(value: float, expected: str) -> None:
    assert number(value) == expected


def test_text_from_data_has_no_control_characters_and_fits() -> None:
    assert printable("a\x1b[2Jb\r\n") == "a [2Jb  "
    assert shortened("import_hf_tokenizer", 12) == "import_hf..."
