"""From records to documents: which text a record holds, which documents stay, and which are held out.

    rows --> documents (mapped, checked) --> filters (empty, short, duplicate) --> held_out.jsonl
                |                                                             `--> train.jsonl, by weight
                `--> rejects.jsonl

Every decision about a document hangs on its own content and the seed alone, so that adding records moves none of the others
(but for `last`, which is about order).
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import string
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, BinaryIO, Literal

from pydantic import Field, model_validator

from gpt.settings import Settings
from pipelines.artifacts import SPLITS
from pipelines.reading import BEGINS_CHARS, Reject, Row, SourceSettings, kind_of
from pipelines.stage import StageFailure


class HoldOut(Settings):
    """Which documents are kept from training: `HoldOut(share=0.02, by="book")` or `HoldOut(last=0.1)`."""

    share: float | None = Field(default=None, gt=0, lt=1)
    """Expected share of records (or of field values), drawn by a hash of the content and the pipeline's seed."""
    by: str = "record"
    """What stays together: "record" (its text), "source" (a file), or a column, all records of one value."""
    last: float | None = Field(default=None, gt=0, lt=1)
    """The last share of each source's bytes, in reading order. A text file read as one document is split at that place."""

    @model_validator(mode="after")
    def _one_way(self) -> HoldOut:
        if (self.share is None) == (self.last is None):
            raise ValueError(f"hold_out wants either share or last, found share = {self.share} and last = {self.last}")
        if self.last is not None and self.by != "record":
            raise ValueError(f"hold_out.by = {self.by!r} has no effect with last; remove it, or give share instead of last")
        return self


class WeightedSource(SourceSettings):
    """One source of a mixture."""

    weight: float = Field(default=1.0, gt=0, le=100)
    """How often each training document stands in the output. 2.0: twice, the source as a whole again after itself.
    0.5: half of them, drawn by a hash of the text. 2.5: all twice, and half of them a third time. Held-out documents stand once,
    whatever the weight, so that a change of weights leaves them as they are."""


@dataclass(frozen=True)
class Document:
    """A text that may enter the artifact, and what decides its way."""

    raw: bytes
    """The text as UTF-8: what is hashed and counted."""
    record: dict[str, Any]
    """`{"text": "...", "source": "books/a.jsonl", "license": "CC0-1.0", "book": "emma"}`"""
    line: bytes
    """The record as it is written."""
    group: bytes
    """What the hold-out is drawn by."""


def to_document(row: Row, source: SourceSettings, hold_out: HoldOut | None, max_record_bytes: int) -> Document | Reject:
    """A row's document, or the reason why it has none."""
    try:
        text = _text(row.columns, source.text).replace("\r\n", "\n")
        record: dict[str, Any] = {"text": text, "source": row.place.source}
        if source.license is not None:
            record["license"] = source.license
        record |= {name: _column(row.columns, name) for name in source.fields}
        document = _document(record, _group(row, text, hold_out.by if hold_out else "record"))
        if len(document.raw) > max_record_bytes:
            raise ValueError(f"a text of {len(document.raw):,} bytes is longer than max_record_bytes = {max_record_bytes:,}")
        if "\0" in text:
            raise ValueError("a NUL character")
        return document
    except UnicodeEncodeError as error:
        reason = f"half of a surrogate pair, U+{ord(error.object[error.start]):04X}, which is no character"
    except (ValueError, TypeError) as error:
        reason = str(error)
    return Reject(row.place, reason, json.dumps(row.columns, ensure_ascii=False, default=str)[:BEGINS_CHARS])


def _document(record: dict[str, Any], group: bytes = b"") -> Document:
    line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    return Document(record["text"].encode(), record, line, group)


def _group(row: Row, text: str, by: str) -> bytes:
    match by:
        case "record":
            return text.encode()
        case "source":
            return row.place.source.encode()
        case column:
            return json.dumps(_column(row.columns, column), sort_keys=True).encode()


