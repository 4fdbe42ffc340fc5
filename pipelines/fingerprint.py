"""What makes a stage's key, and how two keys differ.

A key is the digest of named leaves: the kind, the seed, the config less its operational fields, the inputs' digests, the content of
outside sources, and the code that the stage can reach. `plan` explains itself by comparing leaves.

Code is read, never imported: top-level definitions are followed by name from the kind's function through imports at module and at
function level. Definitions are compared as syntax trees without docstrings and comments, so that neither reruns anything. Three rules
keep the set small without losing soundness (a test profiles every stage and asks that each function that ran is in its key):
a Protocol class is an interface and never runs; the fields of a Settings class are in the key already, by value; and what lies behind
`StageContext` and `Rank` (store, gang, runner) is not followed, since it decides how work is carried out and not what comes out.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PACKAGES = ("pipelines", "gpt", "cluster")
DUMP_VERSION = 1
"""Of `canonical_dump`: part of every code hash, so that a change to the dump is a change of key."""

LOOSE = "<module>"
WHOLE = "*"


def key_of(leaves: dict[str, Any]) -> str:
    text = json.dumps(leaves, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(b"gptline key 1\n" + text.encode()).hexdigest()


def flat(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """`flat({"a": [1]}, "config")` yields ("config.a.0", 1). Empty tables and lists are leaves of their own."""
    if isinstance(value, dict) and value:
        for part in sorted(value):
            yield from flat(value[part], f"{name}.{part}")
    elif isinstance(value, list | tuple) and value:
        for index, item in enumerate(value):
            yield from flat(item, f"{name}.{index}")
    else:
        yield name, value


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Sentences, what a person changed first: config, sources, inputs, code."""
    order = ("kind", "seed", "config", "source", "input", "code", "environment")
    names = sorted(set(old) | set(new), key=lambda name: (order.index(name.split(".")[0]), name))
    changed = [name for name in names if (name in old, old.get(name)) != (name in new, new.get(name))]
    return [_sentence(name, old.get(name), new.get(name)) for name in changed]


def _sentence(name: str, old: Any, new: Any) -> str:
    area, _, rest = name.partition(".")
    if area == "config" or area not in ("source", "input", "code"):
        return f"{rest or area}: {_short(old)} -> {_short(new)}"
    if area == "input":
        return f"input {rest.split('.')[0]}: {_short(old)} -> {_short(new)}"
    what = "source" if area == "source" else "code of"
    change = "new" if old is None else "gone" if new is None else "changed"
    return f"{what} {rest} {change}"


def _short(value: Any) -> str:
    if value is None:
        return "none"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if len(text) == 64 and set(text) <= set("0123456789abcdef"):
        return text[:12]
    return text if len(text) <= 60 else text[:57] + "..."


# ---- code ----


@dataclass(frozen=True)
class _Definition:
    sha256: str
    chains: frozenset[tuple[str, ...]]
    """Dotted names read in it: ("F", "cross_entropy"), ("GPT",)."""
    imports: dict[str, str]
    """Imports inside it: bound name to dotted target."""
    stars: tuple[str, ...]


@dataclass
class _Module:
    name: str
    package: str
    nodes: dict[str, list[ast.stmt]] = field(default_factory=dict)
    """Top-level definitions by name; LOOSE holds the statements that define nothing."""
    imports: dict[str, str] = field(default_factory=dict)
    definitions: dict[str, _Definition] = field(default_factory=dict)


