"""Find values in a record by path, and fill templates with them.

    question                     the column of that name
    meta.title, turns.0.text     a path: keys of objects, positions in lists from 0
    completions.*.response       the same path in every element of a list
    system?                      may be missing or null
    {question}\\n{choices:letters}   a template: text around columns and paths; {{ and }} are literal braces
    {choices.{answer}}           a path that another column completes

A placeholder can convert its value; several conversions are applied from left to right, as in `{answer:from_1:letter}`:

    letters    ["yes", "no"] or {"A": "yes", "B": "no"}  ->  "A. yes\\nB. no"
    letter     0 -> "A"
    index      "A" -> 0
    from_1     1 -> 0
"""

from __future__ import annotations

import functools
import json
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.ingest.rows import Unreadable

CONVERSIONS = ("letters", "letter", "index", "from_1")


class Missing(ValueError):
    """A record has nothing at a path."""


@dataclass(frozen=True)
class Placeholder:
    """`{choices.{answer}:letter}` is `Placeholder(name=("choices.", Placeholder(("answer",))), conversions=("letter",))`."""

    name: tuple[str | Placeholder, ...]
    conversions: tuple[str, ...] = ()


def is_template(expression: str) -> bool:
    return "{" in expression or "}" in expression


def expressions(where: str | Iterable[str]) -> list[str]:
    return [where] if isinstance(where, str) else list(where)


def check(expression: str) -> None:
    """Raise ValueError where a template's braces or conversions are wrong."""
    if is_template(expression):
        parse(expression)
    elif not expression.rstrip("?"):
        raise ValueError(f"{expression!r} is empty; expected a column, a path such as 'a.b.0', or a template such as '{{title}}'")


def columns_of(expressions: Iterable[str]) -> list[str] | None:
    """Return the columns and paths that expressions read; None where a column's name depends on another one's value."""
    found = []
    for expression in expressions:
        if not is_template(expression):
            found.append(expression)
            continue
        for placeholder in parse(expression):
            if isinstance(placeholder, Placeholder):
                if not all(isinstance(part, str) for part in placeholder.name):
                    return None
                found.append("".join(map(str, placeholder.name)))
    return found


def evaluate(expression: str, columns: Mapping[str, Any], read: set[str] | None = None) -> Any:
    """Return the value of a column or path, or a template's text.

    None stands for an optional value that is missing; Missing names one that must be there. The columns looked at are added to `read`.
    """
    read = set() if read is None else read
    if not is_template(expression):
        return _look_up(expression, columns, read)
    texts = []
    for part in parse(expression):
        text = part if isinstance(part, str) else _fill(part, columns, read)
        if text is None:
            return None  # an optional value is missing, so the text around it has nothing to introduce
        texts.append(text)
    return "".join(texts)


def column_of(columns: Mapping[str, Any], path: str) -> Any:
    """Return the value of a column or path; Missing says how far the path leads. A path through null is null.

    `"meta.title"` is the column of that very name where there is one, otherwise the key `title` of the column `meta`.
    """
    first, *rest = [path] if path in columns else path.split(".")
    if first not in columns:
        raise Missing(f"no column {path!r}; there are: {listed(columns)}")
    if isinstance(columns[first], Unreadable):
        raise ValueError(f"column {first!r} can't be read: {columns[first].reason}")
    return _walk(columns[first], rest, first)


def listed(names: Iterable[str]) -> str:
    """Return names as a list for people: at most thirty, quoted where spaces or marks would be invisible."""
    shown = [name if name and name == name.strip() and name.isprintable() else repr(name) for name in map(str, names)]
    return ", ".join(shown[:30]) + (f" and {len(shown) - 30:,} more" if len(shown) > 30 else "") or "none"


def _look_up(path: str, columns: Mapping[str, Any], read: set[str]) -> Any:
    optional = path.endswith("?") and path not in columns
    path = path[:-1] if optional else path
    read.add(path if path in columns else path.split(".")[0])
    try:
        return column_of(columns, path)
    except Missing:
        if optional:
            return None
        raise


def _walk(value: Any, path: list[str], above: str) -> Any:
    for depth, part in enumerate(path):
        if value is None:
            return None
        here = ".".join([above, *path[:depth]])
        if part == "*" and isinstance(value, list):
            return [_walk(item, path[depth + 1 :], f"{here}.{index}") for index, item in enumerate(value)]
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            raise Missing(f"no {part!r} in {here!r}, which is {_described(value)}")
    return value


def _described(value: Any) -> str:
    match value:
        case Mapping():
            return f"an object with {listed(value) if value else 'no keys'}"
        case list():
            return f"a list of {len(value)}" + (", the first at 0" if value else "")
    return short(value)


