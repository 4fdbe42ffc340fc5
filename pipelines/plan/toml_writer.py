"""Write a pipeline file: one line per setting, a table per stage, short tables and lists on one line.

`tomllib` only reads. Writers such as `tomli-w` put every list on lines of its own and every `inputs` in a table of its own, which makes a
stage of four lines fifteen; this one writes what a person would.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

LINE = 120
BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
TABLES_OF_TABLES = ("stages",)
"""Top-level tables whose members are written as tables too, however short: `[stages.pretrain]`."""


def write_toml(document: Mapping[str, Any]) -> str:
    """The document as TOML. TOML has no null: None in a table is left out, None in a list raises ValueError."""
    blocks = [_lines({name: each for name, each in document.items() if not isinstance(each, Mapping)})]
    for name, each in document.items():
        if isinstance(each, Mapping):
            blocks += _table((name,), each, nested=name in TABLES_OF_TABLES)
    return "\n".join("".join(f"{line}\n" for line in block) for block in blocks if block)


def write_value(value: Any) -> str:
    """A value in one line of TOML."""
    if isinstance(value, Mapping):
        pairs = [f"{write_key(str(name))} = {write_value(each)}" for name, each in value.items() if each is not None]
        return f"{{ {', '.join(pairs)} }}" if pairs else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(write_value(each) for each in value)}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, float):
        return repr(value)  # TOML writes inf and nan as Python does
    if value is None:
        raise ValueError("None can't be written as TOML, which has no null")
    return json.dumps(value)


def write_key(name: str) -> str:
    return name if BARE_KEY.fullmatch(name) else write_value(name)


def _table(path: tuple[str, ...], table: Mapping[str, Any], *, nested: bool = False) -> list[list[str]]:
    """The table's lines, then those of its members that need a table of their own."""
    apart = {name: each for name, each in table.items() if isinstance(each, Mapping) and (nested or _is_long(name, each))}
    lines = _lines({name: each for name, each in table.items() if name not in apart})
    header = f"[{'.'.join(map(write_key, path))}]"
    blocks = [[header, *lines]] if lines or not apart else []
    for name, each in apart.items():
        blocks += _table((*path, name), each)
    return blocks


def _lines(pairs: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, value in pairs.items():
        if value is None:
            continue
        if isinstance(value, list | tuple) and value and _is_long(name, value):
            lines += [f"{write_key(name)} = [", *(f"    {write_value(each)}," for each in value), "]"]
        else:
            lines.append(f"{write_key(name)} = {write_value(value)}")
    return lines


def _is_long(name: str, value: Any) -> bool:
    return len(write_key(name)) + 3 + len(write_value(value)) > LINE
