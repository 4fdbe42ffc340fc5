"""Delivers a run's journal to MLflow, and remembers how much of it MLflow has.

    journal --> Sender (in a process beside the driver, see tracker.py, or in `gptline sync`) --> mlflow_run.py --> MLflow

The cursor, a number of journal segments, moves after MLflow has taken them. What a sender had under way when it was killed is sent again,
and MLflow shows it once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields

from cluster.commit import canonical_json
from pipelines.observe.mlflow_address import resolve_uri, run_uri, short_uri, unreachable
from pipelines.observe.mlflow_run import RunInMlflow
from pipelines.observe.mlflow_session import MlflowSession
from pipelines.observe.view import RunView
from pipelines.store.events import JournalEvent, StagePoints
from pipelines.store.journal import JournalReader, end_dead_run
from pipelines.store.runs import RunFolder
from pipelines.store.store import Store

POINTS_PER_BATCH = 5000
"""After about this many points the cursor moves: a sender that dies leaves no more than this to be sent again."""
ERROR_CHARS = 300


@dataclass
class DeliveryState:
    """How much of one run one MLflow has. Kept beside the run's journal."""

    segments: int = 0
    """The cursor: journal segments delivered."""
    pipeline: str = ""
    view: str = ""
    """The experiment they went to. Another one under the same name means a fresh database, which needs everything again."""
    error: str | None = None
    """Why the newest attempt failed, for people."""
    refused: list[str] = field(default_factory=list)
    """What MLflow will never take, in its own words."""
    refused_files: dict[str, str] = field(default_factory=dict)
    """Name of a file that MLflow's artifact store refused to why: `gptline sync` sends it again."""

    def is_complete(self, store: Store, run: str) -> bool:
        """Whether the whole journal was delivered."""
        reader = JournalReader(store, run)
        reader.cursor = self.segments
        return next(reader.read(), None) is None

    def shortfall(self) -> list[str]:
        """Sentences about what MLflow does not have although the journal was delivered."""
        return [*self.refused, *(f"{name}: {why}" for name, why in self.refused_files.items())]

    @classmethod
    def read(cls, store: Store, run: str, uri: str) -> DeliveryState:
        """Read the state; other versions of gptline may have written other fields."""
        values = json.loads(store.backend.get(f"{RunFolder(store, run).tracking(uri)}.json") or b"{}")
        return cls(**{each.name: values[each.name] for each in fields(cls) if each.name in values})

    def write(self, store: Store, run: str, uri: str) -> None:
        store.backend.put(f"{RunFolder(store, run).tracking(uri)}.json", canonical_json(vars(self)))


@dataclass(frozen=True)
class Delivery:
    """What one call of `Sender.deliver` did."""

    sent: int
    """Events delivered."""
    error: str | None = None
    """A sentence for people; None if all went well."""


