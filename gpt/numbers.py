"""Find the number in an answer, and compare it with the reference's.

A number follows a marker, as in GSM8K: "2 + 2 = 4 #### 4". Cobbe et al. 2021 (arXiv:2110.14168).
"""

from __future__ import annotations

import re
from decimal import Decimal

_NUMBER = re.compile(
    r"""\s*
    ([-+]?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+))
    (?![.,/:-]?[0-9]|[eE][-+]?[0-9])  # not the beginning of a date, a fraction, 1,23 or 1e5
    """,
    re.VERBOSE,
)


def number_after(text: str, marker: str) -> Decimal | None:
    """Return the number after the last marker: 1234 for "so #### 1,234 apples". None if there is no marker, or no number after it."""
    _, found, rest = text.rpartition(marker)
    number = _NUMBER.match(rest)
    return _decimal(number[1]) if found and number else None


def reference_number(reference: str | None, marker: str) -> Decimal | None:
    """Return the number of a reference, which is either a plain number or a worked answer with the marker before its number."""
    if reference is None:
        return None
    if marker in reference:
        return number_after(reference, marker)
    number = _NUMBER.fullmatch(reference.rstrip())
    return _decimal(number[1]) if number else None


def has_number(answer: str, number: Decimal, marker: str) -> bool:
    """Whether the number after the answer's last marker equals this one: 4.0 equals 4."""
    return number_after(answer, marker) == number


def _decimal(text: str) -> Decimal:
    return Decimal(text.replace(",", ""))
