"""What users' files and scripts rely on: pipelines.artifacts, pipelines.stage, pipelines.ingest, and the command line.

public_surface.txt beside this file has all of it. After a change on purpose:

    python -m tests.test_public_surface --record
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, get_origin

import pytest
import typer

from gpt.settings import Settings
from pipelines.cli import app
from pipelines.plan.describe import settings_of
from pipelines.stage import StageContext

RECORDED = Path(__file__).with_name("public_surface.txt")
MODULES = ("pipelines.artifacts", "pipelines.stage", "pipelines.ingest")
LOST = """
Lines with - are gone or differ now. Users' files and scripts that rely on them stop working, so
  - an old name must end with an error that gives the new one (MOVED in pipelines/plan/user_code.py is such a list),
  - CHANGELOG.md must say under Changed what they have to write instead."""
NEW = """
Lines with + are new. Users will rely on them, so they stay from now on; CHANGELOG.md needs a line under Added."""
RECORD = """
If all of it is on purpose, record it: python -m tests.test_public_surface --record"""


def surface() -> list[str]:
    """One line for every name, setting and flag."""
    lines = []
    for name in MODULES:
        lines += [f"# {name}", *(line for each in sorted(public_names(importlib.import_module(name))) for line in lines_of(name, each)), ""]
    return [*lines, "# gptline", *command_lines()]


def public_names(module: ModuleType) -> list[str]:
    """The names that a module offers; of one without `__all__` those that it defines itself."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    return [
        name
        for name, each in vars(module).items()
        if not name.startswith("_") and not inspect.ismodule(each) and defined_in(module, name, each)
    ]


def defined_in(module: ModuleType, name: str, value: Any) -> bool:
    if inspect.isclass(value) or inspect.isfunction(value):
        return bool(value.__module__ == module.__name__)
    return (name.isupper() and len(name) > 1) or get_origin(value) is not None  # a constant, or an alias such as Role


def lines_of(module: str, name: str) -> Iterator[str]:
    value = getattr(importlib.import_module(module), name)
    if inspect.isfunction(value):
        yield f"{name}{signature(value)}"
    elif not inspect.isclass(value):
        yield f"{name}: {shown(value)}"
    else:
        yield from class_lines(name, value)


def class_lines(name: str, value: type) -> Iterator[str]:
    bases = ", ".join(base.__name__ for base in value.__bases__ if base is not object)
    yield f"class {name}({bases})" if bases else f"class {name}"
    if issubclass(value, Settings):
        for setting in settings_of(value):
            yield f"{name}.{setting.name}: {'; '.join(filter(None, (setting.type_name, setting.default)))}"
    else:
        fields = vars(value).get("__annotations__", {})
        yield from (
            f"{name}.{field}: {annotation}" for field, annotation in fields.items() if field[0] != "_" and "ClassVar" not in annotation
        )
        yield from (f"{name}.{field} = {shown(vars(value)[field])}" for field in ("kind", "files", "required") if field in vars(value))
        if "__init__" in vars(value) and not getattr(value, "_is_protocol", False):
            yield f"{name}{signature(value)}"
    for member, each in vars(value).items():
        function = each.__func__ if isinstance(each, classmethod | staticmethod) else each
        if not member.startswith("_") and inspect.isfunction(function) and not hasattr(each, "decorator_info"):
            yield f"{name}.{member}{signature(function)}"


def signature(function: Callable[..., Any]) -> str:
    """Without the quotes of annotations that aren't evaluated."""
    return re.sub(r"(: |-> )(['\"])(.*?)\2(?=[,) ]|$)", r"\1\3", str(inspect.signature(function)))


def shown(value: Any) -> str:
    if isinstance(value, dict) and all(inspect.isclass(each) for each in value.values()):
        return "{" + ", ".join(f"{name!r}: {each.__name__}" for name, each in value.items()) + "}"
    return repr(value)


def command_lines() -> Iterator[str]:
    group: Any = typer.main.get_command(app)
    yield from parameter_lines("gptline", group)
    for verb, command in sorted(group.commands.items()):
        yield f"gptline {verb}"
        yield from parameter_lines(f"gptline {verb}", command)


def parameter_lines(prefix: str, command: Any) -> Iterator[str]:
    for each in command.params:
        names = "/".join(each.opts) if each.param_type_name == "option" else ""
        takes = "" if getattr(each, "is_flag", False) else each.metavar or "VALUE"
        required = (
            "required"
            if each.required
            else "optional"
            if each.default is None or each.default is False
            else f"default {str(each.default)!r}"
        )
        repeated = ", may be repeated" if getattr(each, "multiple", False) else ""
        yield f"{' '.join(filter(None, (prefix, names, takes)))}: {required}{repeated}"


def test_what_users_rely_on_is_as_recorded():
    recorded, found = RECORDED.read_text(encoding="utf-8").splitlines(), surface()
    differing = [
        line for line in difflib.unified_diff(recorded, found, lineterm="", n=0) if line[:3] not in ("---", "+++") and line[0] in "+-"
    ]
    lost, new = any(line[0] == "-" for line in differing), any(line[0] == "+" for line in differing)
    meaning = (LOST if lost else "") + (NEW if new else "") + RECORD
    assert not differing, "\n".join(["the public surface differs from tests/public_surface.txt:", *differing]) + f"\n{meaning}"


@pytest.mark.parametrize(
    "line",
    [
        "class Documents(Records)",
        "Model.files = ('model.safetensors', 'config.json', 'tokenizer.json')",
        "StageContext.publish(self, kind: type[A], **metadata: Any) -> A",
        "HoldOut.share: number, more than 0, less than 1; not set",
        "gptline plan --config: optional",
        "gptline submit --address URL: required",
        "gptline run --set K=V: optional, may be repeated",
    ],
)
def test_the_record_has_classes_signatures_settings_and_flags(line: str):
    assert line in surface()


def test_a_method_that_is_renamed_is_seen(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(StageContext, "note")
    with pytest.raises(AssertionError, match=r"-StageContext.note\(self, text: str\) -> None\n(.|\n)*must end with an error that gives"):
        test_what_users_rely_on_is_as_recorded()


def test_every_name_that_ingest_offers_exists():
    ingest = importlib.import_module("pipelines.ingest")
    assert [name for name in ingest.__all__ if not hasattr(ingest, name)] == []


if __name__ == "__main__":
    assert sys.argv[1:] == ["--record"], __doc__
    RECORDED.write_text("".join(f"{line}\n" for line in surface()), encoding="utf-8")
