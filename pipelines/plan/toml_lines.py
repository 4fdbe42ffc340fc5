"""Find the line of every key, table and list item of a TOML text, which `tomllib` reads without positions.

The text is valid TOML already: this scanner follows its structure only. `lines_of` compares what it found with what `tomllib` read and
returns nothing if they differ, so a line is right or absent.
"""

from __future__ import annotations

import bisect
import re
import tomllib
from collections.abc import Iterator
from typing import Any

Path = tuple[str | int, ...]
"""("stages", "rl", "gate", 0, "min"): names of keys, and indices in lists."""

SPACE = re.compile(r"[ \t]*")
BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
STRING = re.compile(
    r'"""(?:\\[\s\S]|[^\\])*?"""(?:"{0,2})'  # up to two quotes of the content may precede the closing three
    r"|'''[\s\S]*?'''(?:'{0,2})"
    r'|"(?:\\.|[^"\\\n])*"'
    r"|'[^'\n]*'"
)
SCALAR = re.compile(r"[^,\]}#\r\n]+")


def lines_of(text: str) -> dict[Path, int]:
    """The line, from 1 on, on which each key, table and list item begins; empty if the text can't be followed."""
    text = text.replace("\r\n", "\n")
    scanner = _Scanner(text)
    try:
        scanner.document()
        document = dict(_walk(tomllib.loads(text), ()))
    except (ValueError, RecursionError):
        return {}
    leaves = {path for path, value in document.items() if not (value and isinstance(value, dict | list))}
    return scanner.lines if leaves <= scanner.lines.keys() <= document.keys() else {}


def is_one_value(text: str) -> bool:
    """Whether a text is one TOML value from its beginning to its end, with nothing behind it."""
    scanner = _Scanner(text.strip())
    try:
        scanner.value(())
        tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return False
    return scanner.at_end()


def _walk(value: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    if path:
        yield path, value
    if isinstance(value, dict):
        for name, each in value.items():
            yield from _walk(each, (*path, name))
    elif isinstance(value, list):
        for index, each in enumerate(value):
            yield from _walk(each, (*path, index))


class _Scanner:
    """Walks once through a TOML text; ValueError where it meets something else."""

    def __init__(self, text: str) -> None:
        self.lines: dict[Path, int] = {}
        self._text = text
        self._at = 0
        self._line_ends = [index for index, letter in enumerate(text) if letter == "\n"]
        self._lengths: dict[Path, int] = {}
        """How many tables each list of tables has so far."""

    def document(self) -> None:
        table: Path = ()
        while not self._at_end_after(BLANK):
            if self._text.startswith("[", self._at):
                table = self._header()
            else:
                self._pair(table)
            self._skip(SPACE)

    def at_end(self) -> bool:
        return self._at == len(self._text)

    def value(self, path: Path) -> None:
        """Step over a value and record what is inside it."""
        if self._text.startswith("[", self._at):
            self._list(path)
        elif self._text.startswith("{", self._at):
            self._inline_table(path)
        elif self._text.startswith(("'", '"'), self._at):
            self._match(STRING)
        else:
            self._match(SCALAR)

    def _header(self) -> Path:
        line = self._line()
        of_list = self._text.startswith("[[", self._at)
        self._at += 2 if of_list else 1
        names = self._names()
        self._at += 2 if of_list else 1
        path: Path = ()
        for depth, name in enumerate(names, 1):
            path = (*path, name)
            if of_list and depth == len(names):
                self.lines.setdefault(path, line)
                self._lengths[path] = self._lengths.get(path, 0) + 1
            if path in self._lengths:
                path = (*path, self._lengths[path] - 1)
        self.lines.setdefault(path, line)
        return path

    def _pair(self, table: Path) -> None:
        line = self._line()
        path = table
        for name in self._names():
            path = (*path, name)
            self.lines.setdefault(path, line)
        if not self._text.startswith("=", self._at):
            raise ValueError(f"expected '=' at character {self._at}")
        self._at += 1
        self._skip(SPACE)
        self.value(path)

    def _names(self) -> list[str]:
        """A key's parts: `a."b.c".d` has three."""
        names = []
        while True:
            self._skip(SPACE)
            if self._text.startswith(("'", '"'), self._at):
                names.append(tomllib.loads(f"name = {self._match(STRING)}")["name"])
            else:
                names.append(self._match(BARE_KEY))
            self._skip(SPACE)
            if not self._text.startswith(".", self._at):
                return names
            self._at += 1

    def _list(self, path: Path) -> None:
        self._at += 1
        index = 0
        while True:
            self._skip(BLANK)
            if self._closes("]"):
                return
            self.lines[(*path, index)] = self._line()
            self.value((*path, index))
            index += 1
            self._skip(BLANK)
            if self._text.startswith(",", self._at):
                self._at += 1

    def _inline_table(self, path: Path) -> None:
        self._at += 1
        while True:
            self._skip(BLANK)
            if self._closes("}"):
                return
            self._pair(path)
            self._skip(BLANK)
            if self._text.startswith(",", self._at):
                self._at += 1

    def _closes(self, bracket: str) -> bool:
        if self.at_end():
            raise ValueError(f"expected {bracket!r} before the end of the text")
        found = self._text.startswith(bracket, self._at)
        self._at += found
        return found

    def _at_end_after(self, pattern: re.Pattern[str]) -> bool:
        self._skip(pattern)
        return self.at_end()

    def _skip(self, pattern: re.Pattern[str]) -> None:
        match = pattern.match(self._text, self._at)
        assert match is not None
        self._at = match.end()

    def _match(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self._text, self._at)
        if match is None:
            raise ValueError(f"expected a key or a value at character {self._at}")
        self._at = match.end()
        return match[0]

    def _line(self) -> int:
        return bisect.bisect_left(self._line_ends, self._at) + 1
