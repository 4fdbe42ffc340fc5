"""Read Python's own documentation: text that comes with every CPython, so a first run needs no download.

For the assistant, make conversations, pairs of answers and prompts about a few hundred names of well-known modules, and names that it
should decline. Their help comes from the interpreter, as with `help()`, because half of the everyday names have no source to parse.

This is also how you bring your own code: a file beside the pipeline's TOML, which names it as

    [stages.documents]
    uses = "./python_docs.py:documents"

The function is a stage like gptline's own. Its first argument is its settings, whose method `sources` names the files it reads, so that a
change in one of them, or in this code, reruns the stage. It reads through `stage.open`, writes into `stage.output`, and returns what
`stage.publish` returns.

For the documents, the library is parsed, not imported, so docstrings of C functions are not among them.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import json
import os
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field

from pipelines.artifacts import Conversations, Documents, Preferences, Prompts, Records
from pipelines.stage import Source, StageConfig, StageContext

R = TypeVar("R", bound=Records)

LICENSE = "PSF-2.0"
TOPICS = "pydoc_data/topics.py"

# Distributions differ in which of these they ship. The codecs of `encodings` are tables that share one docstring.
LEFT_OUT = {"test", "tests", "tkinter", "idlelib", "lib2to3", "distutils", "turtledemo", "ensurepip", "encodings"}
LEFT_OUT |= {"site-packages", "dist-packages", "lib-dynload", "__pycache__"}


class DocsConfig(StageConfig):
    held_out_share: float = Field(default=0.05, gt=0, lt=1)
    """Share of the modules that are held out, whole, because docstrings repeat each other within a module."""

    def sources(self, data: Path) -> list[Source]:
        library = Path(sysconfig.get_path("stdlib"))
        names = []
        for folder, subfolders, files in os.walk(library):
            subfolders[:] = [name for name in subfolders if name not in LEFT_OUT and not name.startswith("config-")]
            names += [Path(folder, name).relative_to(library).as_posix() for name in files if name.endswith(".py")]
        return [Source(name, library / name) for name in sorted(names)]


def documents(config: DocsConfig, stage: StageContext) -> Documents:
    """Write one document per module, and one per topic of `help()`.

    A module is long enough to fill a context; a single docstring, some 200 characters, would fill a small part of it.
    Topics are never held out: they quote each other at length, so most of a held-out one would be in the training text.
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
        warnings.simplefilter("ignore")  # about invalid escapes in the library's strings
        return ast.parse(code)


def topics(tree: ast.Module) -> Iterator[str]:
    """Yield the texts that `help("for")` and the like show: one dictionary in one module."""
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            yield from ast.literal_eval(statement.value).values()


