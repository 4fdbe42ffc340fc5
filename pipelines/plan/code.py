"""The code that a stage can reach: part of its key, and what a snapshot must hold.

Code is read, never imported. Top-level definitions are followed by name from the kind's function, through imports at module and function
level, and are hashed as syntax trees without docstrings and comments, so that an edit of those reruns nothing. Three rules keep the set
small and still sound (a test profiles every stage and checks that each function that ran is in its key):

- a Protocol class is an interface and never runs, so it is left out;
- the fields of the kind's own config are in the key by value, so their definitions are left out;
- what lies behind `StageContext` and `Rank` (store, gang, runner) is not followed, since it decides how work is carried out, not what
  comes out.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

from pipelines.plan.syntax import (
    assigned_names,
    called,
    canonical_dump,
    dotted_names,
    imported_modules,
    imports_in,
    is_bare_string,
    is_field,
    is_protocol,
    parameter_annotations,
    walk,
    without_fields,
)

PACKAGES = ("pipelines", "gpt", "cluster")
DUMP_VERSION = 1
"""The version of `canonical_dump`. It is part of every hash, so that a change to the dump changes the keys."""

LOOSE = "<module>"
"""Stands for a module's statements that define nothing."""
WHOLE = "*"
"""Stands for everything in a module."""


N = TypeVar("N", bound=ast.stmt)
Name = tuple[str, str]
"""A definition's module and its name there."""


@dataclass(frozen=True)
class _Definition:
    """What a top-level definition reads and imports."""

    chains: frozenset[tuple[str, ...]]
    """Dotted names read in it: ("F", "cross_entropy"), ("GPT",)."""
    imports: dict[str, list[str]]
    """Imports inside it: bound name to dotted targets, several if the code chooses between them."""
    stars: list[str]
    """Modules imported by star."""


@dataclass
class _Module:
    """A parsed file of ours or the user's, or a folder of files, which has an empty tree."""

    name: str
    package: str
    tree: ast.Module
    nodes: dict[str, list[ast.stmt]] = field(default_factory=lambda: {LOOSE: []})
    """Top-level definitions by name; LOOSE holds the statements that define nothing."""
    imports: dict[str, list[str]] = field(default_factory=dict)
    """What the module binds by imports at the top level and in loose statements: name to dotted targets."""
    definitions: dict[str, _Definition] = field(default_factory=dict)
    """The definitions in `nodes` that were asked for so far."""
    digests: dict[tuple[str, bool], str] = field(default_factory=dict)
    """Their hashes; True: without the fields, which are in the key by value."""


