"""What every kind of ingest does with records: which stay, which are held out, how often each stands, and what becomes of bad ones.

    rows --> records (mapped by the kind, checked) --> filters (empty, short, duplicate) --> held_out.jsonl
                |                                                                       `--> train.jsonl, by weight
                `--> rejects.jsonl

Every decision about a record hangs on its own content and the seed alone, so that adding records moves none of the others (but for
`last`, which is about order), and stages that hold out by the same field hold out the same.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import typing
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, BinaryIO, Literal

from pydantic import Field, model_validator

from gpt.settings import Settings
from pipelines.artifacts import SPLITS
from pipelines.reading import BEGINS_CHARS, Reader, ReadSettings, Reject, Row, SourceSettings
from pipelines.stage import Source, StageContext, StageFailure

CONTENT = ("text", "messages", "prompt", "chosen", "rejected", "response", "score", "reference")
"""The keys of a record that are its content; what else it has says where it is from."""


class HoldOut(Settings):
    """Which records are kept from training: `HoldOut(share=0.02, by="book")` or `HoldOut(last=0.1)`."""

    share: float | None = Field(default=None, gt=0, lt=1)
    """Expected share of records (or of field values), drawn by a hash of the content and the pipeline's seed."""
    by: str = "record"
    """What stays together: "record" (equal content), "source" (a file), "prompt" (what the first user's message says), or a column, all
    records of one value."""
    last: float | None = Field(default=None, gt=0, lt=1)
    """The last share of each source's bytes, in reading order. A text file read as one document is split at that place."""

    @model_validator(mode="after")
    def _one_way(self) -> HoldOut:
        if (self.share is None) == (self.last is None):
            raise ValueError(f"hold_out wants either share or last, found share = {self.share} and last = {self.last}")
        if self.last is not None and self.by != "record":
            raise ValueError(f"hold_out.by = {self.by!r} has no effect with last; remove it, or give share instead of last")
        return self


class Weighted(Settings):
    """One source of a mixture."""

    weight: float = Field(default=1.0, gt=0, le=100)
    """How often each training record stands in the output. 2.0: twice, the source as a whole again after itself.
    0.5: half of them, drawn by a hash of the content. 2.5: all twice, and half of them a third time. Held-out records stand once,
    whatever the weight, so that a change of weights leaves them as they are."""


class IngestSettings(ReadSettings):
    """What all ingest kinds share. A kind's config adds the keys of one source, inline, and `mixture`, several of them."""

    mixture: tuple[Any, ...] = ()
    hold_out: HoldOut | None = None
    """Which records are kept from training. None: no held-out ones."""
    deduplicate: bool = True
    """Keep one of the records whose content is equal (by sha256), the first; over all sources."""
    on_bad_record: Literal["fail", "skip"] = "fail"
    """Stop at the first record that can't be used, or go on without it. Either way it is listed in `rejects.jsonl`.
    A CSV or Parquet file that can't be read at all always stops the stage."""
    max_bad_share: float = Field(default=0.001, ge=0, le=1)
    """With on_bad_record = "skip": the highest share of bad records that is let pass."""

    @model_validator(mode="after")
    def _one_source_or_a_mixture(self) -> IngestSettings:
        fields = self._part().model_fields
        inline = [
            key for key, field in fields.items() if key != "weight" and getattr(self, key) != field.get_default(call_default_factory=True)
        ]
        if self.mixture and inline:
            raise ValueError(f"{inline[0]} stands beside mixture; move it into the sources of the mixture")
        for part in self.parts():
            if part.source is None or not part.files:
                raise ValueError(f"want source (text, json, csv or parquet) and files, found source = {part.source}, files = {part.files}")
        return self

    def parts(self) -> tuple[Any, ...]:
        """The sources: those of the mixture, or the inline one."""
        part = self._part()
        return self.mixture or (part(**{key: getattr(self, key) for key in part.model_fields if key != "weight"}),)

    def sources(self, data: Path) -> list[Source]:
        """The files of all parts, in reading order; ValueError for what is missing, unreadable or in two parts."""
        found: dict[str, Source] = {}
        faults = []
        for part, settings in enumerate(self.parts()):
            try:
                names = settings.expand(data)
            except ValueError as error:
                faults.append(str(error))
                continue
            faults += [f"{name} is in two sources of the mixture; leave it in one, with a higher weight" for name in names if name in found]
            found |= {name: Source(name, Path(os.path.abspath(data / name)), part=part) for name in names}
        if faults:
            raise ValueError("; ".join(faults))
        return list(found.values())

    @classmethod
    def _part(cls) -> type[Any]:
        """The settings of one source: what `mixture` is a tuple of."""
        (part, _) = typing.get_args(cls.model_fields["mixture"].annotation)
        return part


