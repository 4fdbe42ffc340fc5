"""How numbers, durations and text from data are written for people."""

from __future__ import annotations

import html
import math


def clock_time(seconds: float) -> str:
    """`1:35`, or `1:03:40` from an hour on. Where two machines' clocks differ a duration can come out negative: that is `0:00`."""
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def duration(seconds: float) -> str:
    """`4.5 s`, `1 min 01 s` or `2 h 05 min`."""
    if seconds < 60:
        return f"{max(0.0, seconds):.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def number(value: float | None) -> str:
    """Four significant digits, or all digits of a whole number; NaN and infinity in words."""
    if value is None or math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "infinite" if value > 0 else "-infinite"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def printable(text: str) -> str:
    """The text without control characters: data may hold escape sequences, which a terminal must not obey."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def shortened(text: str, chars: int) -> str:
    return text if len(text) <= chars else text[: chars - 3] + "..."


def escaped(value: object) -> str:
    """As text in HTML, never as markup."""
    return html.escape(str(value))
