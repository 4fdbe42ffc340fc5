"""Read a record's columns by the keys of a format, and notice which of them nothing read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pipelines.ingest import templates
from pipelines.ingest.dialogue_settings import IGNORABLE, DialogueSettings
from pipelines.ingest.templates import listed, short

SYNONYMS = {
    "response": ("completion", "output", "answer", "response_text", "text", "chosen"),
    "output": ("response", "completion", "answer"),
    "prompt": ("question", "instruction", "query", "problem", "input", "text"),
    "instruction": ("question", "prompt", "query"),
    "messages": ("conversation", "dialog", "dialogue", "turns", "utterances"),
    "conversations": ("conversation", "dialog", "dialogue", "turns"),
    "score": ("label", "rating", "reward", "stars"),
    "reference": ("answer", "solution", "output"),
    "chosen": ("preferred", "better", "response_chosen"),
    "rejected": ("dispreferred", "worse", "response_rejected"),
    "text": ("chosen", "dialogue", "conversation", "transcript"),
}
"""What other sources call our keys: only suggested in messages, never read by themselves."""
FORMATS_BY_COLUMN = {"messages": "messages", "conversations": "sharegpt", "instruction": "alpaca", "prompt": "plain"}
NUMBER = re.compile(r"[+-]?([0-9]+([.][0-9]*)?|[.][0-9]+)([eE][+-]?[0-9]+)?")


class Columns:
    """Read one record as its format does: `Columns({"question": "Who?"}, settings).value("prompt")`, with prompt renamed to question."""

    def __init__(self, columns: Mapping[str, Any], settings: DialogueSettings) -> None:
        self.columns = columns
        self.settings = settings
        self._read: set[str] = set()

    def value(self, name: str) -> Any:
        """Return what a key stands for; ValueError where the record has no such column."""
        if name not in self.settings.keys and name not in self.columns:
            raise ValueError(f"no column {name!r}; there are: {listed(self.columns)}{self._advice(name)}")
        return templates.evaluate(self.settings.where(name), self.columns, self._read)

    def values(self, name: str) -> list[Any]:
        """Return all that a key stands for, if it may name several columns or a path through a list."""
        found = [templates.evaluate(where, self.columns, self._read) for where in templates.expressions(self.settings.keys[name])]
        return found[0] if len(found) == 1 and isinstance(found[0], list) else found

    def optional(self, name: str) -> Any:
        """Return the same; None where keys don't name a column and the usual one is missing."""
        if not self.has(name):
            return None
        try:
            return self.value(name)
        except templates.Missing as error:
            where = self.settings.where(name)
            example = "{tools?}" if templates.is_template(where) else f'keys = {{ {name} = "{where}?" }}'
            raise ValueError(f"{error}; a name that ends with ? may be missing, as in {example}") from None

    def has(self, name: str) -> bool:
        return name in self.settings.keys or (name in self.columns and name not in self.settings.ignore)

    def text(self, name: str, *, optional: bool = False) -> str:
        value = self.optional(name) if optional else self.value(name)
        if value is None and optional:
            return ""
        if not isinstance(value, str):
            raise ValueError(f"{self.called(name)} is {short(value)}, expected a text{as_template(name, self.settings.where(name), value)}")
        return value

    def called(self, name: str) -> str:
        """Name a key, and what it stands for where that is another name: `response (keys.response = 'answer')`."""
        where = self.settings.where(name)
        return name if where == name else f"{name} (keys.{name} = {where!r})"

    def check_read(self) -> None:
        """Raise ValueError where a column that usually changes what an answer means holds something that nothing read."""
        for name in IGNORABLE:
            if name in self._read or name in self.settings.left_out() or _says_nothing(self.columns.get(name)):
                continue
            raise ValueError(
                f"column {name!r} holds {short(self.columns[name])}, which no message would have: {self._use(name)}; "
                f'or set ignore = ["{name}"] to leave it out'
            )

    def _use(self, name: str) -> str:
        """Return a setting that puts a column into a message."""
        if not IGNORABLE[name].startswith("{"):
            return IGNORABLE[name]
        key = {"alpaca": "instruction", "plain": "prompt", "transcript": "text"}.get(self.settings.format, "system")
        where = self.settings.where(key)
        base = "" if key == "system" and not self.has(key) else where if templates.is_template(where) else f"{{{where}}}"
        template = IGNORABLE[name].replace("{PROMPT}", base).removeprefix("\\n").removesuffix("\\n\\n")
        return f'a template puts it into a message, such as keys = {{ {key} = "{template}" }}'

    def _advice(self, name: str) -> str:
        if self.settings.format == "tree":
            flat = "; rows that name a parent must be nested first" if "parent_id" in self.columns else ""
            return f', expected a message that holds its replies, {{"text": ..., "role": ..., "replies": [...]}}{flat}'
        if self.settings.format != "transcript" and any(map(_like_a_transcript, self.columns.values())):
            return '; format = "transcript" reads dialogues that are written as one text'
        for other in SYNONYMS.get(name, ()):
            if other in self.columns:
                return f'; keys = {{ {name} = "{other}" }} would read that column'
        if name in ("chosen", "rejected"):
            return '; keys names another, or with responses = ["...", "..."] those that votes, scores or ranks compare'
        for column, format in FORMATS_BY_COLUMN.items():
            if column in self.columns and format != self.settings.format:
                return f'; set format = "{format}", or name the column with keys = {{ {name} = "..." }}'
        return f'; keys = {{ {name} = "..." }} names another'


def _like_a_transcript(value: Any) -> bool:
    return isinstance(value, str) and value.lstrip("# \n").startswith(("Human:", "User:", "<|im_start|>", "[INST]"))


def empty(value: Any) -> bool:
    return value is None or value in ("", [], {}) or (isinstance(value, list) and all(map(empty, value)))


def _says_nothing(value: Any) -> bool:
    return empty(value) or (isinstance(value, str) and value.strip() in ("", "[]", "{}", "null"))  # as tables keep them


def as_template(name: str, where: str, value: Any) -> str:
    """Say how a number becomes a text, where that is what was found."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    return f'; keys = {{ {name} = "{{{where}}}" }} writes the number as text'


def verdict_of(value: Any) -> bool | None:
    """Return true or false, also where a table has them as texts, and None for everything else."""
    if isinstance(value, str):
        return {"true": True, "false": False}.get(value.strip().lower())
    return value if isinstance(value, bool) else None


def number_of(value: Any, what: str) -> float:
    """Return a number, also where a table has it as a text; true is 1 and false 0. ValueError for everything else."""
    if (verdict := verdict_of(value)) is not None:
        return float(verdict)
    if isinstance(value, int | float):
        return value
    if isinstance(value, str) and NUMBER.fullmatch(value.strip()):
        return float(value)
    raise ValueError(f"{what} is {short(value)}, expected a number, true or false")