@dataclass(frozen=True)
class Record:
    """What may enter the artifact, and what decides its way."""

    raw: bytes
    """The content as UTF-8, a document's text as it is: what is hashed and counted."""
    record: dict[str, Any]
    """`{"text": "...", "source": "books/a.jsonl", "license": "CC0-1.0", "book": "emma"}`"""
    line: bytes
    """The record as it is written."""
    group: bytes
    """What the hold-out is drawn by."""


Content = dict[str, Any]
ToContent = Callable[[dict[str, Any], Any], Content | Iterable[Content] | None]
"""What a kind makes of a row's columns and its source's settings: one record's content, several, or None to leave the row out."""


def gather(config: Any, stage: StageContext, to_content: ToContent, unit: str, min_chars: int = 1) -> dict[str, Any]:
    """Write `train.jsonl`, `held_out.jsonl` and `rejects.jsonl` into `stage.output`; the artifact's metadata.

    `config` is an IngestSettings. `to_content(columns, part)` returns the content of a row's record, a list of several, or None (or an
    empty list) to leave the row out, which is counted. ValueError says why a row is bad; none of its records is kept then.
    """
    left_out = 0
    reader = Reader(stage, config)
    sieve = Sieve(min_chars=min_chars, deduplicate=config.deduplicate)
    rejects = Rejects(stage.output / "rejects.jsonl", on_bad_record=config.on_bad_record, max_bad_share=config.max_bad_share)
    splits = Splits(stage.output, config.hold_out, stage.seed, unit)
    with rejects, splits:
        for index, part in enumerate(config.parts()):
            with splits.source(part):
                for row in reader.rows(part, index):
                    made = row if isinstance(row, Reject) else to_records(row, part, config.hold_out, config.max_record_bytes, to_content)
                    if isinstance(made, Reject):
                        rejects.add(made)
                        continue
                    left_out += not made
                    for record in made:
                        if sieve.passes(record):
                            splits.add(record)
    rejects.check(reader.records)
    counts = {"read": reader.records, "bad": rejects.count, **sieve.dropped, "left_by_weight": splits.left_by_weight}
    if left_out:  # only then, so that artifacts without such rows keep their digests
        counts["left_out"] = left_out
    summary = splits.summary()
    for split in SPLITS if config.hold_out else ("train",):
        if not summary[split][unit]:
            raise StageFailure(_nothing_left(split, unit, counts, reader.empty_files))
    return {**summary, "records": counts, "empty_files": reader.empty_files, "replaced_characters": reader.replaced_characters}


def _nothing_left(split: str, unit: str, counts: dict[str, int], empty_files: int) -> str:
    advice = "look at files, their columns and min_chars" if split == "train" else "give hold_out a larger share, or another field or seed"
    found = ", ".join(f"{count:,} {reason}" for reason, count in counts.items())
    return f"no {split} {unit} are left (records: {found}; {empty_files:,} empty files); {advice}"


def to_records(
    row: Row, source: SourceSettings, hold_out: HoldOut | None, max_record_bytes: int, to_content: ToContent
) -> list[Record] | Reject:
    """Return a row's records, none where it is left out, or the reason why it is bad."""
    try:
        made = to_content(row.columns, source)
        contents = [made] if isinstance(made, dict) else [] if made is None else list(made)
        return [_checked(row, content, source, hold_out, max_record_bytes) for content in contents]
    except UnicodeEncodeError as error:
        reason = f"half of a surrogate pair, U+{ord(error.object[error.start]):04X}, which is no character"
    except (ValueError, TypeError) as error:
        reason = str(error)
    return Reject(row.place, reason, json.dumps(row.columns, ensure_ascii=False, default=str)[:BEGINS_CHARS])


def _checked(row: Row, content: Content, source: SourceSettings, hold_out: HoldOut | None, max_record_bytes: int) -> Record:
    record = {**content, "source": row.place.source}
    if source.license is not None:
        record["license"] = source.license
    record |= {name: column_of(row.columns, name) for name in source.fields}
    made = _record(record, _group(row, record, hold_out.by if hold_out else "record"))
    if len(made.raw) > max_record_bytes:
        raise ValueError(f"a text of {len(made.raw):,} bytes is longer than max_record_bytes = {max_record_bytes:,}")
    if b"\0" in made.raw or b"\\u0000" in made.raw:
        raise ValueError("a NUL character")
    return made


def column_of(columns: dict[str, Any], name: str) -> Any:
    if name not in columns:
        raise ValueError(f"no column {name!r}; there are: {', '.join(columns) or 'none'}")
    return columns[name]


def _record(record: dict[str, Any], group: bytes = b"") -> Record:
    line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    return Record(_content(record), record, line, group)


def _content(record: dict[str, Any]) -> bytes:
    if "text" in record:
        return str(record["text"]).encode()
    return json.dumps({key: record[key] for key in CONTENT if key in record}, ensure_ascii=False).encode()


def _group(row: Row, record: dict[str, Any], by: str) -> bytes:
    match by:
        case "record":
            return _content(record)
        case "source":
            return row.place.source.encode()
        case "prompt" if "text" not in record:
            messages = record.get("messages") or record["prompt"]
            return next(message["content"] for message in messages if message["role"] == "user").encode()
        case column:
            return json.dumps(column_of(row.columns, column), sort_keys=True).encode()