def _text(columns: dict[str, Any], mapping: str | tuple[str, ...]) -> str:
    if isinstance(mapping, tuple):
        return "\n".join(_as_text(columns, name) for name in mapping)
    if "{" not in mapping:
        return _as_text(columns, mapping)
    pieces = string.Formatter().parse(mapping)
    return "".join(literal + (_as_text(columns, name) if name is not None else "") for literal, name, _, _ in pieces)


def _as_text(columns: dict[str, Any], name: str) -> str:
    value = _column(columns, name)
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return "\n".join(value)
    raise ValueError(f"column {name!r} holds {kind_of(value)}, want a text or a list of texts")


def _column(columns: dict[str, Any], name: str) -> Any:
    if name not in columns:
        raise ValueError(f"no column {name!r}; there are: {', '.join(columns) or 'none'}")
    return columns[name]


class Sieve:
    """Drops what isn't worth training on, and counts it by reason."""

    def __init__(self, *, min_chars: int, deduplicate: bool) -> None:
        self._min_chars = min_chars
        self._deduplicate = deduplicate
        self._seen: set[bytes] = set()
        self.dropped = {"empty": 0, "short": 0, "duplicate": 0}

    def passes(self, document: Document) -> bool:
        reason = self._reason_against(document)
        if reason:
            self.dropped[reason] += 1
        return not reason

    def _reason_against(self, document: Document) -> str:
        text = document.record["text"]
        if not text.strip():
            return "empty"
        if len(text) < self._min_chars:
            return "short"
        if self._deduplicate:
            digest = hashlib.sha256(document.raw).digest()
            if digest in self._seen:
                return "duplicate"
            self._seen.add(digest)
        return ""


class Rejects:
    """`rejects.jsonl`: every record that couldn't be used, with its place and the reason; and when there are too many."""

    def __init__(self, path: Path, *, on_bad_record: Literal["fail", "skip"], max_bad_share: float) -> None:
        self._path = path
        self._on_bad_record = on_bad_record
        self._max_bad_share = max_bad_share
        self._first: Reject | None = None
        self.count = 0

    def __enter__(self) -> Rejects:
        self._file = self._path.open("w", encoding="utf-8", errors="backslashreplace")
        return self

    def __exit__(self, *raised: object) -> None:
        self._file.close()

    def add(self, reject: Reject) -> None:
        """Keep it; StageFailure at the first one unless bad records are skipped."""
        row = asdict(reject.place) | {"reason": reject.reason, "begins": reject.begins}
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.count += 1
        self._first = self._first or reject
        if self._on_bad_record == "fail":
            raise StageFailure(
                f'{reject.place}: {reject.reason}. Mend the record, or set on_bad_record = "skip" to leave such records out: '
                "they are then listed in rejects.jsonl"
            )

    def check(self, read: int) -> None:
        """StageFailure if the share of rejects among all records read is above the ceiling."""
        if self._first and self.count > self._max_bad_share * read:
            raise StageFailure(
                f"{self.count:,} of {read:,} records are bad, a share of {self.count / read:.2g}; max_bad_share allows "
                f"{self._max_bad_share:g}. The first: {self._first.place}: {self._first.reason}. Mend them, or raise max_bad_share"
            )


