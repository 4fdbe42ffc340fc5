"""What is held out and was trained on all the same: an evaluation on it measures memory.

A held-out record is known by its document or its first question. It overlaps with a training record that has the same text as its
document or as one of its questions, or that contains it, as a document made of a problem and its solution does. White space doesn't
count. Texts of fewer than `ANCHOR_WORDS` words are compared as a whole only, since they stand in other texts by chance.

Held-out records are kept in memory as a few hashes each (some 300 bytes); training records are read one by one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipelines.artifacts import Records

ANCHOR_WORDS = 8
"""A text is found inside another by its first words, then compared as a whole."""
WORD = re.compile(r"[\u3040-\u9fff\uf900-\ufaff]|[^\s\u3040-\u9fff\uf900-\ufaff]+")
"""What stands between white space; each character of Chinese and Japanese, which have none, counts as a word."""


@dataclass
class Overlap:
    """How many held-out records of an artifact one training artifact holds.

    `Overlap(held_out=164, equal=0, contained=14, examples=["def f0():"])`
    """

    held_out: int
    """Held-out records that were looked for."""
    equal: int = 0
    """Those of which a text is a training text."""
    contained: int = 0
    """Further ones, of which a text stands inside a training text."""
    examples: list[str] = field(default_factory=list)
    """The first characters of up to five of those texts."""

    @property
    def share(self) -> float:
        """The share of held-out records that were trained on."""
        return (self.equal + self.contained) / self.held_out if self.held_out else 0.0


def overlap(held_out: Records, training: Sequence[Records]) -> list[Overlap]:
    """For each training artifact, which held-out records of `held_out` stand among its training records, reading each once."""
    index = _Index(held_out.records("held_out"))
    return [index.found_in(artifact.records("train")) for artifact in training]


def questions_of(record: Mapping[str, Any]) -> list[str]:
    """A record's document, or what its user's messages say."""
    if "text" in record:
        return [str(record["text"])]
    messages = record.get("messages") or record.get("prompt") or []
    return [str(message["content"]) for message in messages if message["role"] == "user"]


def answers_of(record: Mapping[str, Any]) -> list[str]:
    """What a model learns to say from a record of dialogue."""
    answers = [str(message["content"]) for message in record.get("messages", []) if message["role"] == "assistant"]
    return answers + [str(record[key]) for key in ("chosen", "response") if record.get(key)]


class _Index:
    """The held-out texts, by hash, and by the hash of their first words."""

    def __init__(self, records: Iterable[Mapping[str, Any]]) -> None:
        self._records = 0
        self._whole: dict[bytes, set[int]] = {}
        self._anchors: dict[bytes, list[tuple[int, int, bytes]]] = {}
        """By the hash of the first words: the record, the length of its text in words, and the text's hash."""
        self._begins: list[str] = []
        for record in records:
            text = next(iter(questions_of(record)), "")
            words = WORD.findall(text)
            self._whole.setdefault(_hash(words), set()).add(self._records)
            if len(words) >= ANCHOR_WORDS:
                self._anchors.setdefault(_hash(words[:ANCHOR_WORDS]), []).append((self._records, len(words), _hash(words)))
            self._begins.append(text[:60])
            self._records += 1

    def found_in(self, records: Iterable[Mapping[str, Any]]) -> Overlap:
        equal: set[int] = set()
        contained: set[int] = set()
        for record in records:
            for text in questions_of(record):
                words = WORD.findall(text)
                equal |= self._whole.get(_hash(words), set())
                contained.update(self._inside(words))
            for text in answers_of(record):
                contained.update(self._inside(WORD.findall(text)))
        contained -= equal
        examples = [self._begins[number] for number in sorted(equal | contained)[:5]]
        return Overlap(self._records, len(equal), len(contained), examples)

    def _inside(self, words: list[str]) -> Iterator[int]:
        if not self._anchors:
            return
        for begin in range(len(words) - ANCHOR_WORDS + 1):
            for number, length, digest in self._anchors.get(_hash(words[begin : begin + ANCHOR_WORDS]), ()):
                if _hash(words[begin : begin + length]) == digest:
                    yield number


def _hash(words: Sequence[str]) -> bytes:
    return hashlib.blake2b(" ".join(words).encode("utf-8", "surrogatepass"), digest_size=16).digest()
