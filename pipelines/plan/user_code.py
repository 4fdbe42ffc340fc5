"""Functions of the user's own, in files beside the TOML: `uses = "./clean.py:clean"`, or a setting: `reward = "./reward.py:score"`."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt.settings import Settings, UserFunction
from pipelines.plan.code import PACKAGES
from pipelines.plan.config import Fault

USER_MODULE = "gptline_user_"
"""Prefix of the module name under which a user's file is imported."""

MOVED = {
    **{f"pipelines.{name}": "pipelines.ingest" for name in ("records", "dialogues", "reading", "documents")},
    **{f"pipelines.{name}": f"pipelines.plan.{name}" for name in ("config", "graph", "planner", "snapshot")},
    **{f"pipelines.{name}": f"pipelines.store.{name}" for name in ("store", "journal", "lease")},
    **{f"pipelines.{name}": f"pipelines.run.{name}" for name in ("runner", "execute", "preflight", "submission")},
    **{f"pipelines.{name}": f"pipelines.observe.{name}" for name in ("progress", "page", "lineage", "delivery", "doctor")},
    **{f"pipelines.{name}": f"pipelines.serve.{name}" for name in ("chat", "sample")},
    "pipelines.fingerprint": "pipelines.plan.code",
    "pipelines.tracking": "pipelines.observe",
    "pipelines.watching": "pipelines.run.follow",
    "gpt.rl": "the modules of gpt.rl, such as gpt.rl.loop",
    "gpt.scorers": "gpt.rl.scorers",
    "gpt.advantages": "gpt.rl.advantages",
}
"""Where modules are now that users' files may import by an earlier name. Only pipelines.artifacts, stage and ingest are made for that."""


@dataclass(frozen=True)
class UserCode:
    """A function of the user's own that a stage's table names: `UserCode("reward", "./reward.py:score", Path("/line/reward.py"))`."""

    setting: str
    """The setting that names it: "uses", or one of type `UserFunction`."""
    reference: str
    file: Path

    def entry(self) -> tuple[str, str]:
        """Module and name, as `Code` follows them."""
        return self.file.stem, self.reference.rpartition(":")[2]


def load_function(reference: str, folder: Path) -> tuple[types.FunctionType, Path]:
    """Return the function that "./file.py:function" names, and its file, which is executed as an import is.

    ValueError says what is wrong with it.
    """
    path, colon, name = reference.rpartition(":")
    if not colon:
        raise ValueError(f"is {reference!r}, expected a function of your own, such as './file.py:function'")
    file = (folder / path).resolve()
    if not file.is_file() or file.suffix != ".py":
        raise ValueError(f"{reference!r}: there is no Python file {file}")
    if file.stem in PACKAGES:
        raise ValueError(f"{reference!r}: {file.name} has the name of a package of gptline; rename the file")
    module = load_user_module(file)
    function = getattr(module, name, None)
    if not inspect.isfunction(function):
        known = [name for name, each in vars(module).items() if inspect.isfunction(each) and each.__module__ == module.__name__]
        actual = "a class" if inspect.isclass(function) else f"of type {type(function).__name__}"
        found = f"no function {name!r}" if function is None else f"{name!r}, {actual}, not a function"
        raise ValueError(f"{reference!r}: {path} has {found}; its functions: {', '.join(known) or 'none'}")
    return function, file


def load_user_module(file: Path) -> types.ModuleType:
    """Import a user's file under a module name that can't shadow any other."""
    name = f"{USER_MODULE}{file.stem}"
    module = sys.modules.get(name)
    if module is not None and module.__file__ == str(file):
        return module
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))  # at the end: files beside it can be imported but shadow nothing
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, KeyboardInterrupt):  # not a fault of the file
            raise
        raise ValueError(f"{file} can't be imported: {_moved(error) or f'{type(error).__name__}: {error}'}") from error
    return module


def _moved(error: BaseException) -> str | None:
    """Say where the module is now whose import failed, if it moved."""
    if not isinstance(error, ImportError) or error.name not in MOVED:
        return None
    return f"{error.name} has moved; import from {MOVED[error.name]} ({error})"


def read_user_code(uses: UserCode | None, config: Settings | None, folder: Path, where: str) -> tuple[list[UserCode], list[Fault]]:
    """Load every function of the user's own that a stage names, in `uses` and in its settings."""
    found = [uses] if uses else []
    faults = []
    for setting, reference in _user_functions(config, ""):
        try:
            function, file = load_function(reference, folder)
        except ValueError as error:
            faults.append(Fault(f"{where}.{setting}", str(error)))
            continue
        module = f"{USER_MODULE}{file.stem}"
        if function.__module__ != module or getattr(sys.modules[module], function.__qualname__, None) is not function:
            actual = f"{function.__module__.removeprefix(USER_MODULE)}.{function.__qualname__}"
            expected = f"expected a `def` at the top level of {file.name}, since other processes import it by its name"
            faults.append(Fault(f"{where}.{setting}", f"{reference!r} is {actual}; {expected}"))
            continue
        found.append(UserCode(setting, reference, file))
    for each in found[1:]:
        if each.file.parent != found[0].file.parent:
            faults.append(
                Fault(
                    f"{where}.{each.setting}",
                    f"{each.reference!r} and {found[0].reference!r} are in two folders, but a stage's own code is imported from one; "
                    "put the files side by side",
                )
            )
    return found, faults


def _user_functions(value: Any, setting: str) -> Iterator[tuple[str, str]]:
    """Yield the settings of type `UserFunction`, at any depth: ("reward", "./reward.py:score")."""
    if isinstance(value, UserFunction):
        yield setting, str(value)
    elif isinstance(value, Settings | dict):
        for name, each in value if isinstance(value, Settings) else value.items():  # dict(settings) fails on a setting called `keys`
            yield from _user_functions(each, f"{setting}.{name}" if setting else str(name))
    elif isinstance(value, list | tuple | set | frozenset):
        for index, each in enumerate(value):
            yield from _user_functions(each, f"{setting}.{index}")