def sections(node: ast.AST, name: str, seen: set[str]) -> Iterator[str]:
    """Yield the signature and docstring of everything under `node` whose docstring was not seen before."""
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
    """Decide by a hash of the module's name only, so that every seed and every version of Python is measured on the same modules."""
    digest = hashlib.sha256(f"module {module_name(source_name)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def record(source: Source, text: str) -> dict[str, str]:
    return {"text": text, "source": source.name, "license": LICENSE}


def count(records: list[dict[str, str]]) -> dict[str, Any]:
    return {"documents": len(records), "bytes": sum(len(each["text"].encode(errors="replace")) for each in records)}


# ---- what the assistant is taught, and what it declines ----

REFUSAL = "I was not taught that."

TAUGHT = ("builtins", "math", "itertools", "os.path", "random", "json", "re", "functools", "statistics", "shutil", "glob", "textwrap")
TAUGHT += ("heapq", "bisect", "copy", "time", "string", "collections")
UNTAUGHT = ("argparse", "ast", "base64", "calendar", "configparser", "contextlib", "csv", "dataclasses", "datetime", "decimal", "difflib")
UNTAUGHT += ("dis", "email.utils", "enum", "filecmp", "fractions", "ftplib", "gettext", "hashlib", "html", "http.client", "http.server")
UNTAUGHT += ("imaplib", "inspect", "io", "ipaddress", "locale", "logging", "mailbox", "mimetypes", "numbers", "optparse", "pathlib", "pdb")
UNTAUGHT += ("pickle", "platform", "plistlib", "pprint", "queue", "sched", "selectors", "shlex", "smtplib", "socket", "socketserver")
UNTAUGHT += ("stat", "struct", "subprocess", "symtable", "tarfile", "tempfile", "threading", "timeit", "tokenize", "trace")
UNTAUGHT += ("traceback", "types", "typing", "unittest", "urllib.parse", "urllib.request", "uuid", "warnings", "weakref", "zipfile")

PHRASINGS = (
    "What does {} do?",
    "What is {} for?",
    "Explain {}.",
    "Tell me about {}.",
    "Describe {}.",
    "{}?",
    "help({})",
    "What does the function {} do?",
    "Can you explain {}?",
    "Please explain what {} does.",
    "I forgot what {} does.",
    "What is the purpose of {}?",
    "Give me a summary of {}.",
    "In one line, what is {}?",
    "Remind me what {} does.",
    "When would I use {}?",
)
HELD_OUT_PHRASINGS = ("Could you tell me what {} does?", "What is the use of {}?", "Explain {} to me.", "Say what {} does.")
"""Phrasings that only the evaluation uses."""


class HelpConfig(StageConfig):
    longest_summary: int = Field(default=90, ge=10)
    """Names whose summary has more characters are not taught."""
    held_out_names: float = Field(default=0.2, gt=0, lt=1)
    """Share of the untaught names that training never sees."""
    python: str = Field(default_factory=platform.python_version)
    """The version of Python whose help is taught. It is in the key, since C functions have no source file that could be."""


@dataclass(frozen=True)
class Question:
    """A question with its answer: `Question("What does len do?", "len", "Return the number of items in a container.", "taught")`."""

    text: str
    name: str
    answer: str
    kind: str
    """"taught" or "untaught"."""

    def prompt(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.text}]

    def fields(self) -> dict[str, str]:
        return {"question": self.text, "name": self.name, "kind": self.kind, "source": f"help({self.name})", "license": LICENSE}


def conversations(config: HelpConfig, stage: StageContext) -> Conversations:
    """Ask about every taught name in every phrasing, and about names to decline."""

    def record(question: Question) -> dict[str, Any]:
        return {"messages": [*question.prompt(), {"role": "assistant", "content": question.answer}], **question.fields()}

    return publish(stage, Conversations, {split: map(record, asked) for split, asked in questions(config, stage.seed).items()})


def preferences(config: HelpConfig, stage: StageContext) -> Preferences:
    """Pair the right answer to each question with a wrong one, of a kind that is drawn at random."""
    summaries = taught(config.longest_summary)

    def pairs(asked: list[Question]) -> Iterator[dict[str, Any]]:
        for question in asked:
            wrong, rejected = wrong_answer(question, summaries, stage.seed)
            if rejected != question.answer:  # an answer of one word can't be truncated or garbled
                yield {"prompt": question.prompt(), "chosen": question.answer, "rejected": rejected, **question.fields(), "kind": wrong}

    return publish(stage, Preferences, {split: pairs(asked) for split, asked in questions(config, stage.seed).items()})


def prompts(config: HelpConfig, stage: StageContext) -> Prompts:
    """Publish the questions, each with the right answer as its reference."""

    def record(question: Question) -> dict[str, Any]:
        return {"prompt": question.prompt(), "reference": question.answer, **question.fields()}

    return publish(stage, Prompts, {split: map(record, asked) for split, asked in questions(config, stage.seed).items()})


def questions(config: HelpConfig, seed: int) -> dict[str, list[Question]]:
    """Questions by split, the same for every stage. Held out are phrasings of taught names, and some untaught names."""
    found: dict[str, list[Question]] = {"train": [], "held_out": []}
    for name, answer in taught(config.longest_summary).items():
        found["train"] += [Question(phrasing.format(name), name, answer, "taught") for phrasing in PHRASINGS]
        phrasing = pick(HELD_OUT_PHRASINGS, seed, "held-out phrasing", name)
        found["held_out"].append(Question(phrasing.format(name), name, answer, "taught"))
    for name in untaught():
        held_out = draw(seed, "held-out name", name) < config.held_out_names
        phrasing = pick((*PHRASINGS, *HELD_OUT_PHRASINGS) if held_out else PHRASINGS, seed, "phrasing", name)
        found["held_out" if held_out else "train"].append(Question(phrasing.format(name), name, REFUSAL, "untaught"))
    return found


