"""One append-only journal per run. Progress, the page, status and MLflow are readers of it.

A journal is a series of immutable numbered segments, `runs/<run>/journal/00000001.jsonl`, each written with put_if_absent: a driver whose
next number is taken was replaced by another one, and ends. A segment holds one event per line; `events.py` defines them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace

from cluster.events import Curves
from pipelines.store.events import JournalEvent, RunEnded, StagePoints, StageProgress, from_json, to_json
from pipelines.store.lease import Watch, free_leases
from pipelines.store.runs import RunFolder
from pipelines.store.store import Store

FLUSH_S = 0.5
"""Points and progress wait at most this long for others to share their segment."""


class Superseded(Exception):
    """Another driver writes this run's journal now."""


class JournalWriter:
    """Writes a run's journal; only its driver has one. Events of one flush share a segment."""

    def __init__(self, store: Store, run: str) -> None:
        self._store = store
        self.run = run
        self._folder = RunFolder(store, run)
        self._lock = threading.Lock()
        self._pending: list[bytes] = []
        self._flushed_at_s = time.monotonic()
        self._next = self._folder.last_segment() + 1

    def write(self, event: JournalEvent) -> None:
        line = (to_json(event) + "\n").encode(errors="backslashreplace")  # raises now, not at a later flush, if it can't be JSON
        with self._lock:
            self._pending.append(line)
        if isinstance(event, StagePoints | StageProgress):
            self.flush_due()
        else:
            self.flush()

    def flush_due(self) -> None:
        """Flush what has waited long enough. Called in every pause, or the last step before it would stay unreported."""
        if self._pending and time.monotonic() - self._flushed_at_s > FLUSH_S:
            self.flush()

    def flush(self) -> None:
        with self._lock:
            while self._pending:
                name, written = self._folder.segment(self._next), len(self._pending)
                if not self._store.backend.put_if_absent(name, b"".join(self._pending)):
                    # an error or a signal may have arrived after the segment was written and before this writer noticed
                    found = self._store.backend.get(name) or b""
                    written = found.count(b"\n")
                    if not written or found != b"".join(self._pending[:written]):
                        raise Superseded(f"run {self.run} was taken over by another driver")
                self._next += 1
                del self._pending[:written]
            self._flushed_at_s = time.monotonic()


class JournalReader:
    """Reads a run's events in order, each once, from a cursor that a reader may keep: the number of segments read.

    Points that a resumed gang repeats are dropped, by a high-water mark per stage and metric.
    """

    def __init__(self, store: Store, run: str) -> None:
        self._store = store
        self.run = run
        self._folder = RunFolder(store, run)
        self.cursor = 0
        self._high_water: dict[tuple[str, str], int] = {}

    def read(self) -> Iterator[JournalEvent]:
        """What was written since the last call."""
        while (data := self._store.backend.get(self._folder.segment(self.cursor + 1))) is not None:
            self.cursor += 1
            for event in _events(data):
                if isinstance(event, StagePoints):
                    event = replace(event, curves=self._new_points(event))
                    if not event.curves:
                        continue
                yield event

    def _new_points(self, event: StagePoints) -> Curves:
        new: Curves = {}
        for metric, points in event.curves.items():
            for point in points:
                if point.step > self._high_water.get((event.stage, metric), -1):
                    self._high_water[event.stage, metric] = point.step
                    new.setdefault(metric, []).append(point)
        return new


def read_journal(store: Store, run: str) -> list[JournalEvent]:
    return list(JournalReader(store, run).read())


def last_event(store: Store, run: str) -> JournalEvent | None:
    """The newest event, without reading the ones before it; None if there is none."""
    folder = RunFolder(store, run)
    for number in range(folder.last_segment(), 0, -1):
        if events := list(_events(store.backend.get(folder.segment(number)) or b"")):
            return events[-1]
    return None


def end_dead_run(store: Store, run: str, text: str = "its driver is gone") -> bool:
    """End the journal of a run whose driver is gone. False if that is not needed: the run has ended, or its driver writes again."""
    writer = JournalWriter(store, run)  # before the look: whatever the driver still writes takes the number that this writer would use
    last = last_event(store, run)
    if last is None or isinstance(last, RunEnded):
        return False
    try:
        writer.write(RunEnded(status="KILLED", text=text))
    except Superseded:
        return False
    return True


def dead_runs(store: Store, *, wait: bool = True) -> list[str]:
    """Runs that have not ended and whose driver is gone.

    `wait`: watch drivers on other machines until it is certain, half a minute at most.
    """
    last_events = {run: last_event(store, run) for run in store.runs()}
    open_runs = [run for run, last in last_events.items() if last is not None and not isinstance(last, RunEnded)]
    if wait:
        return [name.removeprefix("run-") for name in free_leases(store, [driver_lease(run) for run in open_runs])]
    return [run for run in open_runs if Watch(store, driver_lease(run)).holder() is None]


def driver_lease(run: str) -> str:
    """The name of the lease that a run's driver holds."""
    return f"run-{run}"


def _events(data: bytes) -> Iterator[JournalEvent]:
    """A segment's events; a damaged line must not hide the others."""
    for line in data.splitlines():
        if (event := from_json(line)) is not None:
            yield event
