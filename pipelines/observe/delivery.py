"""Delivery to MLflow: which events of a run's journal it has, and who sends the rest.

    journal --> Sender (a process beside the driver, or `gptline sync`) --> tracking.py --> MLflow

The driver starts `python -m pipelines.observe.delivery STORE RUN URI` and forgets it: importing mlflow (2 s) and migrating a fresh
database (4 s) overlap with the stages, and the process outlives the driver until all is delivered. The cursor, a number of
journal segments, moves after MLflow has taken them: what a killed sender had under way is sent again, and shown once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from cluster.commit import canonical_json
from pipelines.observe.progress import RunView
from pipelines.observe.tracking import ENVIRONMENT, Door, RunInMlflow, resolve_uri, unreachable
from pipelines.plan.graph import ROOT
from pipelines.store.journal import Event, JournalReader, end_dead
from pipelines.store.store import Store

POINTS_A_BATCH = 5000
"""After about so many points the cursor moves: what is sent again, at most, when a sender dies."""
POLL_S = 0.5
LONGEST_WAIT_S = 10.0


class Tracker:
    """The driver's hold on the process that sends: it never waits for it but in `finish`."""

    def __init__(self, store: Store, run: str, uri: str, process: subprocess.Popen[bytes]) -> None:
        self._store = store
        self._run = run
        self._uri = uri
        self._process = process
        self._said: str | None = None

    def news(self) -> str | None:
        """A sentence for people when MLflow can't be reached, once; None else."""
        error = _read_state(self._store, self._run, self._uri).error
        if error is None or error == self._said:
            return None
        self._said = error
        return error

    def finish(self, deadline_s: float) -> str | None:
        """Wait, at most so long, until all is delivered; else a sentence that says what becomes of the rest. Call it after `run_ended`."""
        until_s = time.monotonic() + deadline_s
        while True:
            state = _read_state(self._store, self._run, self._uri)
            if _caught_up(self._store, self._run, state):
                return None
            ended = self._process.poll() is not None
            if state.error is not None:
                return state.error
            if ended:
                log = f"{_place(self._run, self._uri)}.log"
                return f"MLflow {self._uri} does not have all of this run (see {log} in the store); `gptline sync` sends the rest"
            if time.monotonic() >= until_s:
                return f"MLflow {self._uri}: process {self._process.pid} goes on sending this run; `gptline sync` sends what it may leave"
            time.sleep(0.05)


def start_tracking(store: Store, run: str, uri: str) -> Tracker:
    """Start the process that sends a run while it happens. It ends by itself: with the run, or with this process."""
    uri = _known_as(uri, store)
    home = str(ROOT)
    path = os.pathsep.join(each for each in (home, os.environ.get("PYTHONPATH")) if each)
    log = store.root / f"{_place(run, uri)}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "pipelines.observe.delivery", str(store.root), run, uri, "--driver", str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C at the terminal is the driver's business; the last words must still be sent
        )
    return Tracker(store, run, uri, process)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pipelines.observe.delivery", description="Send one run to MLflow while it happens.")
    parser.add_argument("store", type=Path)
    parser.add_argument("run")
    parser.add_argument("uri")
    parser.add_argument("--driver", type=int, required=True, help="process id of the run's driver, the parent of this process")
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(5)  # training comes first
    store = Store(arguments.store)
    follow(store, arguments.run, arguments.uri, alive=lambda: os.getppid() == arguments.driver)
    log = arguments.store / f"{_place(arguments.run, arguments.uri)}.log"
    if log.exists() and not log.stat().st_size:
        log.unlink()


def follow(store: Store, run: str, uri: str, alive: Callable[[], bool]) -> None:
    """Send a run until it has ended and all of it is delivered, or until its driver is gone and no more can be done.

    Then what other runs' own MLflows lack.
    """
    sender = Sender(store, run, uri)
    wait_s = POLL_S
    while True:
        driver_lives = alive()  # before reading: what it wrote as its last word is then read below
        delivery = sender.deliver()
        if delivery.error is None:
            wait_s = POLL_S
            if sender.view.status != "RUNNING" or not driver_lives:
                break
        elif not driver_lives:
            return
        else:
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)
        until_s = time.monotonic() + wait_s
        while time.monotonic() < until_s and alive():
            time.sleep(min(0.1, wait_s))
    theirs = {other: _own_uri(store, other) for other in store.runs() if other != run}
    behind = {other: own for other, own in theirs.items() if not _caught_up(store, other, _read_state(store, other, own))}
    silent = {own for own in set(behind.values()) if unreachable(resolve_uri(own, store.root)) is not None}
    for other, own in behind.items():
        if own not in silent:
            Sender(store, other, own).deliver()