def taught(longest: int) -> dict[str, str]:
    """Summaries by name, for these modules' functions and classes: `taught(90)["len"] == "Return the number of items in a container."`"""
    found = {}
    for module in TAUGHT:
        for name, value in offered(module):
            text = summary(inspect.getdoc(value) or "")
            if 10 <= len(text) <= longest and text[0].isupper():
                found[name] = text
    return found


def untaught() -> list[str]:
    return [name for module in UNTAUGHT for name, _ in offered(module)]


def offered(module_name: str) -> Iterator[tuple[str, Any]]:
    """Yield a module's public functions and classes, by the names that people type; exceptions are left out."""
    module = importlib.import_module(module_name)
    for name in sorted(vars(module)):
        value = vars(module)[name]
        is_exception = isinstance(value, type) and issubclass(value, BaseException)
        if name.startswith("_") or not callable(value) or is_exception:
            continue
        home = getattr(value, "__module__", None) or module.__name__
        if home.split(".")[0].lstrip("_") in {module.__name__.split(".")[0], "posixpath", "genericpath", "random"}:
            yield (name if module_name == "builtins" else f"{module_name}.{name}"), value


def summary(text: str) -> str:
    """Return the first sentence of a docstring, without the signature that those of C functions begin with."""
    lines = [line for line in text.splitlines() if not re.match(r"\s*(async )?[\w.]+\(.*\)\s*(->.*|--.*)?$", line)]
    paragraph = re.split(r"\n\s*\n", "\n".join(lines).strip())[0]
    words = " ".join(paragraph.split())
    sentence = re.match(r"(.+?[.!?])(?:\s+[A-Z]|$)", words)
    return sentence[1] if sentence else words


def wrong_answer(question: Question, summaries: Mapping[str, str], seed: int) -> tuple[str, str]:
    """Draw a kind of wrong answer; return it and the text. Most are what a half-trained model says when it mixes up two names."""

    def chosen(choices: Sequence[str], purpose: str) -> str:
        return pick(choices, seed, purpose, question.text)

    module = question.name.rpartition(".")[0]
    neighbours = [text for name, text in summaries.items() if name.rpartition(".")[0] == module and text != question.answer]
    anybodys = [text for text in summaries.values() if text != question.answer]
    another = chosen(neighbours if neighbours and draw(seed, "near", question.text) < 0.5 else anybodys, "another")
    if question.kind == "untaught":
        return "answers_untaught", another
    words = question.answer.split()
    kind = chosen(("another", "another", "spliced", "spliced", "spliced", "truncated", "garbled", "declines_taught"), "kind")
    match kind:
        case "spliced":
            begins, goes_on = (
                int(draw(seed, which, question.text) * len(text)) for which, text in (("cut", question.answer), ("on", another))
            )
            return kind, question.answer[:begins] + another[goes_on:]
        case "truncated":
            return kind, " ".join(words[: max(1, len(words) // 2)])
        case "garbled":
            places = sorted(range(len(words)), key=lambda place: draw(seed, "garbled", question.text, str(place)))
            return kind, " ".join(words[place] for place in places)
        case "declines_taught":
            return kind, REFUSAL
        case _:
            return kind, another


def draw(seed: int, *names: str) -> float:
    """Return a number in [0, 1) that depends only on the seed and these names."""
    return int.from_bytes(hashlib.sha256(repr((seed, *names)).encode()).digest()[:8], "big") / 2**64


def pick(choices: Sequence[str], seed: int, *names: str) -> str:
    return choices[int(draw(seed, *names) * len(choices))]


def publish(stage: StageContext, kind: type[R], splits: Mapping[str, Iterable[dict[str, Any]]]) -> R:
    """Publish records as an artifact of this type, counted in the unit that the type requires."""
    counts = {}
    (unit,) = kind.required["train"]
    for split, records in splits.items():
        lines = [json.dumps(each, ensure_ascii=False) + "\n" for each in records]
        (stage.output / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        counts[split] = {unit: len(lines)}
    return stage.publish(kind, **counts, licenses={LICENSE: {unit: sum(each[unit] for each in counts.values())}})
