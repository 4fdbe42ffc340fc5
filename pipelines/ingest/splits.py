"""Which records train and which are held out, and how often each stands."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, BinaryIO

from pipelines.artifacts import SPLITS
from pipelines.ingest.records import Record, record_of
from pipelines.ingest.settings import HoldOut


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
    return tuple(record_of(record.record | {"text": piece.decode()}) for piece in (raw[:at], raw[at:]))  # type: ignore[return-value]
