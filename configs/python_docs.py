"""Python's own documentation as documents: text that every CPython carries, so a first run needs no download.

This is also how you bring your own code: a file beside the pipeline's TOML, which names it as

    [stages.documents]
    uses = "./python_docs.py:documents"

The function is a stage like gptline's own. Its first argument is its settings; `sources` in there names the files it reads, so that
a change in one of them, or in this code, runs it again. It reads through `stage.open`, writes into `stage.output`, and returns
what `stage.publish` made of that.

Nothing of the library is imported: it is parsed. Docstrings of C functions are therefore not in here.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from pipelines.artifacts import Documents
from pipelines.stage import Source, StageConfig, StageContext

LICENSE = "PSF-2.0"
TOPICS = "pydoc_data/topics.py"

# Distributions differ in which of these they ship. The codecs of `encodings` are tables below one and the same docstring.
LEFT_OUT = {"test", "tests", "tkinter", "idlelib", "lib2to3", "distutils", "turtledemo", "ensurepip", "encodings"}
LEFT_OUT |= {"site-packages", "dist-packages", "lib-dynload", "__pycache__"}


class DocsConfig(StageConfig):
    held_out_share: float = Field(default=0.05, gt=0, lt=1)
    """Share of the modules kept from training, each as a whole: docstrings repeat themselves inside a module."""

    def sources(self, data: Path) -> list[Source]:
        library = Path(sysconfig.get_path("stdlib"))
        names = []
        for folder, subfolders, files in os.walk(library):
            subfolders[:] = [name for name in subfolders if name not in LEFT_OUT and not name.startswith("config-")]
            names += [Path(folder, name).relative_to(library).as_posix() for name in files if name.endswith(".py")]
        return [Source(name, library / name) for name in sorted(names)]


def documents(config: DocsConfig, stage: StageContext) -> Documents:
    """One document per module, and one per topic of `help()`.

    A module is long enough to fill a context; a docstring alone, some 200 characters, would leave most of it to its neighbours.
    Topics are all for training: they quote each other at length, so that a held-out one would have been read elsewhere.
    """
    splits: dict[str, list[dict[str, str]]] = {"train": [], "held_out": []}
    rejects = []
    seen: set[str] = set()
    for done, source in enumerate(stage.sources, start=1):
        with stage.open(source) as file:
            code = file.read()
        try:
            tree = parse(code)
        except (SyntaxError, ValueError) as error:
            rejects.append({"source": source.name, "reason": str(error)})
            continue
        if source.name == TOPICS:
            splits["train"] += [record(source, text) for text in topics(tree)]
        elif text := "\n\n".join(sections(tree, module_name(source.name), seen)):
            splits["held_out" if is_held_out(source.name, config.held_out_share) else "train"].append(record(source, text))
        stage.progress(done, len(stage.sources), "files")

    for name, records in {**splits, "rejects": rejects}.items():
        with open(stage.output / f"{name}.jsonl", "w", encoding="utf-8", errors="replace") as lines:
            lines.writelines(json.dumps(each, ensure_ascii=False) + "\n" for each in records)
    counts = {split: count(records) for split, records in splits.items()}
    total = count(splits["train"] + splits["held_out"])
    return stage.publish(Documents, **total, **counts, licenses={LICENSE: total}, records={"read": len(stage.sources), "bad": len(rejects)})


def parse(code: bytes) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's strings
        return ast.parse(code)


def topics(tree: ast.Module) -> Iterator[str]:
    """The texts behind `help("for")`: one dictionary in one module."""
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            yield from ast.literal_eval(statement.value).values()


def sections(node: ast.AST, name: str, seen: set[str]) -> Iterator[str]:
    """A signature and its docstring, for whatever under `node` has one that was not seen before."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        text = ast.get_docstring(node)
        if text and text not in seen:
            seen.add(text)
            yield f"{signature(node, name)}\n\n{text}"
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.stmt, ast.excepthandler)):
            inner = getattr(child, "name", None)
            yield from sections(child, f"{name}.{inner}" if inner and isinstance(child, ast.stmt) else name, seen)


def signature(node: ast.AST, name: str) -> str:
    return f"{name}({ast.unparse(node.args)})" if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) else name


def module_name(source_name: str) -> str:
    """`module_name("json/__init__.py") == "json"`"""
    return source_name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def is_held_out(source_name: str, share: float) -> bool:
    """By a hash of the name alone: every seed, and every version of Python, is measured on the same modules."""
    digest = hashlib.sha256(f"module {module_name(source_name)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def record(source: Source, text: str) -> dict[str, str]:
    return {"text": text, "source": source.name, "license": LICENSE}


def count(records: list[dict[str, str]]) -> dict[str, Any]:
    return {"documents": len(records), "bytes": sum(len(each["text"].encode(errors="replace")) for each in records)}
