"""Syntax."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterable, Iterator
from typing import Any, TypeGuard


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
                value = [each for each in value if not is_bare_string(each) and not _is_empty_text(each, node)]
                if not value:
                    continue
            parts.append(f"{name}={canonical_dump(value)}")
        return f"{type(node).__name__}({','.join(parts)})"
    if isinstance(node, list):
        return f"[{','.join(canonical_dump(each) for each in node)}]"
    return f"{type(node).__name__}:{node!a}"  # repr would follow the Unicode tables of the Python at hand


def is_bare_string(node: Any) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _is_empty_text(node: Any, parent: ast.AST) -> bool:
    """An empty piece of an f-string: early releases of 3.12 put some in."""
    return isinstance(parent, ast.JoinedStr) and isinstance(node, ast.Constant) and node.value == ""


def is_protocol(node: ast.stmt) -> bool:
    return isinstance(node, ast.ClassDef) and any(isinstance(base, ast.Name) and base.id == "Protocol" for base in node.bases)


def without_fields(node: ast.stmt) -> ast.stmt:
    if not isinstance(node, ast.ClassDef):
        return node
    rest = [each for each in node.body if not is_field(each) and not isinstance(each, ast.Pass)]
    return ast.ClassDef(name=node.name, bases=node.bases, keywords=node.keywords, body=rest, decorator_list=node.decorator_list)


def is_field(node: ast.stmt) -> TypeGuard[ast.AnnAssign]:
    """What pydantic takes for a field: no ClassVar, nothing private, not its own `model_config`."""
    if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
        return False
    words = {chain[-1] for chain in dotted_names(node.annotation)}
    if isinstance(node.annotation, ast.Constant):
        words = set(re.findall(r"\w+", str(node.annotation.value)))
    return "ClassVar" not in words and node.target.id != "model_config" and not node.target.id.startswith("_")


def parameter_annotations(function: ast.FunctionDef) -> list[ast.expr]:
    parameters = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return [each.annotation for each in parameters if each.annotation is not None]


def called(node: ast.stmt) -> list[ast.expr]:
    """What is called in it: `C(a)` gives C, `C.model_validate(a)` gives C.model_validate."""
    return [each.func for each in walk(node) if isinstance(each, ast.Call) and isinstance(each.func, ast.Name | ast.Attribute)]


def assigned_names(node: ast.Assign | ast.AnnAssign) -> list[str]:
    """The names that an assignment binds; none if it binds anything else too."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    names: list[str] = []
    for target in targets:
        for each in target.elts if isinstance(target, ast.Tuple) else [target]:
            if not isinstance(each, ast.Name):
                return []
            names.append(each.id)
    return names


def imports_in(nodes: Iterable[ast.AST], package: str) -> tuple[dict[str, list[str]], list[str]]:
    """Bound names with their dotted targets, and the modules imported by star."""
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
    """Dotted targets of every import in a file, wherever it stands."""
    found = []
    for node in walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [f"{_base(node, package)}.{alias.name}" for alias in node.names]
    return found


def _base(node: ast.ImportFrom, package: str) -> str:
    """The module that `from ... import` names, relative ones spelt out."""
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
    """The nodes of a tree, as `ast.walk` gives them but three times as fast, and once: a plan comes back to each definition."""
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