class Code:
    """The project's source as definitions that name each other.

    `root` holds our packages; `user` is the folder of a user's own files, whose imports of each other are followed too.
    """

    def __init__(self, root: Path, user: Path | None = None) -> None:
        self._root = root
        self._user = user
        self._modules: dict[str, _Module | None] = {}
        self._paths: dict[str, Path | None] = {}

    def leaves(self, entries: Iterable[tuple[str, str]]) -> dict[str, str]:
        """Hashes of all definitions that these (module, name) pairs can reach: {"gpt.model:GPT": "1f0c..."}."""
        reached: dict[str, str] = {}
        waiting = list(entries)
        seen = set(waiting)
        while waiting:
            module_name, name = waiting.pop()
            module = self._module(module_name)
            if module is None:
                continue
            parts = module_name.split(".")
            found = [(".".join(parts[:size]), LOOSE) for size in range(1, len(parts) + 1)]
            if name == WHOLE:
                found += [(module_name, each) for each in module.nodes]
            elif name in module.nodes:
                definition = self._definition(module, name)
                if definition.sha256:
                    reached[f"{module_name}:{name}"] = definition.sha256
                found += self._references(module, definition)
            elif name in module.imports:  # imported there, and passed on
                found += self._target(module.imports[name], ())
            fresh = [each for each in found if each not in seen]
            seen.update(fresh)
            waiting += fresh
        return reached

    def files(self, entries: Iterable[tuple[str, str]]) -> list[Path]:
        """The files that hold what these entries reach."""
        modules = {name.split(":")[0] for name in self.leaves(entries)} | {module for module, _ in entries}
        return sorted({path for module in modules if (path := self._path(module))})

    def _references(self, module: _Module, definition: _Definition) -> Iterator[tuple[str, str]]:
        for star in definition.stars:
            yield from self._target(star, ())
        for chain in definition.chains:
            if chain[0] in definition.imports:
                yield from self._target(definition.imports[chain[0]], chain[1:])
            elif chain[0] in module.nodes:
                yield module.name, chain[0]
            elif chain[0] in module.imports:
                yield from self._target(module.imports[chain[0]], chain[1:])

    def _target(self, dotted: str, rest: tuple[str, ...]) -> list[tuple[str, str]]:
        """What `dotted.rest` names: a module of ours and one definition in it, or the whole module where that can't be told."""
        parts = [*dotted.split("."), *rest]
        size = 0
        while size < len(parts) and self._path(".".join(parts[: size + 1])):
            size += 1
        if not size:
            return []  # not ours
        module_name = ".".join(parts[:size])
        module = self._module(module_name)
        assert module is not None
        if size == len(parts) or (parts[size] not in module.nodes and parts[size] not in module.imports):
            return [(module_name, WHOLE)]
        return [(module_name, parts[size])]

    def _definition(self, module: _Module, name: str) -> _Definition:
        if name not in module.definitions:
            nodes = [node for node in module.nodes[name] if not _is_protocol(node)]
            counted = [_without_fields(node) for node in nodes] if self._is_settings(module, name) else nodes
            module.definitions[name] = _describe(nodes, counted, module)
        return module.definitions[name]

    def _is_settings(self, module: _Module, name: str) -> bool:
        """True for gpt.settings.Settings and what descends from it: their fields count by value."""
        if (module.name, name) == ("gpt.settings", "Settings"):
            return True
        classes = [node for node in module.nodes.get(name, []) if isinstance(node, ast.ClassDef)]
        bases = [base.id for node in classes for base in node.bases if isinstance(base, ast.Name)]
        for base in bases:
            if base in module.nodes:
                if self._is_settings(module, base):
                    return True
            elif base in module.imports:
                target, _, last = module.imports[base].rpartition(".")
                other = self._module(target) if target else None
                if other is not None and self._is_settings(other, last):
                    return True
        return False

    def _path(self, module_name: str) -> Path | None:
        if module_name not in self._paths:
            self._paths[module_name] = self._find(module_name)
        return self._paths[module_name]

    def _find(self, module_name: str) -> Path | None:
        base = self._root if module_name.split(".")[0] in PACKAGES else self._user
        if base is None:
            return None
        stem = base.joinpath(*module_name.split("."))
        if (stem / "__init__.py").is_file():
            return stem / "__init__.py"
        path = stem.with_name(stem.name + ".py")
        return path if path.is_file() else None

    def _module(self, name: str) -> _Module | None:
        if name not in self._modules:
            path = self._path(name)
            self._modules[name] = None if path is None else _parse(name, path)
        return self._modules[name]


def _parse(name: str, path: Path) -> _Module:
    module = _Module(name, package=name if path.name == "__init__.py" else name.rpartition(".")[0])
    loose: list[ast.stmt] = []
    for node in ast.parse(path.read_bytes(), filename=str(path)).body:
        match node:
            case ast.Import() | ast.ImportFrom():
                bound, stars = _imports([node], module.package)
                module.imports.update(bound)
                if stars:
                    loose.append(node)
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                module.nodes.setdefault(node.name, []).append(node)  # a name bound twice counts with both
            case ast.Assign() | ast.AnnAssign() if names := _assigned(node):
                for each in names:
                    module.nodes.setdefault(each, []).append(node)
            case ast.If() if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
                pass
            case _ if not _is_text(node):
                loose.append(node)
    module.nodes[LOOSE] = loose
    return module


