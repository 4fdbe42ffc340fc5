"""What is left out of an artifact, and counted: records that can't be used, and records that aren't worth training on."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from pipelines.ingest.records import Record
from pipelines.ingest.rows import Reject
from pipelines.stage import StageFailure

REASONS_SHOWN = 3
REASONS_KEPT = 1000
VARYING = re.compile(r"'[^']*'|\"[^\"]*\"|[0-9][0-9,.]*")
"""What differs between two records that are bad for the same reason: quoted values and numbers."""


class Sieve:
    """Drops records that aren't worth training on, and counts them by reason."""

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
        if "text" in record.record:  # a dialogue's messages are checked one by one where they are read
            text = record.record["text"]
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
    """`rejects.jsonl`: every record that couldn't be used, with its place and the reason. Fails the stage when there are too many."""

    def __init__(self, path: Path, *, on_bad_record: Literal["fail", "skip"], max_bad_share: float) -> None:
        self._path = path
        self._on_bad_record = on_bad_record
        self._max_bad_share = max_bad_share
        self._first: Reject | None = None
        self._reasons: dict[str, tuple[int, Reject]] = {}
        """By reason without what varies: how many, and the first of them."""
        self.count = 0

    def __enter__(self) -> Rejects:
        self._file = self._path.open("w", encoding="utf-8", errors="backslashreplace")
        return self

    def __exit__(self, *raised: object) -> None:
        self._file.close()

    def add(self, reject: Reject) -> None:
        """List it; StageFailure at the first one unless bad records are skipped."""
        row = asdict(reject.place) | {"reason": reject.reason, "begins": reject.begins}
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.count += reject.lines
        self._first = self._first or reject
        kind = VARYING.sub("…", reject.reason)
        if kind in self._reasons or len(self._reasons) < REASONS_KEPT:
            count, first = self._reasons.get(kind, (0, reject))
            self._reasons[kind] = (count + reject.lines, first)
        if self._on_bad_record == "fail":
            raise StageFailure(
                f'{reject.place}: {reject.reason}. Fix the record, or set on_bad_record = "skip" to leave such records out; '
                "rejects.jsonl then lists them"
            )

    def reasons(self) -> str:
        """The most frequent reasons, each with its count and the first record: "4 x score is 'high', expected a number (a.csv, ...)"."""
        by_count = sorted(self._reasons.values(), key=lambda each: -each[0])
        shown = [f"{count:,} x {first.reason} ({first.place})" for count, first in by_count[:REASONS_SHOWN]]
        rest = self.count - sum(count for count, _ in by_count[:REASONS_SHOWN])
        return "; ".join([*shown, f"{rest:,} for other reasons"] if rest else shown)

    def check(self, read: int) -> None:
        """StageFailure if the share of bad records among all that were read is above the ceiling."""
        if self._first and self.count > self._max_bad_share * read:
            raise StageFailure(
                f"{self.count:,} of {read:,} records are bad, a share of {self.count / read:.2g}; max_bad_share allows "
                f"{self._max_bad_share:g}. The first: {self._first.place}: {self._first.reason}. By reason: {self.reasons()}. "
                "Fix them, or raise max_bad_share"
            )