def sync(store: Store, uri: str | None, dead: Iterable[str] = ()) -> list[str]:
    """Deliver what MLflow lacks of every run, oldest first; report lines for people.

    Each run goes to the MLflow that it was started with; a `uri` takes the place of them all. `dead` names runs whose driver is gone
    without a last word: they are ended as KILLED first.
    """
    lines = []
    for run in dead:
        if end_dead(store, run):
            lines.append(f"{run}  ended as KILLED: its driver is gone")
    runs: dict[str, list[str]] = {}
    for run in store.runs():
        if not _caught_up(store, run, _State()):
            runs.setdefault(_own_uri(store, run) if uri is None else _known_as(uri, store), []).append(run)
    if not runs:
        lines.append(f"the store {store.root} has no runs yet")
    for each, theirs in runs.items():
        lines += _sync_with(store, each, theirs)
    return lines


def undelivered(store: Store, uri: str | None) -> list[str]:
    """The runs of which MLflow lacks something: each run's own MLflow, or the one at `uri`."""
    uris = {run: _own_uri(store, run) if uri is None else _known_as(uri, store) for run in store.runs()}
    return [run for run, each in uris.items() if not _caught_up(store, run, _read_state(store, run, each))]


def _sync_with(store: Store, uri: str, runs: list[str]) -> list[str]:
    why = unreachable(resolve_uri(uri, store.root))
    if why is not None:
        return [_kept(uri, why)]
    lines = []
    try:
        door = Door(store, uri)
        for run in runs:
            sender = Sender(store, run, uri, door)
            sender.verify()
            delivery = sender.deliver()
            if delivery.sent:
                lines.append(f"{run}  {delivery.sent:,} events delivered")
            if delivery.error is not None:
                return [*lines, delivery.error]
            lines += [f"{run}  MLflow refused: {words}" for words in _read_state(store, run, uri).refused]
    except Exception as error:
        return [*lines, f"MLflow {uri} can't be opened ({error}); mend that and run `gptline sync` again"]
    return [*lines, f"MLflow {uri} has all of {len(runs)} run{'s' if len(runs) != 1 else ''}"]


