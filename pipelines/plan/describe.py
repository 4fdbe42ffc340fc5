"""What stage kinds and tables of a pipeline file take, read from their signatures and settings classes.

`gptline describe` prints it, and docs/settings.md is generated from it.
"""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined, to_jsonable_python

from gpt.settings import OPERATIONAL, Settings, UserFunction
from pipelines.plan.config import ClusterConfig, Gate, PipelineFile, Resources, StoreConfig, TrackingConfig
from pipelines.plan.faults import did_you_mean
from pipelines.plan.kinds import Kind, known_kinds, load_kind
from pipelines.plan.toml_writer import write_value

WIDTH = 110
TABLES: dict[str, tuple[str, type[Settings]]] = {
    "pipeline": ("the file's own keys", PipelineFile),
    "store": ("[store]", StoreConfig),
    "tracking": ("[tracking]", TrackingConfig),
    "cluster": ("[cluster]", ClusterConfig),
    "resources": ("[stages.NAME.resources]; in no key", Resources),
    "gate": ("gate = { ... } of a stage, or a list of them; in no key", Gate),
}
"""The tables that are not a stage kind's: what `describe` calls them, where they are written, and their settings class."""
SCALARS = {int: "whole number", float: "number", str: "text", bool: "true or false", Path: "path", Any: "any value"}
BOUNDS = (("gt", "more than"), ("ge", "at least"), ("lt", "less than"), ("le", "at most"))


@dataclass(frozen=True)
class Setting:
    """One field: `Setting("steps", "whole number, at least 1", "required", True, "Optimizer steps.", TrainSettings)`."""

    name: str
    """Dotted below a table; `mixture[].weight` in a list of tables."""
    type_name: str
    default: str
    """"required", "not set", or a value as TOML writes it."""
    in_key: bool
    text: str
    owner: type[Settings]
    """The class that declares it."""


def summary(kind: Kind) -> str:
    """One sentence: of our kinds their module's, of a user's function its own."""
    documented = kind.function if kind.file else sys.modules[kind.function.__module__]
    text = re.sub(r"^[A-Z][\w ]{0,20}: ", "", first_sentence(inspect.getdoc(documented) or ""))
    return text[:1].upper() + text[1:]


