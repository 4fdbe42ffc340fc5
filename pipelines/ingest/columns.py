"""The values of a row: by a column's name or a path into one, and as text by a template.

`"meta.title"` is the column of that very name where there is one, else the key `title` of the column `meta`; in `"turns.0.text"` the
number is an index into a list.
"""

from __future__ import annotations

import json
import math
import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Unreadable:
    """Stands where a table's value could not be read; only a stage that asks for the value fails."""

    reason: str


def column_of(columns: Mapping[str, Any], name: str) -> Any:
    """Return the value of a column or path; raise ValueError where there is none. A path through null is null."""
    if name in columns:
        value = columns[name]
    else:
        first, *keys = name.split(".")
        if not keys or first not in columns:
            raise ValueError(f"no column {name!r}; there are: {listed(columns)}")
        value = columns[first]
        for depth, key in enumerate(keys, start=1):
            if isinstance(value, Unreadable):
                break
            value = _inside(value, key, ".".join([first, *keys[: depth - 1]]))
    if isinstance(value, Unreadable):
        raise ValueError(f"column {name!r} can't be read: {value.reason}")
    return value


def listed(columns: Mapping[str, Any]) -> str:
    """The names as a list for people: quoted where a space at an end would be invisible, and at most thirty of them."""
    names = [name if name == name.strip() and name else repr(name) for name in map(str, columns)]
    return ", ".join(names[:30]) + (f" and {len(names) - 30:,} more" if len(names) > 30 else "") or "none"


def _inside(value: Any, key: str, path: str) -> Any:
    if value is None:
        return None
    if isinstance(value, dict):
        if key not in value:
            raise ValueError(f"{path!r} has no key {key!r}; there are: {listed(value)}")
        return value[key]
    if isinstance(value, list):
        if not key.isdecimal():
            raise ValueError(f"{path!r} is a list, expected an index such as {path}.0, found {path}.{key}")
        if int(key) >= len(value):
            raise ValueError(f"{path!r} is a list of {len(value)}, which has no item {key} (the first is 0)")
        return value[int(key)]
    raise ValueError(f"{path!r} holds {kind_of(value)}, expected an object or a list to find {key!r} in")


def template_columns(template: str) -> list[str]:
    """The columns that a template such as "{title}: {text}" names; ValueError where its braces don't match."""
    return [
        name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
        for _, name, spec, conversion in string.Formatter().parse(template)
        if name is not None
    ]


def is_template(mapping: str) -> bool:
    return "{" in mapping


def text_columns(mapping: str | tuple[str, ...]) -> list[str]:
    """The columns or paths that `text_of` reads for this mapping."""
    if isinstance(mapping, tuple):
        return list(mapping)
    return template_columns(mapping) if is_template(mapping) else [mapping]


def text_of(columns: Mapping[str, Any], mapping: str | tuple[str, ...]) -> str:
    """The text of one column, of several joined by newlines, or of a template.

    Null is empty and a list of texts is joined by newlines. Where a text is composed of several values, numbers and booleans are
    rendered as JSON writes them (7, 0.5, true). As the only column they are refused: more likely than not it's the wrong column.
    """
    if isinstance(mapping, tuple):
        return "\n".join(_as_text(columns, name, composed=True) for name in mapping)
    if not is_template(mapping):
        return _as_text(columns, mapping, composed=False)
    pieces = string.Formatter().parse(mapping)
    return "".join(literal + (_as_text(columns, name, composed=True) if name is not None else "") for literal, name, _, _ in pieces)


def _as_text(columns: Mapping[str, Any], name: str, *, composed: bool) -> str:
    value = column_of(columns, name)
    if value is None:
        return ""
    texts = [_item_text(item, composed) for item in (value if isinstance(value, list) else [value])]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"column {name!r} holds {kind_of(value)}, expected a text or a list of texts")
    return "\n".join(texts)  # type: ignore[arg-type]


def _item_text(value: Any, composed: bool) -> str | None:
    if isinstance(value, str):
        return value
    if composed and isinstance(value, bool | int | float) and math.isfinite(value):
        return json.dumps(value)
    return None


def json_value(columns: Mapping[str, Any], name: str) -> Any:
    """A column's value, once it's certain that JSON can hold it."""
    value = column_of(columns, name)
    try:
        json.dumps(value, allow_nan=False)
    except TypeError:
        raise ValueError(f"column {name!r} holds {_foreign(value)}, which JSON can't hold; remove it from fields") from None
    except ValueError:
        raise ValueError(f"column {name!r} holds NaN or an infinite number, which JSON can't hold; remove it from fields") from None
    return value


def _foreign(value: Any) -> str:
    """What JSON lacks, also inside lists and objects."""
    if isinstance(value, list | tuple | dict):
        inside = value.values() if isinstance(value, dict) else value
        return next((found for each in inside if (found := _foreign(each))), "")
    if isinstance(value, Unreadable):
        return f"a value that can't be read ({value.reason})"
    return "" if value is None or isinstance(value, str | int | float) else kind_of(value)


def kind_of(value: object) -> str:
    """What JSON calls a value, with the value itself where it is short."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, int | float):
        return f"the number {value}"
    names: dict[type, str] = {str: "a text", list: "a list", dict: "an object", bytes: "bytes"}
    return names.get(type(value), f"a {type(value).__name__}")