class Splits:
    """`train.jsonl` and `held_out.jsonl`, written in reading order, source after source."""

    def __init__(self, folder: Path, hold_out: HoldOut | None, seed: int) -> None:
        self._folder = folder
        self._hold_out = hold_out
        self._seed = seed
        self.left_by_weight = 0
        self._tallies: list[tuple[WeightedSource, dict[str, Counter[str]]]] = []

    def __enter__(self) -> Splits:
        self._opened = ExitStack()
        self._files: dict[str, BinaryIO] = {
            split: self._opened.enter_context((self._folder / f"{split}.jsonl").open("wb")) for split in SPLITS
        }
        return self

    def __exit__(self, *raised: object) -> None:
        self._opened.close()

    @contextmanager
    def source(self, source: WeightedSource) -> Iterator[None]:
        """What is added inside is this source's; what concerns it as a whole (its last share, its repetition) is done at the end."""
        self._source = source
        self._tallies.append((source, {split: Counter() for split in SPLITS}))
        with ExitStack() as spools:
            self._whole = spools.enter_context(TemporaryFile(dir=self._folder))
            self._whole_bytes = 0
            self._again = [spools.enter_context(TemporaryFile(dir=self._folder)) for _ in range(math.ceil(source.weight) - 1)]
            yield
            self._cut_last()
            for spool in self._again:
                spool.seek(0)
                shutil.copyfileobj(spool, self._files["train"])

    def summary(self) -> dict[str, Any]:
        """Documents and bytes of text: in all, per split, per license and per source."""
        by_license: dict[str, list[Counter[str]]] = {}
        for source, tally in self._tallies:
            by_license.setdefault(source.license or "unknown", []).extend(tally.values())
        by_split = {split: [tally[split] for _, tally in self._tallies] for split in SPLITS}
        return {
            **_total([tally for tallies in by_split.values() for tally in tallies]),
            **{split: _total(tallies) for split, tallies in by_split.items()},
            "licenses": {name: _total(tallies) for name, tallies in sorted(by_license.items())},
            "sources": [
                {"files": list(source.files), "license": source.license, "weight": source.weight}
                | {split: _total([tally[split]]) for split in SPLITS}
                for source, tally in self._tallies
            ],
        }

    def add(self, document: Document) -> None:
        if self._hold_out and self._hold_out.last is not None:
            self._whole.write(document.line)
            self._whole_bytes += len(document.raw)
        elif self._hold_out and self._draw("hold_out", document.group) < (self._hold_out.share or 0.0):
            self._write("held_out", self._files["held_out"], document)
        else:
            self._train(document)

    def _cut_last(self) -> None:
        if not (self._hold_out and self._hold_out.last is not None):
            return
        cut = int(self._whole_bytes * (1 - self._hold_out.last))
        self._whole.seek(0)
        begin = 0
        for line in self._whole:
            document = _document(json.loads(line))
            end = begin + len(document.raw)
            if begin >= cut:
                self._write("held_out", self._files["held_out"], document)
            elif end > cut and self._source.source == "text" and self._source.unit == "file":
                before, after = _cut_text(document, cut - begin)
                self._train(before)
                self._write("held_out", self._files["held_out"], after)
            else:
                self._train(document)
            begin = end

    def _train(self, document: Document) -> None:
        whole, part = divmod(self._source.weight, 1)
        copies = int(whole) + (part > 0 and self._draw("weight", document.raw) < part)
        self.left_by_weight += copies == 0
        files: list[IO[bytes]] = [self._files["train"], *self._again]
        for file in files[:copies]:
            self._write("train", file, document)

    def _draw(self, purpose: str, content: bytes) -> float:
        """A number in [0, 1) that hangs on the content, the seed and the purpose alone."""
        digest = hashlib.sha256(f"{purpose} {self._seed} ".encode() + content).digest()
        return int.from_bytes(digest[:8], "big") / 2**64

    def _write(self, split: str, file: IO[bytes], document: Document) -> None:
        file.write(document.line)
        self._tallies[-1][1][split].update(documents=1, bytes=len(document.raw))


def _total(tallies: list[Counter[str]]) -> dict[str, int]:
    return {what: sum(tally[what] for tally in tallies) for what in ("documents", "bytes")}


def _cut_text(document: Document, at: int) -> tuple[Document, Document]:
    """A document as two, cut at that byte or the character's beginning before it."""
    raw = document.raw
    while raw[at] & 0xC0 == 0x80:
        at -= 1
    return tuple(_document(document.record | {"text": piece.decode()}) for piece in (raw[:at], raw[at:]))  # type: ignore[return-value]
