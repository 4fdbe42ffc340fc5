"""Which records are for training and which are held out, and how often each is written."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, BinaryIO

from pipelines.artifacts import SPLITS
from pipelines.ingest.records import Record, record_of
from pipelines.ingest.settings import HoldOut

PIECE_BYTES = 1 << 20
FAR = 1.5
"""A held-out share is reported if it's more than this many times what was asked for, or less than that part of it."""


class Splits:
    """`train.jsonl` and `held_out.jsonl`, written in reading order, source after source."""

    def __init__(
        self, folder: Path, hold_out: HoldOut | None, seed: int, unit: str, progress: Callable[[int, int, str], None] = lambda *_: None
    ) -> None:
        self._folder = folder
        self._hold_out = hold_out
        self._seed = seed
        self._unit = unit
        """What the metadata calls a record: documents, pairs."""
        self._progress = progress
        self.left_by_weight = 0
        self._drawn = Counter[str]()
        """Records on each side before weights, where sides are drawn."""
        self._groups: set[bytes] = set()
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
        """Records added inside are of this source. What concerns it as a whole (its last share, its repetition) is done at the end."""
        self._source = source
        self._tallies.append((source, {split: Counter() for split in SPLITS}))
        with ExitStack() as spools:
            self._whole = spools.enter_context(TemporaryFile(dir=self._folder))
            self._whole_bytes = 0
            self._again = [spools.enter_context(TemporaryFile(dir=self._folder)) for _ in range(math.ceil(source.weight) - 1)]
            yield
            self._cut_last()
            for spool in self._again:
                self._repeat(spool)

    def summary(self) -> dict[str, Any]:
        """Records and bytes of content: in total, per split, per license and per source."""
        by_license: dict[str, list[Counter[str]]] = {}
        for source, tally in self._tallies:
            by_license.setdefault(source.license or "unknown", []).extend(tally.values())
        by_split = {split: [tally[split] for _, tally in self._tallies] for split in SPLITS}
        return {
            **self._total([tally for tallies in by_split.values() for tally in tallies]),
            **{split: self._total(tallies) for split, tallies in by_split.items()},
            **self._unexpected_share(),
            "licenses": {name: self._total(tallies) for name, tallies in sorted(by_license.items())},
            "sources": [
                {"files": list(source.files), "license": source.license, "weight": source.weight}
                | {split: self._total([tally[split]]) for split in SPLITS}
                for source, tally in self._tallies
            ],
        }

    def add(self, record: Record) -> None:
        """Write the record to its side."""
        if self._hold_out is None:
            self._train(record)
        elif self._hold_out.share is None:
            self._whole.write(record.line)
            self._whole_bytes += len(record.raw)
        else:
            if self._hold_out.by != "record":
                self._groups.add(hashlib.sha256(record.group).digest()[:8])
            held_out = self._draw("hold_out", record.group) < self._hold_out.share
            self._drawn["held_out" if held_out else "train"] += 1
            if held_out:
                self._write("held_out", self._files["held_out"], record)
            else:
                self._train(record)

    def drawn_from(self) -> str:
        """What the sides were drawn from, where that isn't single records: "3 values of book"."""
        by = self._hold_out.by if self._hold_out else "record"
        return f"{len(self._groups):,} values of {by}" if by != "record" else ""

    def _unexpected_share(self) -> dict[str, Any]:
        """What was asked for and what came out, where the two are far apart: few groups are drawn unevenly, one may be most records."""
        records = self._drawn.total()
        if self._hold_out is None or not self._hold_out.share or not records:
            return {}
        share = self._drawn["held_out"] / records
        if self._hold_out.share / FAR <= share <= self._hold_out.share * FAR:
            return {}
        groups = len(self._groups) if self._hold_out.by != "record" else records
        return {"hold_out": {"asked": self._hold_out.share, "by": self._hold_out.by, "share": round(share, 4), "groups": groups}}

    def _repeat(self, spool: IO[bytes]) -> None:
        total = spool.tell()
        spool.seek(0)
        while piece := spool.read(PIECE_BYTES):
            self._files["train"].write(piece)
            self._progress(spool.tell(), total, "bytes")

    def _cut_last(self) -> None:
        if not (self._hold_out and self._hold_out.last is not None):
            return
        cut = int(self._whole_bytes * (1 - self._hold_out.last))
        self._whole.seek(0)
        begin = 0
        lines_bytes = 0
        for line in self._whole:
            lines_bytes += len(line)
            if lines_bytes // PIECE_BYTES > (lines_bytes - len(line)) // PIECE_BYTES:
                self._progress(begin, self._whole_bytes, "bytes")
            record = record_of(json.loads(line))
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
        """A number in [0, 1) that depends on the content, the seed and the purpose only."""
        digest = hashlib.sha256(f"{purpose} {self._seed} ".encode() + content).digest()
        return int.from_bytes(digest[:8], "big") / 2**64

    def _total(self, tallies: list[Counter[str]]) -> dict[str, int]:
        return {what: sum(tally[what] for tally in tallies) for what in (self._unit, "bytes")}

    def _write(self, split: str, file: IO[bytes], record: Record) -> None:
        file.write(record.line)
        self._tallies[-1][1][split].update(**{self._unit: 1}, bytes=len(record.raw))


def _cut_text(record: Record, at: int) -> tuple[Record, Record]:
    """Cut a document in two, at that byte or at the beginning of the character it is in."""
    raw = record.raw
    while raw[at] & 0xC0 == 0x80:
        at -= 1
    return tuple(record_of(record.record | {"text": piece.decode()}) for piece in (raw[:at], raw[at:]))  # type: ignore[return-value]