class Sender:
    """Brings one run's journal to one MLflow. Several senders may do so at once: nothing is doubled."""

    def __init__(self, store: Store, run: str, uri: str, session: MlflowSession | None = None) -> None:
        self._store = store
        self.run = run
        self.uri = uri = short_uri(uri, store)
        self._session = session
        self._state = DeliveryState.read(store, run, uri)
        self._begin()

    def _begin(self) -> None:
        self.view = RunView(self.run)
        self._reader = JournalReader(self._store, self.run)
        self._waiting: list[tuple[int, JournalEvent]] = []
        """(segment, event) not delivered yet."""
        self._run_in_mlflow: RunInMlflow | None = None

    def deliver(self, *, retry_files: bool = False) -> Delivery:
        """Send what MLflow doesn't have yet, and with `retry_files` also the files that it refused. Never raises."""
        self._read_journal()
        files = list(self._state.refused_files) if retry_files else []
        if not self._waiting and not files:
            return Delivery(0)
        why = unreachable(resolve_uri(self.uri, self._store))
        if why is not None:
            return self._failed(0, unreachable_sentence(self.uri, why))
        sent = 0
        try:
            session = self._open_session()
            with session.lock(RunFolder(self._store, self.run).tracking(self.uri)):
                run = self._prepare(session)
                if files:
                    self._state.refused_files = run.send_files(files)
                    self._save()
                for batch in self._batches():
                    refused = run.show([event for _, event in batch])
                    self._state.refused += refused.requests
                    self._state.refused_files |= refused.files
                    sent += len(batch)
                    self._state.segments = max(self._state.segments, batch[-1][0])
                    self._state.error = None
                    self._save()
                    del self._waiting[: len(batch)]
        except Exception as error:  # MLflow is a view: a failure here must not fail the run
            return self._failed(sent, self._sentence(error))
        return Delivery(sent)

    def verify(self) -> DeliveryState:
        """Forget the cursor if the experiment it belongs to is gone. For runs that look delivered; may raise. The state now."""
        if self._state.segments and self._state.pipeline:
            identity = self._open_session().experiment(self._state.pipeline)[1]
            if identity != self._state.view:
                self._state = DeliveryState()
                self._save()
        return self._state

    def shortfall(self) -> list[str]:
        return self._state.shortfall()

    def _open_session(self) -> MlflowSession:
        self._session = self._session or MlflowSession(self._store, self.uri)
        return self._session

    def _read_journal(self) -> None:
        for event in self._reader.read():
            self.view.add(event)
            self._waiting.append((self._reader.cursor, event))
        self._waiting = [(segment, event) for segment, event in self._waiting if segment > self._state.segments]

    def _prepare(self, session: MlflowSession) -> RunInMlflow:
        """Under the lock: see what another sender has done meanwhile, and whether MLflow is still the one that we know."""
        self._state = DeliveryState.read(self._store, self.run, self.uri)
        record = RunFolder(self._store, self.run).record()
        pipeline = self.view.pipeline or record.pipeline or "unnamed"
        identity = session.experiment(pipeline)[1]
        if self._state.view and self._state.view != identity:
            self._state = DeliveryState()
            self._begin()
        self._state.pipeline, self._state.view = pipeline, identity
        self._read_journal()
        self._run_in_mlflow = self._run_in_mlflow or RunInMlflow(session, self._store, self.view, pipeline, record)
        return self._run_in_mlflow

    def _batches(self) -> Iterator[list[tuple[int, JournalEvent]]]:
        """Whole segments, some thousand points at a time; the cursor moves after each batch."""
        batch: list[tuple[int, JournalEvent]] = []
        points = 0
        for segment, event in list(self._waiting):
            if points >= POINTS_PER_BATCH and segment != batch[-1][0]:
                yield batch
                batch, points = [], 0
            batch.append((segment, event))
            points += sum(map(len, event.curves.values())) if isinstance(event, StagePoints) else 0
        if batch:
            yield batch

    def _sentence(self, error: Exception) -> str:
        why = unreachable(resolve_uri(self.uri, self._store))
        if why is not None:
            return unreachable_sentence(self.uri, why)
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0][:ERROR_CHARS]
        return (
            f"MLflow {self.uri} did not take this run ({first_line}): the run is kept in its journal, and the next run or `gptline sync` "
            f"sends it"
        )

    def _failed(self, sent: int, sentence: str) -> Delivery:
        if self._state.error != sentence:
            self._state.error = sentence
            self._save()
        return Delivery(sent, sentence)

    def _save(self) -> None:
        self._state.write(self._store, self.run, self.uri)


def unreachable_sentence(uri: str, why: str) -> str:
    return (
        f"MLflow {uri} can't be reached ({why}): what happens is kept in the run's journal, and the next run or `gptline sync` sends it "
        f"when MLflow is back"
    )


def sync(store: Store, uri: str | None, dead: Iterable[str] = ()) -> list[str]:
    """Deliver what MLflow lacks of every run, oldest first; the lines to print.

    Each run goes to the MLflow that it was started with, or all of them to `uri`. `dead` names runs whose driver is gone without having
    ended them: they are ended as KILLED first.
    """
    lines = [f"{run}  ended as KILLED: its driver is gone" for run in dead if end_dead_run(store, run)]
    runs: dict[str, list[str]] = {}
    for run in store.runs():
        if not DeliveryState().is_complete(store, run):  # it has a journal
            runs.setdefault(run_uri(store, run) if uri is None else short_uri(uri, store), []).append(run)
    if not runs:
        lines.append(f"the store {store} has no runs yet")
    for each, its_runs in runs.items():
        lines += _sync_with(store, each, its_runs)
    return lines


def undelivered(store: Store, uri: str | None) -> list[str]:
    """The runs of which an MLflow lacks something: each run's own MLflow, or the one at `uri`."""
    uris = {run: run_uri(store, run) if uri is None else short_uri(uri, store) for run in store.runs()}
    return [run for run, each in uris.items() if not DeliveryState.read(store, run, each).is_complete(store, run)]


def _sync_with(store: Store, uri: str, runs: list[str]) -> list[str]:
    why = unreachable(resolve_uri(uri, store))
    if why is not None:
        return [unreachable_sentence(uri, why)]
    lines, lacking = [], 0
    try:
        session = MlflowSession(store, uri)
        for run in runs:
            sender = Sender(store, run, uri, session)
            sender.verify()
            delivery = sender.deliver(retry_files=True)
            if delivery.sent:
                lines.append(f"{run}  {delivery.sent:,} events delivered")
            if delivery.error is not None:
                return [*lines, delivery.error]
            refusals = sender.shortfall()
            lines += [f"{run}  MLflow refused: {refusal}" for refusal in refusals]
            lacking += len(refusals)
    except Exception as error:
        return [*lines, f"MLflow {uri} can't be opened ({error}); fix that and run `gptline sync` again"]
    has_all = f"MLflow {uri} has all of {len(runs)} run{'s' if len(runs) != 1 else ''}"
    return [*lines, has_all + (f" except what it refused: {lacking} item{'s' if lacking != 1 else ''}, see above" if lacking else "")]