class Code:
    """Our source and the user's as definitions that refer to each other.

    `root` holds our packages; `user` is the folder of a user's own files, whose imports of each other are followed too.
    """

    def __init__(self, root: Path, user: Path | None = None) -> None:
        self._root = root
        self._user = user
        self._modules: dict[str, _Module] = {}
        self._paths: dict[str, Path | None] = {}
        self._known: dict[tuple[tuple[Name, ...], tuple[Name, ...]], dict[str, str]] = {}
        self._settings: dict[Name, bool] = {}

    def leaves(self, entries: Iterable[Name], called: Iterable[Name] = ()) -> dict[str, str]:
        """Hash all definitions that these (module, name) pairs can reach: {"gpt.model:GPT": "1f0c..."}.

        A Settings parameter of an entry is the stage's config, whose fields are in the key by value, so they are left out here. `called`
        are functions that aren't given that config. ValueError names the pair that can't be found, or the file that can't be parsed.
        """
        asked = entries, called = tuple(entries), tuple(called)
        if asked not in self._known:  # stages of one kind have the same entries
            reached = self._reach([*entries, *called])
            by_value = self._by_value(entries, reached)
            digests = {":".join(name): self._digest(name, by_value=name in by_value) for name in reached}
            self._known[asked] = {name: digest for name, digest in digests.items() if digest}
        return dict(self._known[asked])

    def files(self, entries: Iterable[Name]) -> list[Path]:
        """The user's own files that are needed to import these entries: those that they reach and all that those import."""
        waiting = [module_name for module_name, _ in self._reach(entries)]
        found: dict[str, Path] = {}
        while waiting:
            name = waiting.pop()
            if not name or name in found or name.split(".")[0] in PACKAGES:
                continue
            waiting.append(name.rpartition(".")[0])
            path = self._path(name)
            if path is not None:
                found[name] = path
                module = self._module(name)
                waiting += imported_modules(module.tree, module.package)
        return sorted({path for path in found.values() if path.is_file()})

    def _reach(self, entries: Iterable[Name]) -> list[Name]:
        """List the definitions that can be reached by name, each once."""
        waiting = list(dict.fromkeys(self._entry(module_name, name) for module_name, name in entries))
        seen = set(waiting)
        reached = []
        while waiting:
            module_name, name = waiting.pop()
            module = self._module(module_name)
            parts = module_name.split(".")
            found = [(".".join(parts[:size]), LOOSE) for size in range(1, len(parts) + 1)]
            if name in module.nodes:
                reached.append((module_name, name))
                found += self._references(module, self._definition((module_name, name)))
            if name == WHOLE:
                found += [(module_name, each) for each in module.nodes]
            # imported there and re-exported
            passed_on = itertools.chain.from_iterable(module.imports.values()) if name == WHOLE else module.imports.get(name, ())
            found += [each for target in passed_on for each in self._target(target, ())]
            fresh = [each for each in dict.fromkeys(found) if each not in seen]
            seen.update(fresh)
            waiting += fresh
        return reached

    def _entry(self, module_name: str, name: str) -> Name:
        path = self._path(module_name)
        if path is None:
            folder = self._root if module_name.split(".")[0] in PACKAGES else self._user
            hint = "; a file's name can't have a dot before .py" if "." in module_name and folder == self._user else ""
            raise ValueError(f"the code of {module_name}:{name} can't be found: {folder} has no module {module_name!r}{hint}")
        module = self._module(module_name)
        if name in module.nodes or name in module.imports:
            return module_name, name
        if not module.nodes[LOOSE]:
            raise ValueError(f"the code of {module_name}:{name} can't be found: {path} defines no {name!r}")
        return module_name, WHOLE  # a loose statement defines it: a star import, or a def under an if

    def _references(self, module: _Module, definition: _Definition) -> Iterator[Name]:
        for star in definition.stars:
            yield from self._target(star, ())
        for chain in definition.chains:
            yield from self._named(module, chain, definition.imports)

    def _named(self, module: _Module, chain: tuple[str, ...], imports: Mapping[str, list[str]] = MappingProxyType({})) -> Iterator[Name]:
        """Yield what a dotted name may be bound to: several definitions if the code chooses or wraps one in another."""
        for target in [*imports.get(chain[0], ()), *module.imports.get(chain[0], ())]:
            yield from self._target(target, chain[1:])
        if chain[0] in module.nodes:
            yield module.name, chain[0]

    def _target(self, dotted: str, rest: tuple[str, ...]) -> list[Name]:
        """Find what `dotted.rest` names: a definition in a module of ours, or the whole module if that can't be determined."""
        parts = [*dotted.split("."), *rest]
        size = 0
        while size < len(parts) and self._path(".".join(parts[: size + 1])):
            size += 1
        if not size:
            return []  # neither ours nor the user's
        module_name = ".".join(parts[:size])
        module = self._module(module_name)
        if size == len(parts) or (parts[size] not in module.nodes and parts[size] not in module.imports):
            return [(module_name, WHOLE)]
        return [(module_name, parts[size])]

    def _definition(self, name: Name) -> _Definition:
        module = self._module(name[0])
        if name[1] not in module.definitions:
            nodes = self._counted(name, ())
            imports, stars = imports_in([each for node in nodes for each in walk(node)], module.package)
            module.definitions[name[1]] = _Definition(frozenset(chain for node in nodes for chain in dotted_names(node)), imports, stars)
        return module.definitions[name[1]]

    def _digest(self, name: Name, *, by_value: bool) -> str:
        """Hash a definition; empty if nothing in it counts."""
        module, asked = self._module(name[0]), (name[1], by_value)
        if asked not in module.digests:
            nodes = self._counted(name, [name] if by_value else [])
            module.digests[asked] = _sha256(nodes, module) if nodes else ""
        return module.digests[asked]

    def _counted(self, name: Name, by_value: Collection[Name]) -> list[ast.stmt]:
        """The statements of a definition that count for the key."""
        nodes = [node for node in self._module(name[0]).nodes[name[1]] if not is_protocol(node)]
        return [without_fields(node) for node in nodes] if name in by_value else nodes

    # ---- which settings the key holds by value ----

    def _by_value(self, entries: Iterable[Name], reached: Collection[Name]) -> set[Name]:
        """The entries' config classes and all Settings that their `model_dump` holds, except those that the reached code builds itself.

        Settings that code builds (a preset, a default of its own) are not in the dump, so a field's default counts as code there.
        """
        functions = [node for entry in entries for name in self._resolved([entry]) for node in self._nodes(name, ast.FunctionDef)]
        annotations = [(name, each) for name, node in functions for each in parameter_annotations(node)]
        held = self._fields_of(self._settings_in(annotations))
        while True:
            outside = [name for name in reached if name not in held and self._is_settings(name)]
            calls = [(name, each) for name in reached for node in self._counted(name, held) for each in called(node)]
            gone = held & self._fields_of([*outside, *self._settings_in(calls)])
            if not gone:
                return held
            held -= gone

    def _fields_of(self, classes: Iterable[Name]) -> set[Name]:
        """Collect Settings classes, those that they extend, and those that are their fields' types."""
        waiting = list(classes)
        found: set[Name] = set()
        while waiting:
            for name in self._ancestry(waiting.pop()):
                if name not in found and self._is_settings(name):
                    found.add(name)
                    bodies = [each for _, node in self._nodes(name, ast.ClassDef) for each in node.body]
                    waiting += self._settings_in([(name, each.annotation) for each in bodies if is_field(each)])
        return found

    def _settings_in(self, expressions: Iterable[tuple[Name, ast.expr]]) -> list[Name]:
        """The Settings classes that expressions name; each expression comes with the definition that contains it."""
        return [
            name
            for where, expression in expressions
            for chain in dotted_names(expression)
            for name in self._resolved(self._targets(where, chain))
            if self._is_settings(name)
        ]

    def _targets(self, where: Name, chain: tuple[str, ...]) -> Iterable[Name]:
        if chain == ("cls",):  # in a class method
            return [where]
        return self._named(self._module(where[0]), chain, self._definition(where).imports)

    def _is_settings(self, name: Name) -> bool:
        if name not in self._settings:
            self._settings[name] = ("gpt.settings", "Settings") in self._ancestry(name)
        return self._settings[name]

    def _ancestry(self, name: Name) -> set[Name]:
        """A class and its base classes, as far as they are ours or the user's."""
        waiting, found = [name], set[Name]()
        while waiting:
            each = waiting.pop()
            if each not in found:
                found.add(each)
                bases = [chain for _, node in self._nodes(each, ast.ClassDef) for base in node.bases for chain in dotted_names(base)]
                waiting += [name for chain in bases for name in self._resolved(self._named(self._module(each[0]), chain))]
        return found

    def _resolved(self, names: Iterable[Name]) -> set[Name]:
        """Follow names through re-exports to where they are defined."""
        waiting, seen = list(names), set[Name]()
        while waiting:
            each = waiting.pop()
            if each not in seen:
                seen.add(each)
                waiting += [found for target in self._module(each[0]).imports.get(each[1], ()) for found in self._target(target, ())]
        return {each for each in seen if each[1] in self._module(each[0]).nodes}

    def _nodes(self, name: Name, kind: type[N]) -> list[tuple[Name, N]]:
        return [(name, node) for node in self._module(name[0]).nodes[name[1]] if isinstance(node, kind)]

    # ---- files ----

    def _path(self, module_name: str) -> Path | None:
        """A module's file, or the folder of a namespace package; None if it is neither ours nor the user's."""
        if module_name not in self._paths:
            self._paths[module_name] = self._find(module_name)
        return self._paths[module_name]

    def _find(self, module_name: str) -> Path | None:
        parts = module_name.split(".")
        base = self._root if parts[0] in PACKAGES else self._user
        if base is None or not all(parts):
            return None
        folder = base.joinpath(*parts)
        for path in (folder / "__init__.py", folder.with_name(folder.name + ".py")):
            if path.is_file():
                return path
        return folder if folder.is_dir() else None

    def _module(self, name: str) -> _Module:
        if name not in self._modules:
            path = self._path(name)
            assert path is not None, f"{name} is neither ours nor the user's"
            self._modules[name] = _Module(name, name, ast.Module([], [])) if path.is_dir() else _parse(name, path, path.read_bytes())
        return self._modules[name]