def serve_ui(store: Store, uri: str | None, port: int, say: Callable[[str], None], dead: Iterable[str] = ()) -> int:
    """Serve the MLflow UI of this store on this machine alone until Ctrl-C; a server elsewhere is only named. The exit code.

    Without a `uri` it is where the runs are, the newest first.
    """
    for line in sync(store, uri, dead):
        say(line)
    uris = [uri] if uri is not None else [*dict.fromkeys(_own_uri(store, run) for run in reversed(store.runs()))] or ["sqlite"]
    servers = [each for each in uris if each.startswith(("http://", "https://"))]
    databases = [each for each in uris if each not in servers]
    for each in servers:
        say(f"{each.rstrip('/')}/#/experiments?workflowType=machine_learning")
    if not databases:
        return 0
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            say(f"port {port} of 127.0.0.1 can't be used ({error.strerror}); give another one with --port")
            return 2
    server = subprocess.Popen(
        ui_command(store, databases[0], port), env={**ENVIRONMENT, **os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    )
    try:
        while server.poll() is None and unreachable(f"http://127.0.0.1:{port}") is not None:
            time.sleep(0.3)
        if server.poll() is None:
            say(f"http://127.0.0.1:{port}/#/experiments?workflowType=machine_learning   (Ctrl-C ends it)")
        return server.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        server.terminate()
        with suppress(subprocess.TimeoutExpired):
            server.wait(10)
        server.kill()


def ui_command(store: Store, uri: str, port: int) -> list[str]:
    """One worker and no job runners: 2 processes instead of 15."""
    return [
        *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", resolve_uri(uri, store.root)),
        *("--artifacts-destination", str(store.root.resolve() / "mlflow-artifacts")),
    ]


@dataclass(frozen=True)
class Delivery:
    sent: int
    """Events delivered by this call."""
    error: str | None = None
    """A sentence for people; None when all went well."""


class Sender:
    """Brings one run's journal to one MLflow. Several may do so at once, and again: nothing is doubled."""

    def __init__(self, store: Store, run: str, uri: str, door: Door | None = None) -> None:
        self._store = store
        self.run = run
        self.uri = uri = _known_as(uri, store)
        self._door = door
        self._state = _read_state(store, run, uri)
        self._begin()

    def _begin(self) -> None:
        self.view = RunView(self.run)
        self._reader = JournalReader(self._store, self.run)
        self._waiting: list[tuple[int, Event]] = []
        self._shown: RunInMlflow | None = None

    def deliver(self) -> Delivery:
        """Send what MLflow doesn't have yet. Never raises."""
        self._take_in()
        if not self._waiting:
            return Delivery(0)
        why = unreachable(resolve_uri(self.uri, self._store.root))
        if why is not None:
            return self._failed(0, _kept(self.uri, why))
        sent = 0
        try:
            door = self._opened()
            with door.lock(_place(self.run, self.uri)):
                shown = self._look(door)
                for batch in self._batches():
                    self._state.refused += shown.show([event for _, event in batch])
                    sent += len(batch)
                    self._state.segments = max(self._state.segments, batch[-1][0])
                    self._state.error = None
                    self._save()
                    del self._waiting[: len(batch)]
        except Exception as error:  # a view that fails must not fail what it shows
            return self._failed(sent, self._sentence(error))
        return Delivery(sent)

    def verify(self) -> None:
        """Forget the cursor if the experiment it speaks of is not there any more. For runs that look delivered; may raise."""
        if self._state.segments and self._state.pipeline and self._opened().experiment(self._state.pipeline)[1] != self._state.view:
            self._state = _State()
            self._save()

    def _opened(self) -> Door:
        self._door = self._door or Door(self._store, self.uri)
        return self._door

    def _take_in(self) -> None:
        for event in self._reader.read():
            self.view.add(event)
            self._waiting.append((self._reader.cursor, event))
        self._waiting = [(segment, event) for segment, event in self._waiting if segment > self._state.segments]

    def _look(self, door: Door) -> RunInMlflow:
        """Under the lock: look at what another sender did meanwhile, and whether MLflow is still the one we knew."""
        self._state = _read_state(self._store, self.run, self.uri)
        info = _run_info(self._store, self.run)
        pipeline = self.view.pipeline or str(info.get("pipeline") or "unnamed")
        identity = door.experiment(pipeline)[1]
        if self._state.view and self._state.view != identity:
            self._state = _State()
            self._begin()
        self._state.pipeline, self._state.view = pipeline, identity
        self._take_in()
        self._shown = self._shown or RunInMlflow(door, self._store, self.view, pipeline, info)
        return self._shown

    def _batches(self) -> Iterator[list[tuple[int, Event]]]:
        """Whole segments, some thousand points at a time; the cursor moves after each."""
        batch: list[tuple[int, Event]] = []
        points = 0
        for segment, event in list(self._waiting):
            if points >= POINTS_A_BATCH and segment != batch[-1][0]:
                yield batch
                batch, points = [], 0
            batch.append((segment, event))
            points += len(event.get("points", ()))
        if batch:
            yield batch

    def _sentence(self, error: Exception) -> str:
        why = unreachable(resolve_uri(self.uri, self._store.root))
        if why is not None:
            return _kept(self.uri, why)
        first = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        return (
            f"MLflow {self.uri} did not take this run ({first}): it is kept in the run's journal and sent at the next run or `gptline sync`"
        )

    def _failed(self, sent: int, sentence: str) -> Delivery:
        if self._state.error != sentence:
            self._state.error = sentence
            self._save()
        return Delivery(sent, sentence)

    def _save(self) -> None:
        self._store.backend.put(f"{_place(self.run, self.uri)}.json", canonical_json(vars(self._state)))


def _kept(uri: str, why: str) -> str:
    return (
        f"MLflow {uri} not reachable ({why}): what happens is kept in the run's journal "
        f"and sent when it is back, at the next run or `gptline sync`"
    )


@dataclass
class _State:
    """What is known of one run's delivery to one MLflow; lies beside the run's journal."""

    segments: int = 0
    """Journal segments delivered: the cursor."""
    pipeline: str = ""
    view: str = ""
    """Which experiment they went to; another one under the same name means a fresh database, which wants everything again."""
    error: str | None = None
    refused: list[str] = field(default_factory=list)
    """What MLflow will never take, in its own words."""


def _place(run: str, uri: str) -> str:
    return f"runs/{run}/tracking-{hashlib.sha256(uri.encode()).hexdigest()[:12]}"


def _read_state(store: Store, run: str, uri: str) -> _State:
    given = json.loads(store.backend.get(f"{_place(run, uri)}.json") or b"{}")
    return _State(**{each.name: given[each.name] for each in fields(_State) if each.name in given})  # other versions wrote other fields


def _caught_up(store: Store, run: str, state: _State) -> bool:
    reader = JournalReader(store, run)
    reader.cursor = state.segments
    return next(reader.read(), None) is None


def _own_uri(store: Store, run: str) -> str:
    """The MLflow that a run was meant for when it started."""
    return _known_as((_run_info(store, run).get("tracking") or {}).get("uri", "sqlite"), store)


def _run_info(store: Store, run: str) -> dict[str, Any]:
    return json.loads(store.backend.get(f"runs/{run}/run.json") or b"{}")


def _known_as(uri: str, store: Store) -> str:
    """The store's own database has one name, so that a cursor stays valid when the store is moved."""
    return "sqlite" if uri == resolve_uri("sqlite", store.root) else uri


if __name__ == "__main__":
    main()
