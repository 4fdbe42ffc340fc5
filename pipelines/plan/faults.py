"""Faults of a pipeline file as sentences: where, what was expected, what was found."""

from __future__ import annotations

import difflib
import json
import re
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

M = TypeVar("M", bound=BaseModel)

UNION_BRANCH = re.compile(r"str|int|float|bool|.*\[.*|[A-Z]\w*(Config|Settings)")
"""pydantic puts the tag of a union's branch between the names of a location; a tag is not in the file."""
TOO_DEEP = "is nested too deeply to be read"
EXPECTED = {
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    **dict.fromkeys(("list_type", "tuple_type", "set_type", "frozen_set_type"), "a list"),
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type", "dataclass_type"), "a table"),
}
"""What was expected, in TOML's terms, by pydantic's type of an error."""
BOUNDS = {"greater_than": "more than", "greater_than_equal": "at least", "less_than": "less than", "less_than_equal": "at most"}


@dataclass(frozen=True)
class Origin:
    """Where a setting was written: a line of a file, or --set."""

    file: Path
    name: str = ""
    """The file's name, as messages give it."""
    line: int | None = None
    override: str = ""
    """The --set that wrote it, as typed; `file` is then the pipeline file."""

    def place(self) -> str:
        """ "variant.toml, line 3", or "--set stages.rl=false"."""
        if self.override:
            return "--set " + self.override.replace("\n", "\\n")
        return f"{self.name}, line {self.line}" if self.line else self.name


@dataclass(frozen=True)
class Fault:
    """One thing that a person must fix: `Fault("stages.pretrain.lr", "expected a number, found 'fast'")`."""

    where: str
    what: str
    origin: Origin | None = None

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"

    def located(self) -> str:
        """The fault with the line or the --set that it comes from, if that is known."""
        if self.origin is None:
            return str(self)
        if self.origin.override:
            setting = self.origin.override.partition("=")[0].strip()
            return f"{self.origin.place()}: {self.what if self.where == setting else self}"
        return f"{self.origin.place()}: {self}"


class ConfigError(Exception):
    """All faults of a pipeline file: those with a line by line, then the others in the order in which they were found."""

    def __init__(self, path: Path | str, faults: Iterable[Fault]) -> None:
        faults = sorted(faults, key=_place)
        super().__init__(path, faults)
        self.path = path
        self.faults = faults

    def __str__(self) -> str:
        count = "one fault" if len(self.faults) == 1 else f"{len(self.faults)} faults"
        return "\n".join([f"{self.path}: {count}; no stage was started.", *(f"  {fault.located()}" for fault in self.faults)])


def validate(model: type[M], values: Any, where: str, beside: Iterable[str] = ()) -> tuple[M | None, list[Fault]]:
    """An instance of `model`, or every fault in `values` as a sentence. `beside`: keys that are read elsewhere, for suggestions."""
    try:
        # As strict JSON: `true` and "3" are not numbers, and yet a list can become a tuple and a string a Path.
        return model.model_validate_json(json.dumps(values, default=str), strict=True), []
    except ValidationError as error:
        return None, [_fault(model, each, where, tuple(beside)) for each in error.errors(include_url=False)]
    except (Exception, SystemExit) as error:  # a validator may be anyone's code
        return None, [Fault(where, f"its settings can't be checked: {type(error).__name__}: {error}")]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ "; did you mean 'steps'?" if a known name is near, else nothing."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def shown(value: Any) -> str:
    """A value as a message gives it: as Python writes it, but `true` and `false` as TOML does."""
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _place(fault: Fault) -> tuple[bool, str, int]:
    origin = fault.origin
    return (True, "", 0) if origin is None or origin.line is None else (False, origin.name, origin.line)


def _fault(model: type[BaseModel], error: Any, where: str, beside: tuple[str, ...]) -> Fault:
    location = [str(part) for part in error["loc"] if not UNION_BRANCH.fullmatch(str(part))]
    if error["type"] == "extra_forbidden":
        *above, name = (str(part) for part in error["loc"])  # an unknown key may be called `str`
        known = [*_fields_at(model, error["loc"][:-1]), *(beside if len(error["loc"]) == 1 else ())]
        full = ".".join([*([where] if where else []), *(part for part in above if not UNION_BRANCH.fullmatch(part)), name])
        return Fault(full, f"unknown key{did_you_mean(name, known) or '; known here: ' + ', '.join(sorted(known))}")
    full = ".".join([*([where] if where else []), *location]) or "file"
    if error["type"] == "json_invalid":
        return Fault(full, TOO_DEEP)
    if error["type"] == "missing":
        return Fault(full, "is missing")
    if error["type"] == "value_error":
        return Fault(full, error["msg"].removeprefix("Value error, "))
    if error["type"] in BOUNDS:
        (bound,) = error["ctx"].values()
        return Fault(full, f"expected {BOUNDS[error['type']]} {bound:.15g}, found {shown(error['input'])}")
    if error["type"] == "too_short":
        return Fault(full, f"expected at least {error['ctx']['min_length']}, found {error['ctx']['actual_length']}")
    expected = EXPECTED.get(error["type"]) or error["msg"].removeprefix("Input should be ").replace("a valid ", "a ")
    return Fault(full, f"expected {expected}, found {shown(error['input'])}")


def _fields_at(model: Any, location: tuple[Any, ...]) -> list[str]:
    for part in location:
        if isinstance(model, type) and issubclass(model, BaseModel) and part in model.model_fields:
            model = model.model_fields[part].annotation
        model = settings_class_in(model)
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


def settings_class_in(annotation: Any) -> Any:
    """The settings class inside an annotation such as `list[SourceSettings] | None`; the annotation itself if there is none."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, list, tuple, dict, typing.Annotated):
        for each in typing.get_args(annotation):
            found = settings_class_in(each)
            if isinstance(found, type) and issubclass(found, BaseModel):
                return found
    return annotation