@functools.cache
def _parse(name: str, path: Path, source: bytes) -> _Module:
    """Parse a file; the same text only once in a process, since a run asks again at the end of every stage."""
    try:
        tree = ast.parse(source, filename=str(path))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{path} can't be read as Python: {error}") from error
    module = _Module(name, name if path.name == "__init__.py" else name.rpartition(".")[0], tree)
    top: list[ast.stmt] = []  # statements whose imports bind names in the whole module
    waiting = tree.body[::-1]
    while waiting:
        node = waiting.pop()
        match node:
            case ast.Import() | ast.ImportFrom():
                top.append(node)
                if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
                    module.nodes[LOOSE].append(node)
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                module.nodes.setdefault(node.name, []).append(node)  # a name that is bound twice counts with both
            case ast.Assign() | ast.AnnAssign() if names := assigned_names(node):
                for each in names:
                    module.nodes.setdefault(each, []).append(node)
            case ast.If() if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
                waiting += node.orelse[::-1]  # the body never runs, the else always does
            case _ if not is_bare_string(node):
                module.nodes[LOOSE].append(node)
                top.append(node)
    module.imports, _ = imports_in([each for node in top for each in walk(node)], module.package)
    return module


def _sha256(nodes: list[ast.stmt], module: _Module) -> str:
    """Hash statements; a name that is bound by an import counts as the module that it stands for."""
    roots = {chain[0] for node in nodes for chain in dotted_names(node)}
    bound = sorted(f"{root} is {' or '.join(module.imports[root])}" for root in roots & module.imports.keys())
    text = "\n".join([f"dump {DUMP_VERSION}", *(canonical_dump(node) for node in nodes), *bound])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