def short(value: Any) -> str:
    """Return a value as a message shows it: at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# ---- templates ----


@functools.cache
def parse(template: str) -> tuple[str | Placeholder, ...]:
    """Return a template's literal texts and placeholders; ValueError where its braces don't match."""
    parts, end = _parse(template, 0, inside=False)
    if end < len(template):
        raise ValueError(f"template {template!r}: '}}' without '{{' before it; write '}}}}' for a literal brace")
    return tuple(parts)


def _parse(template: str, begin: int, *, inside: bool) -> tuple[list[str | Placeholder], int]:
    """Parse up to the end, or, inside a placeholder, up to its closing brace."""
    parts: list[str | Placeholder] = []
    literal = ""
    position = begin
    while position < len(template):
        two = template[position : position + 2]
        if two in ("{{", "}}") and not inside:
            literal += two[0]
            position += 2
        elif two[0] == "{":
            name, position = _parse(template, position + 1, inside=True)
            if position == len(template):
                raise ValueError(f"template {template!r}: '{{' is never closed; write '{{{{' for a literal brace")
            parts += [literal] if literal else []
            parts.append(_placeholder(name, template))
            literal = ""
            position += 1
        elif two[0] == "}":
            break
        else:
            literal += two[0]
            position += 1
    return parts + ([literal] if literal else []), position


def _placeholder(parts: list[str | Placeholder], template: str) -> Placeholder:
    conversions: list[str] = []
    if parts and isinstance(parts[-1], str):
        last, *conversions = parts[-1].split(":")
        parts = [*parts[:-1], *([last] if last else [])]
    if not parts or any(isinstance(part, str) and (":" in part or part.strip() != part) for part in parts):
        raise ValueError(f"template {template!r}: expected a column or path between braces, such as '{{title}}' or '{{meta.title}}'")
    for name in conversions:
        if name not in CONVERSIONS:
            raise ValueError(f"template {template!r}: found the conversion {name!r}, expected one of {', '.join(CONVERSIONS)}")
    return Placeholder(tuple(parts), tuple(conversions))


def _fill(placeholder: Placeholder, columns: Mapping[str, Any], read: set[str]) -> str | None:
    """Return the text of a placeholder; None where it is optional and has none."""
    path = ""
    for part in placeholder.name:
        text = part if isinstance(part, str) else _fill(part, columns, read)
        if text is None:
            return None
        path += text
    value = _look_up(path, columns, read)
    if path.endswith("?") and path not in columns and value in (None, "", [], {}):
        return None
    for conversion in placeholder.conversions:
        value = _convert(value, conversion, path)
    return rendered(value, f"{{{path}}}")


def rendered(value: Any, what: str) -> str:
    """Return a value as text, as templates write it; ValueError, which calls it `what`, where JSON can't hold it."""
    try:
        return render(value)
    except (TypeError, ValueError):
        raise ValueError(f"{what} is {short(value)}, expected a text, a finite number, or a value that JSON can hold") from None


def render(value: Any) -> str:
    """Return a value as text: a list of texts or numbers as lines, null as nothing, numbers, true, false and objects as JSON.

    TypeError or ValueError where JSON can't hold the value.
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(item, str | int | float) for item in value):
        return "\n".join(map(render, value))
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _convert(value: Any, conversion: str, path: str) -> Any:
    match conversion, value:
        case "letters", Mapping() if value and all(isinstance(item, str | int | float) for item in value.values()):
            return "\n".join(f"{key}. {render(item)}" for key, item in value.items())
        case "letters", list() if 0 < len(value) <= 26 and all(isinstance(item, str | int | float) for item in value):
            return "\n".join(f"{letter}. {render(item)}" for letter, item in zip(string.ascii_uppercase, value, strict=False))
        case "letter", _ if (index := _whole_number(value)) is not None and 0 <= index < 26:
            return string.ascii_uppercase[index]
        case "index", str() if len(letter := value.strip().upper()) == 1 and letter in string.ascii_uppercase:
            return string.ascii_uppercase.index(letter)
        case "from_1", _ if (number := _whole_number(value)) is not None and number >= 1:
            return number - 1
    expected = {
        "letters": "a list of 1 to 26 texts, or an object of texts; a path leads to it, such as {choices.text:letters} or "
        "{choices.*.text:letters}",
        "letter": "a whole number from 0 to 25",
        "index": "a letter",
        "from_1": "a whole number from 1",
    }[conversion]
    raise ValueError(f"{{{path}:{conversion}}} found {short(value)}, expected {expected}")


def _whole_number(value: Any) -> int | None:
    if isinstance(value, str) and value.strip().isdecimal():
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None
