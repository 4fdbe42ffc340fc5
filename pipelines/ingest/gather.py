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
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from pipelines.artifacts import SPLITS
from pipelines.ingest.reader import Reader
from pipelines.ingest.records import Record, content_of, record_of
from pipelines.ingest.rows import BEGINS_CHARS, Reject, Row
from pipelines.ingest.settings import HoldOut, SourceSettings
from pipelines.ingest.splits import Splits
from pipelines.stage import StageContext, StageFailure


def gather(
    config: Any, stage: StageContext, to_content: Callable[[dict[str, Any], Any], dict[str, Any]], unit: str, min_chars: int = 1
) -> dict[str, Any]:
    """Write `train.jsonl`, `held_out.jsonl` and `rejects.jsonl` into `stage.output`; the artifact's metadata.

    `config` is an IngestSettings, `to_content(columns, part)` a row's content, or ValueError with the reason why it has none.
    """
    reader = Reader(stage, config)
    sieve = Sieve(min_chars=min_chars, deduplicate=config.deduplicate)
    rejects = Rejects(stage.output / "rejects.jsonl", on_bad_record=config.on_bad_record, max_bad_share=config.max_bad_share)
    splits = Splits(stage.output, config.hold_out, stage.seed, unit)
    with rejects, splits:
        for index, part in enumerate(config.parts()):
            with splits.source(part):
                for row in reader.rows(part, index):
                    record = row if isinstance(row, Reject) else to_record(row, part, config.hold_out, config.max_record_bytes, to_content)
                    if isinstance(record, Reject):
                        rejects.add(record)
                    elif sieve.passes(record):
                        splits.add(record)
    rejects.check(reader.records)
    counts = {"read": reader.records, "bad": rejects.count, **sieve.dropped, "left_by_weight": splits.left_by_weight}
    summary = splits.summary()
    for split in SPLITS if config.hold_out else ("train",):
        if not summary[split][unit]:
            raise StageFailure(_nothing_left(split, unit, counts, reader.empty_files))
    return {**summary, "records": counts, "empty_files": reader.empty_files, "replaced_characters": reader.replaced_characters}


def _nothing_left(split: str, unit: str, counts: dict[str, int], empty_files: int) -> str:
    advice = "look at files, their columns and min_chars" if split == "train" else "give hold_out a larger share, or another field or seed"
    found = ", ".join(f"{count:,} {reason}" for reason, count in counts.items())
    return f"no {split} {unit} are left (records: {found}; {empty_files:,} empty files); {advice}"


def to_record(
    row: Row,
    source: SourceSettings,
    hold_out: HoldOut | None,
    max_record_bytes: int,
    to_content: Callable[[dict[str, Any], Any], dict[str, Any]],
) -> Record | Reject:
    """A row's record, or the reason why it has none."""
    try:
        record = {**to_content(row.columns, source), "source": row.place.source}
        if source.license is not None:
            record["license"] = source.license
        record |= {name: column_of(row.columns, name) for name in source.fields}
        made = record_of(record, _group(row, record, hold_out.by if hold_out else "record"))
        if len(made.raw) > max_record_bytes:
            raise ValueError(f"a text of {len(made.raw):,} bytes is longer than max_record_bytes = {max_record_bytes:,}")
        if b"\0" in made.raw or b"\\u0000" in made.raw:
            raise ValueError("a NUL character")
        return made
    except UnicodeEncodeError as error:
        reason = f"half of a surrogate pair, U+{ord(error.object[error.start]):04X}, which is no character"
    except (ValueError, TypeError) as error:
        reason = str(error)
    return Reject(row.place, reason, json.dumps(row.columns, ensure_ascii=False, default=str)[:BEGINS_CHARS])


def column_of(columns: dict[str, Any], name: str) -> Any:
    if name not in columns:
        raise ValueError(f"no column {name!r}; there are: {', '.join(columns) or 'none'}")
    return columns[name]


def _group(row: Row, record: dict[str, Any], by: str) -> bytes:
    match by:
        case "record":
            return content_of(record)
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