def first_sentence(text: str) -> str:
    paragraph = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=\.) (?=[A-Z`])", paragraph)[0]


def settings_of(model: type[Settings]) -> list[Setting]:
    """Every field of a settings class, each followed by the fields of the table that it holds."""
    return list(_settings(model, "", set(), in_key=True))


def describe_all() -> list[str]:
    """The first page: every kind and every table in one line."""
    kinds = [(name, load_kind(name, Path())) for name in known_kinds()]
    width = max(len(name) for name, _ in kinds) + 2
    lines = ["stage kinds; `gptline describe KIND` shows its inputs and settings, and so for a function of yours: ./file.py:function", ""]
    lines += [_hanging(f"  {name:<{width}}", summary(kind)) for name, kind in kinds]
    lines += ["", "tables of a pipeline file; `gptline describe TABLE` shows their settings", ""]
    lines += [f"  {name:<{width}}{place}" for name, (place, _) in TABLES.items()]
    return lines


def describe(name: str, folder: Path) -> list[str]:
    """What a kind or a table takes; ValueError if there is neither. A user's file is relative to `folder`, and is executed."""
    if name in TABLES:
        place, model = TABLES[name]
        return [f"{name}: {place}", "", *_setting_lines(settings_of(model))]
    if ":" not in name and name not in known_kinds() and (hint := did_you_mean(name.lower(), [*known_kinds(), *TABLES])):
        raise ValueError(f"there is no stage kind and no table {name!r}{hint}")
    kind = load_kind(name, folder)
    settings = settings_of(kind.config)
    in_key = [each for each in settings if each.in_key]
    operational = [each for each in settings if not each.in_key]
    width = max((len(each) for each in kind.inputs), default=0) + 2
    lines = [_hanging(f"{name}: ", summary(kind)), "", "inputs" if kind.inputs else "inputs: none"]
    lines += [f"  {each:<{width}}{takes}" for each, takes in kind.inputs.items()]
    lines += [f"output: {kind.output.kind}"]
    if in_key:
        lines += ["", "settings that are part of the key: changing one rebuilds the stage", "", *_setting_lines(in_key)]
    if operational:
        lines += ["", "operational settings: changing one rebuilds nothing", "", *_setting_lines(operational)]
    return [*lines, "", "every stage also takes `uses`, `inputs`, `resources` and `gate`: see `gptline describe resources`, `... gate`"]


def _setting_lines(settings: list[Setting]) -> list[str]:
    lines = []
    for each in settings:
        default = each.default if each.default in ("required", "not set", "") else f"default {each.default}"
        lines.append(_hanging(f"  {each.name}: ", "; ".join(part for part in (each.type_name, default) if part)))
        if each.text:
            lines += textwrap.wrap(each.text, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return lines


def _hanging(head: str, text: str) -> str:
    return textwrap.fill(text, WIDTH, initial_indent=head, subsequent_indent=" " * (len(head) if head.startswith("  ") else 4))


def _settings(model: type[Settings], prefix: str, listed: set[tuple[str, str]], *, in_key: bool) -> Iterator[Setting]:
    for name, field in model.model_fields.items():
        kept = in_key and OPERATIONAL not in field.metadata
        table, many = _table_in(field.annotation)
        text = " ".join((field.description or "").split())
        if not prefix:
            listed.add((name, text))
        elif (name, text) in listed:  # a mixture's tables have the keys of the stage's own
            continue
        yield Setting(prefix + name, type_of(field), _default(field, table), kept, text, _owner(model, name))
        if table is not None and not issubclass(model, table):
            yield from _settings(table, f"{prefix}{name}{'[]' if many else ''}.", listed, in_key=kept)


def _owner(model: type[Settings], name: str) -> type[Settings]:
    declaring = [each for each in model.__mro__ if name in vars(each).get("__annotations__", {})]
    return declaring[-1] if declaring else model


def _table_in(annotation: Any) -> tuple[type[Settings] | None, bool]:
    """The settings class inside an annotation, and whether there is a list of it."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return annotation, False
    found = [_table_in(each) for each in typing.get_args(annotation)]
    table = next((each for each, _ in found if each is not None), None)
    return table, any(many for _, many in found) or (table is not None and typing.get_origin(annotation) in (list, tuple))


def type_of(field: FieldInfo) -> str:
    """A field's type and bounds in words: "whole number, at least 1"."""
    return ", ".join([_words(field.annotation), *_bounds(field.metadata)])


def _bounds(metadata: list[Any]) -> list[str]:
    bounds = [f"{words} {getattr(each, name):.15g}" for each in metadata for name, words in BOUNDS if getattr(each, name, None) is not None]
    for each in metadata:
        if (least := getattr(each, "min_length", None)) is not None:
            bounds.append(f"at least {least} long")
        if isinstance(each, FieldInfo):
            bounds += _bounds(each.metadata)
    return bounds


def _words(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return ", ".join([_words(arguments[0]), *_bounds(list(arguments[1:]))])
    if origin is typing.Literal:
        return " | ".join(write_value(each) for each in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_words(each) for each in arguments if each is not type(None)))
    if origin in (list, tuple, set, frozenset):
        items = dict.fromkeys(_words(each) for each in arguments if each is not Ellipsis)
        return f"list of {' and '.join('tables' if each == 'table' else each for each in items) or 'values'}"
    if origin is dict:
        return "table of tables" if typing.get_origin(arguments[1]) is dict else f"table of {_words(arguments[1])}"
    if annotation is UserFunction:
        return 'a function of yours, "./file.py:function"'
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return "table"
    return SCALARS.get(annotation) or str(getattr(annotation, "__name__", annotation))


def _default(field: FieldInfo, table: type[Settings] | None) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is None or value is PydanticUndefined:
        return "not set"
    if table is not None and isinstance(value, table):
        return ""
    try:
        return write_value(to_jsonable_python(value))
    except ValueError:
        return repr(value)