def _describe(nodes: list[ast.stmt], counted: list[ast.stmt], module: _Module) -> _Definition:
    """References of `nodes`, and the hash of `counted`, in which names of other people's modules count as what they are bound to."""
    if not counted:
        return _Definition("", frozenset(), {}, ())
    imports, stars = _imports([each for node in nodes for each in ast.walk(node)], module.package)
    roots = {chain[0] for node in counted for chain in _chains(node)}
    bound = sorted(f"{root} is {module.imports[root]}" for root in roots & module.imports.keys())
    text = "\n".join([f"dump {DUMP_VERSION}", *(canonical_dump(node) for node in counted), *bound])
    chains = frozenset(chain for node in nodes for chain in _chains(node))
    return _Definition(hashlib.sha256(text.encode()).hexdigest()[:16], chains, imports, stars)


def canonical_dump(node: Any) -> str:
    """A syntax tree as text: equal on every Python from 3.11 on, without positions, comments and bare strings."""
    if isinstance(node, ast.AST):
        parts = []
        for name in node._fields:
            if name in ("ctx", "kind", "type_comment", "type_ignores"):
                continue
            value = getattr(node, name, None)
            if value is None and not (isinstance(node, ast.Constant) and name == "value"):
                continue
            if isinstance(value, list):
                value = [each for each in value if not _is_text(each) and not _is_empty_text(each, node)]
                if not value:
                    continue
            parts.append(f"{name}={canonical_dump(value)}")
        return f"{type(node).__name__}({','.join(parts)})"
    if isinstance(node, list):
        return f"[{','.join(canonical_dump(each) for each in node)}]"
    return f"{type(node).__name__}:{node!a}"  # repr would follow the Unicode tables of the Python at hand


def _is_text(node: Any) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _is_empty_text(node: Any, parent: ast.AST) -> bool:
    """An empty piece of an f-string: early releases of 3.12 put some in."""
    return isinstance(parent, ast.JoinedStr) and isinstance(node, ast.Constant) and node.value == ""


def _is_protocol(node: ast.stmt) -> bool:
    return isinstance(node, ast.ClassDef) and any(isinstance(base, ast.Name) and base.id == "Protocol" for base in node.bases)


def _without_fields(node: ast.stmt) -> ast.stmt:
    if not isinstance(node, ast.ClassDef):
        return node
    methods = [each for each in node.body if not isinstance(each, ast.AnnAssign)]
    return ast.ClassDef(name=node.name, bases=node.bases, keywords=node.keywords, body=methods, decorator_list=node.decorator_list)


def _assigned(node: ast.Assign | ast.AnnAssign) -> list[str]:
    """The names that an assignment binds; none if it binds anything else too."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    names: list[str] = []
    for target in targets:
        for each in target.elts if isinstance(target, ast.Tuple) else [target]:
            if not isinstance(each, ast.Name):
                return []
            names.append(each.id)
    return names


def _imports(nodes: Iterable[ast.AST], package: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """Bound names with their dotted targets, and the modules imported by star."""
    bound: dict[str, str] = {}
    stars: list[str] = []
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                bound[alias.asname or alias.name.split(".")[0]] = alias.name if alias.asname else alias.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            for alias in node.names:
                if alias.name == "*":
                    stars.append(base)
                else:
                    bound[alias.asname or alias.name] = f"{base}.{alias.name}"
    return bound, tuple(stars)


def _chains(node: ast.AST) -> Iterator[tuple[str, ...]]:
    """Every dotted name that is read: `F.relu(x).sum()` gives ("F", "relu") and ("x",)."""
    stack: list[ast.AST] = [node]
    while stack:
        each = stack.pop()
        attributes: list[str] = []
        inner = each
        while isinstance(inner, ast.Attribute):
            attributes.append(inner.attr)
            inner = inner.value
        if isinstance(inner, ast.Name):
            yield (inner.id, *reversed(attributes))
        else:
            stack += [inner] if inner is not each else list(ast.iter_child_nodes(each))
