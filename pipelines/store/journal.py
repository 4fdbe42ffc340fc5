"""One append-only journal a run. Progress, the page, status and MLflow are readers of it.

A journal is a row of immutable numbered segments, `runs/<run>/journal/00000001.jsonl`, each written put-if-absent:
a driver that finds its next number taken was replaced by another one, and ends. An event is a JSON object:

    {"time_ms": ..., "type": "run_started", "pipeline", "run", "config", "command", "snapshot", "user", "host", "versions", "forecast_s"}
    {"type": "stage_planned", "stage", "decision", "reason"}
    {"type": "stage_started", "stage", "key", "decision", "reason", "steps"}
    {"type": "progress", "stage", "done", "total", "unit"}            for people; not kept for ever, the newest counts
    {"type": "points", "stage", "points": [[metric, step, value, time_ms], ...]}
    {"type": "note", "stage", "text"}                                 a sentence: a rank that died, a checkpoint that was skipped
    {"type": "stage_ended", "stage", "status", "decision", "reason", "key", "number", "output", "seconds", "error"}
                                                                      status: done | reused | failed | stopped | blocked
    {"type": "run_ended", "status": "FINISHED" | "FAILED" | "KILLED", "exit_code", "text"}
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

from pipelines.store.store import Store

Event = dict[str, Any]

FLUSH_S = 0.5
"""Longest time that an event of little weight waits for company in its segment."""


class Superseded(Exception):
    """Another driver writes this run's journal now."""


class JournalWriter:
    """The driver's pen. Events of one flush share a segment."""

    def __init__(self, store: Store, run: str) -> None:
        self._store = store
        self.run = run
        self._lock = threading.Lock()
        self._pending: list[bytes] = []
        self._flushed_at_s = time.monotonic()
        self._next = _last_segment(store, run) + 1

    def write(self, type: str, **fields: Any) -> Event:
        event = {"type": type, "time_ms": time.time_ns() // 1_000_000, **fields}
        line = (json.dumps(event, ensure_ascii=False) + "\n").encode(errors="backslashreplace")  # what is no JSON shall not stay here
        with self._lock:
            self._pending.append(line)
        if type not in ("points", "progress"):
            self.flush()
        else:
            self.keep_up()
        return event

    def keep_up(self) -> None:
        """Flush what has waited long enough; to be called while nothing happens, or the last step before a pause would not be told."""
        if self._pending and time.monotonic() - self._flushed_at_s > FLUSH_S:
            self.flush()

    def flush(self) -> None:
        with self._lock:
            while self._pending:
                name, written = _segment(self.run, self._next), len(self._pending)
                if not self._store.backend.put_if_absent(name, b"".join(self._pending)):
                    # an error or a signal may have come after the segment was there, and before this writer knew it
                    found = self._store.backend.get(name) or b""
                    written = found.count(b"\n")
                    if not written or found != b"".join(self._pending[:written]):
                        raise Superseded(f"run {self.run} was taken over by another driver")
                self._next += 1
                del self._pending[:written]
            self._flushed_at_s = time.monotonic()


class JournalReader:
    """Reads a run's events in order, each once, from a cursor that a reader may keep: the number of segments read.

    Points that a resumed gang repeats are dropped by a high-water mark per stage and metric.
    """

    def __init__(self, store: Store, run: str) -> None:
        self._store = store
        self.run = run
        self.cursor = 0
        self._high_water: dict[tuple[str, str], int] = {}

    def read(self) -> Iterator[Event]:
        """What was written since the last call."""
        while (data := self._store.backend.get(_segment(self.run, self.cursor + 1))) is not None:
            self.cursor += 1
            for event in _events(data):
                if event["type"] == "points":
                    event["points"] = self._fresh(event["stage"], event["points"])
                    if not event["points"]:
                        continue
                yield event

    def _fresh(self, stage: str, points: list[list[Any]]) -> list[list[Any]]:
        fresh = []
        for metric, step, value, time_ms in points:
            if step > self._high_water.get((stage, metric), -1):
                self._high_water[stage, metric] = step
                fresh.append([metric, step, value, time_ms])
        return fresh


def read_journal(store: Store, run: str) -> list[Event]:
    return list(JournalReader(store, run).read())


def last_event(store: Store, run: str) -> Event | None:
    """What was written last, without reading what came before it; None where nothing was."""
    for number in range(_last_segment(store, run), 0, -1):
        if events := list(_events(store.backend.get(_segment(run, number)) or b"")):
            return events[-1]
    return None


def end_dead(store: Store, run: str, text: str = "its driver is gone") -> bool:
    """A last word in the place of a driver that is gone. False where it is not needed: there is one by now, or the driver speaks again."""
    writer = JournalWriter(store, run)  # its number before the look: what the driver still says, it says under that number
    last = last_event(store, run)
    if last is None or last["type"] == "run_ended":
        return False
    try:
        writer.write("run_ended", status="KILLED", exit_code=None, text=text)
    except Superseded:
        return False
    return True


def _events(data: bytes) -> Iterator[Event]:
    """A segment's; a damaged line tells nothing, and must not hide what the others tell."""
    for line in data.splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "type" in event:
            yield event


def _segment(run: str, number: int) -> str:
    return f"runs/{run}/journal/{number:08d}.jsonl"


def _last_segment(store: Store, run: str) -> int:
    names = store.backend.list(f"runs/{run}/journal")
    return int(names[-1].rsplit("/", 1)[1].removesuffix(".jsonl")) if names else 0
