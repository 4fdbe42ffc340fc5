"""Python source as syntax trees: their canonical text, and the names that they read, bind and import.

Trees are walked without recursion, since generated code may nest deeper than Python's stack: an `elif` chain of 250 or 600 chained calls.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterable, Iterator
from typing import Any, TypeGuard


def canonical_dump(tree: Any) -> str:
    """Write a syntax tree as text that is equal on every Python from 3.11 on, without positions, comments and bare strings."""
    text: list[str] = []
    waiting: list[Any] = [_Node(tree)]
    while waiting:
        each = waiting.pop()
        if isinstance(each, str):
            text.append(each)
        else:
            waiting += reversed(_parts(each.value))
    return "".join(text)


class _Node:
    """A value of the tree that is still to be written, beside strings that already are text."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


def _parts(value: Any) -> list[str | _Node]:
    """The text of one node, with what is inside it as `_Node`: "Return(", "value=", _Node(...), ")"."""
    if isinstance(value, ast.AST):
        parts: list[str | _Node] = []
        for name in value._fields:
            if name in ("ctx", "kind", "type_comment", "type_ignores"):
                continue
            field = getattr(value, name, None)
            if field is None and not (isinstance(value, ast.Constant) and name == "value"):
                continue
            if isinstance(field, list):
                field = [each for each in field if not is_bare_string(each) and not _is_empty_text(each, value)]
                if not field:
                    continue
            parts += [f"{',' if parts else ''}{name}=", _Node(field)]
        return [f"{type(value).__name__}(", *parts, ")"]
    if isinstance(value, list):
        return ["[", *(part for index, each in enumerate(value) for part in ([","] if index else []) + [_Node(each)]), "]"]
    return [f"{type(value).__name__}:{value!a}"]  # repr would depend on the Unicode tables of this Python


def is_bare_string(node: Any) -> bool:
    """Whether a node is a docstring or another string that stands by itself."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _is_empty_text(node: Any, parent: ast.AST) -> bool:
    """Whether a node is an empty piece of an f-string, which early releases of 3.12 insert."""
    return isinstance(parent, ast.JoinedStr) and isinstance(node, ast.Constant) and node.value == ""


def is_protocol(node: ast.stmt) -> bool:
    """Whether a node is a class that names Protocol as a base: an interface, which never runs."""
    return isinstance(node, ast.ClassDef) and any(isinstance(base, ast.Name) and base.id == "Protocol" for base in node.bases)


def without_fields(node: ast.stmt) -> ast.stmt:
    """Return a Settings class without its fields; other nodes as they are."""
    if not isinstance(node, ast.ClassDef):
        return node
    rest = [each for each in node.body if not is_field(each) and not isinstance(each, ast.Pass)]
    return ast.ClassDef(name=node.name, bases=node.bases, keywords=node.keywords, body=rest, decorator_list=node.decorator_list)


def is_field(node: ast.stmt) -> TypeGuard[ast.AnnAssign]:
    """Whether pydantic takes a statement for a field: not a ClassVar, a private name or its own `model_config`."""
    if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
        return False
    words = {chain[-1] for chain in dotted_names(node.annotation)}
    if isinstance(node.annotation, ast.Constant):
        words = set(re.findall(r"\w+", str(node.annotation.value)))
    return "ClassVar" not in words and node.target.id != "model_config" and not node.target.id.startswith("_")


def parameter_annotations(function: ast.FunctionDef) -> list[ast.expr]:
    """The annotations of a function's parameters."""
    parameters = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return [each.annotation for each in parameters if each.annotation is not None]


def called(node: ast.stmt) -> list[ast.expr]:
    """What a statement calls: `C(a)` gives C, `C.model_validate(a)` gives C.model_validate."""
    return [each.func for each in walk(node) if isinstance(each, ast.Call) and isinstance(each.func, ast.Name | ast.Attribute)]


def assigned_names(node: ast.Assign | ast.AnnAssign) -> list[str]:
    """The names that an assignment binds; empty if it binds anything other than names."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    names: list[str] = []
    for target in targets:
        for each in target.elts if isinstance(target, ast.Tuple) else [target]:
            if not isinstance(each, ast.Name):
                return []
            names.append(each.id)
    return names


def imports_in(nodes: Iterable[ast.AST], package: str) -> tuple[dict[str, list[str]], list[str]]:
    """Return what imports bind, as name to dotted targets, and the modules imported by star."""
    bound: dict[str, list[str]] = {}
    stars: list[str] = []
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                name = alias.asname or alias.name.split(".")[0]
                _add(bound, name, alias.name if alias.asname else name)
        elif isinstance(node, ast.ImportFrom):
            base = _base(node, package)
            for alias in node.names:
                if alias.name == "*":
                    stars.append(base)
                else:
                    _add(bound, alias.asname or alias.name, f"{base}.{alias.name}")
    return bound, stars


def _add(bound: dict[str, list[str]], name: str, target: str) -> None:
    targets = bound.setdefault(name, [])
    if target not in targets:
        targets.append(target)


def imported_modules(tree: ast.Module, package: str) -> list[str]:
    """The dotted targets of every import in a file, at any depth: `from a import b` gives a.b."""
    found = []
    for node in walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [f"{_base(node, package)}.{alias.name}" for alias in node.names]
    return found


def _base(node: ast.ImportFrom, package: str) -> str:
    """The module that `from ... import` names, with relative ones spelled out."""
    base = node.module or ""
    if node.level:
        above = package.split(".")[: len(package.split(".")) - node.level + 1]
        base = ".".join([*above, *([base] if base else [])])
    return base


def _children(node: ast.AST) -> Iterator[ast.AST]:
    for value in vars(node).values():
        if isinstance(value, ast.AST):
            yield value
        elif isinstance(value, list):
            yield from (item for item in value if isinstance(item, ast.AST))


@functools.cache
def walk(node: ast.AST) -> tuple[ast.AST, ...]:
    """The nodes of a tree, as `ast.walk` gives them, but three times as fast and cached: a plan asks for each definition often."""
    found = [node]
    for each in found:
        found += _children(each)
    return tuple(found)


@functools.cache
def dotted_names(node: ast.AST) -> frozenset[tuple[str, ...]]:
    """Every dotted name that is read: `F.relu(x).sum()` gives ("F", "relu") and ("x",)."""
    chains = set()
    stack: list[ast.AST] = [node]
    while stack:
        each = stack.pop()
        attributes: list[str] = []
        inner = each
        while isinstance(inner, ast.Attribute):
            attributes.append(inner.attr)
            inner = inner.value
        if isinstance(inner, ast.Name):
            chains.add((inner.id, *reversed(attributes)))
        elif inner is not each:
            stack.append(inner)
        else:
            stack += _children(each)
    return frozenset(chains)