class Sieve:
    """Drops what isn't worth training on, and counts it by reason."""

    def __init__(self, *, min_chars: int, deduplicate: bool) -> None:
        self._min_chars = min_chars
        self._deduplicate = deduplicate
        self._seen: set[bytes] = set()
        self.dropped = {"empty": 0, "short": 0, "duplicate": 0}

    def passes(self, record: Record) -> bool:
        reason = self._reason_against(record)
        if reason:
            self.dropped[reason] += 1
        return not reason

    def _reason_against(self, record: Record) -> str:
        text = record.record.get("text", "a dialogue's messages are checked one by one")
        if not text.strip():
            return "empty"
        if len(text) < self._min_chars:
            return "short"
        if self._deduplicate:
            digest = hashlib.sha256(record.raw).digest()
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

    def __init__(self, folder: Path, hold_out: HoldOut | None, seed: int, unit: str) -> None:
        self._folder = folder
        self._hold_out = hold_out
        self._seed = seed
        self._unit = unit
        """What the metadata calls a record: documents, pairs."""
        self.left_by_weight = 0
        self._tallies: list[tuple[Any, dict[str, Counter[str]]]] = []

    def __enter__(self) -> Splits:
        self._opened = ExitStack()
        self._files: dict[str, BinaryIO] = {
            split: self._opened.enter_context((self._folder / f"{split}.jsonl").open("wb")) for split in SPLITS
        }
        return self

    def __exit__(self, *raised: object) -> None:
        self._opened.close()

    @contextmanager
    def source(self, source: Any) -> Iterator[None]:
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
        """Records and bytes of content: in all, per split, per license and per source."""
        by_license: dict[str, list[Counter[str]]] = {}
        for source, tally in self._tallies:
            by_license.setdefault(source.license or "unknown", []).extend(tally.values())
        by_split = {split: [tally[split] for _, tally in self._tallies] for split in SPLITS}
        return {
            **self._total([tally for tallies in by_split.values() for tally in tallies]),
            **{split: self._total(tallies) for split, tallies in by_split.items()},
            "licenses": {name: self._total(tallies) for name, tallies in sorted(by_license.items())},
            "sources": [
                {"files": list(source.files), "license": source.license, "weight": source.weight}
                | {split: self._total([tally[split]]) for split in SPLITS}
                for source, tally in self._tallies
            ],
        }

    def add(self, record: Record) -> None:
        if self._hold_out and self._hold_out.last is not None:
            self._whole.write(record.line)
            self._whole_bytes += len(record.raw)
        elif self._hold_out and self._draw("hold_out", record.group) < (self._hold_out.share or 0.0):
            self._write("held_out", self._files["held_out"], record)
        else:
            self._train(record)

    def _cut_last(self) -> None:
        if not (self._hold_out and self._hold_out.last is not None):
            return
        cut = int(self._whole_bytes * (1 - self._hold_out.last))
        self._whole.seek(0)
        begin = 0
        for line in self._whole:
            record = _record(json.loads(line))
            end = begin + len(record.raw)
            if begin >= cut:
                self._write("held_out", self._files["held_out"], record)
            elif end > cut and self._source.source == "text" and self._source.unit == "file":
                before, after = _cut_text(record, cut - begin)
                self._train(before)
                self._write("held_out", self._files["held_out"], after)
            else:
                self._train(record)
            begin = end

    def _train(self, record: Record) -> None:
        whole, part = divmod(self._source.weight, 1)
        copies = int(whole) + (part > 0 and self._draw("weight", record.raw) < part)
        self.left_by_weight += copies == 0
        files: list[IO[bytes]] = [self._files["train"], *self._again]
        for file in files[:copies]:
            self._write("train", file, record)

    def _draw(self, purpose: str, content: bytes) -> float:
        """A number in [0, 1) that hangs on the content, the seed and the purpose alone."""
        digest = hashlib.sha256(f"{purpose} {self._seed} ".encode() + content).digest()
        return int.from_bytes(digest[:8], "big") / 2**64

    def _total(self, tallies: list[Counter[str]]) -> dict[str, int]:
        return {what: sum(tally[what] for tally in tallies) for what in (self._unit, "bytes")}

    def _write(self, split: str, file: IO[bytes], record: Record) -> None:
        file.write(record.line)
        self._tallies[-1][1][split].update(**{self._unit: 1}, bytes=len(record.raw))


def _cut_text(record: Record, at: int) -> tuple[Record, Record]:
    """A document as two, cut at that byte or the character's beginning before it."""
    raw = record.raw
    while raw[at] & 0xC0 == 0x80:
        at -= 1
    return tuple(_record(record.record | {"text": piece.decode()}) for piece in (raw[:at], raw[at:]))  # type: ignore[return-value]
