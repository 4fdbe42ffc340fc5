"""The one door to MLflow: a reader of the journal that keeps a cursor, so that MLflow is a view that may die and come back.

    journal --> Sender (a process beside the driver, or `gptline sync`) --> MLflow

The driver starts `python -m pipelines.tracking STORE RUN URI` and forgets it: importing mlflow (2 s) and migrating a fresh
database (4 s) overlap with the stages, and the process outlives the driver until all is delivered. Delivery is at least once;
each point is in MLflow once all the same, because MLflow drops an exact repeat of (key, time, step, value) and because
everything else is looked up by its `gptline.*` tags before it is created.

Experiment = pipeline; parent run = one `gptline run`; child run = stage, a reused one too, with the curves of the action it
reuses. A blocked stage has no child, since nothing happened there; it is a row of the parent's table.
Leaves out: the registry, and uploading weights (models are external: a digest and a path into the store).
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import http.client
import json
import os
import posixpath
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from cluster.commit import canonical_json
from pipelines.journal import Event, JournalReader, JournalWriter, Superseded
from pipelines.lineage import as_html, as_mermaid, code_digest, trace_all
from pipelines.page import render
from pipelines.progress import RunView, StageView
from pipelines.store import Action, Store

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

BATCH = 1000
"""Metrics a call: MLflow's own limit."""
PARAM_CHARS, TAG_CHARS, NOTE_CHARS, DIGEST_CHARS = 6000, 8000, 7900, 36
POLL_S = 0.5
LONGEST_WAIT_S = 10.0
CONNECT_S, ANSWER_S = 2.0, 5.0
MOST_SOURCES = 20
"""More source files than this are shown as one dataset."""
STATUS = {"done": "FINISHED", "reused": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}

_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # with the default of 7 one call to a dead server blocks for 246 s
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_ALLOW_MODEL_CODE_EXECUTION": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
}


def resolve_uri(uri: str, store_root: Path) -> str:
    """`sqlite` is the store's own database; anything else is taken as it is."""
    return f"sqlite:///{store_root.resolve()}/mlflow.db" if uri == "sqlite" else uri


def _known_as(uri: str, store: Store) -> str:
    """The store's own database has one name, so that a cursor stays valid when the store is moved."""
    return "sqlite" if uri == resolve_uri("sqlite", store.root) else uri


def _run_info(store: Store, run: str) -> dict[str, Any]:
    data = store.backend.get(f"runs/{run}/run.json")
    return {} if data is None else json.loads(data)


def _own_uri(store: Store, run: str) -> str:
    """The MLflow that a run was meant for when it started."""
    return _known_as((_run_info(store, run).get("tracking") or {}).get("uri", "sqlite"), store)


def unreachable(uri: str) -> str | None:
    """Why a server can't be spoken to now, within seconds; None when it answers, or is a database."""
    address = urlsplit(uri)
    if address.scheme not in ("http", "https"):
        return None
    kind = http.client.HTTPSConnection if address.scheme == "https" else http.client.HTTPConnection
    connection = kind(address.hostname or "", address.port, timeout=CONNECT_S)
    try:
        connection.connect()
        if connection.sock is not None:
            connection.sock.settimeout(ANSWER_S)
        connection.request("GET", f"{address.path.rstrip('/')}/health")
        status = connection.getresponse().status
    except TimeoutError:
        return "no answer in time"
    except OSError as error:
        return (error.strerror or str(error) or type(error).__name__).lower()
    except http.client.HTTPException as error:
        return f"not an HTTP answer: {error!r}"
    finally:
        connection.close()
    return f"it answers with HTTP {status}" if status >= 500 else None


def _kept(uri: str, why: str) -> str:
    return (
        f"MLflow {uri} not reachable ({why}): what happens is kept in the run's journal "
        f"and sent when it is back, at the next run or `gptline sync`"
    )


@dataclass(frozen=True)
class Delivery:
    sent: int
    """Events delivered by this call."""
    remaining: int
    error: str | None = None
    """A sentence for people; None when all went well."""


@dataclass
class _State:
    """What is known of one run's delivery to one MLflow; lies beside the run's journal."""

    segments: int = 0
    """Journal segments delivered: the cursor."""
    pipeline: str = ""
    view: str = ""
    """Which experiment they went to; another one under the same name means a fresh database, which wants everything again."""
    parent: str = ""
    error: str | None = None
    refused: list[str] = field(default_factory=list)
    """What MLflow will never take, in its own words."""


def _place(run: str, uri: str) -> str:
    return f"runs/{run}/tracking-{hashlib.sha256(uri.encode()).hexdigest()[:12]}"


def _read_state(store: Store, run: str, uri: str) -> _State:
    data = store.backend.get(f"{_place(run, uri)}.json")
    return _State() if data is None else _State(**json.loads(data))


def _write_state(store: Store, run: str, uri: str, state: _State) -> None:
    store.backend.put(f"{_place(run, uri)}.json", canonical_json(vars(state)))


def _caught_up(store: Store, run: str, state: _State) -> bool:
    reader = JournalReader(store, run)
    reader.cursor = state.segments
    return next(reader.read(), None) is None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; the lock ends with its holder, however that ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class _Door:
    """An opened MlflowClient and what is looked up once. Every call names its run; nothing is ambient."""

    def __init__(self, store: Store, uri: str) -> None:
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient

        self.uri = resolve_uri(uri, store.root)
        self._store = store
        self._experiments: dict[str, tuple[str, str]] = {}
        self._models: dict[str, str] = {}
        with self.lock("mlflow"):  # a fresh database migrates when it is first opened, and two migrations at once both fail
            self.client: MlflowClient = MlflowClient(self.uri)
            self.client.get_experiment_by_name("Default")

    def lock(self, name: str) -> Any:
        return _locked(self._store.root / f"{name}.lock")

    def experiment(self, pipeline: str) -> tuple[str, str]:
        """Its id, and what tells it from another of the same name."""
        from mlflow.exceptions import MlflowException

        if pipeline not in self._experiments:
            found = self.client.get_experiment_by_name(pipeline)
            if found is None:
                place = (self._store.root / "mlflow-artifacts" / pipeline).resolve().as_uri() if self.uri.startswith("sqlite:") else None
                with suppress(MlflowException):  # another driver was faster
                    self.client.create_experiment(pipeline, artifact_location=place)
                found = self.client.get_experiment_by_name(pipeline)
                if found is None:
                    raise RuntimeError(f"MLflow {self.uri} neither has nor creates an experiment named {pipeline!r}")
            if found.lifecycle_stage == "deleted":
                raise RuntimeError(
                    f"MLflow {self.uri}: the experiment {pipeline!r} was deleted there; restore it (`mlflow experiments restore`) "
                    f"or give the pipeline another name"
                )
            self._experiments[pipeline] = (found.experiment_id, f"{found.experiment_id}:{found.creation_time}")
        return self._experiments[pipeline]

    def runs(self, pipeline: str, run: str) -> dict[str, str | None]:
        """Stage name to the id of its run, "" for the parent; None where a person deleted it."""
        found: dict[str, str | None] = {}
        token = None
        while True:
            page = self.client.search_runs(
                [self.experiment(pipeline)[0]],
                f"tags.`gptline.run` = '{run}'",
                run_view_type=3,  # deleted ones too
                page_token=token,
            )
            for each in page:
                stage = each.data.tags.get("gptline.stage", "")
                if found.get(stage) is None:
                    found[stage] = each.info.run_id if each.info.lifecycle_stage == "active" else None
            token = page.token
            if not token:
                return found

    def log(
        self,
        run_id: str,
        *,
        metrics: Iterable[Metric] = (),
        tags: dict[str, Any] | None = None,
        params: dict[str, str] | None = None,
    ) -> None:
        from mlflow.entities import Param, RunTag

        all_metrics = list(metrics)
        all_tags = [RunTag(name, str(value)[:TAG_CHARS]) for name, value in (tags or {}).items() if value not in (None, "")]
        all_params = [Param(name, value) for name, value in (params or {}).items()]
        for at in range(0, len(all_tags), 100):
            self.client.log_batch(run_id, tags=all_tags[at : at + 100])
        for at in range(0, len(all_metrics), BATCH):
            self.client.log_batch(run_id, metrics=all_metrics[at : at + BATCH])
        for at in range(0, len(all_params), 100):
            self.client.log_batch(run_id, params=all_params[at : at + 100])

    def dataset(self, run_id: str, *, name: str, digest: str, context: str, parameter: str, source: str, metadata: dict[str, Any]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        profile = {name: value for name, value in metadata.items() if isinstance(value, int | float | str)}
        dataset = Dataset(name[:500], digest[:DIGEST_CHARS], "local", json.dumps({"uri": source}), profile=json.dumps(profile))
        tags = [
            InputTag("mlflow.data.context", context),
            InputTag("gptline.digest", digest),
            InputTag("gptline.input", parameter[:500]),
        ]
        self.client.log_inputs(run_id, datasets=[DatasetInput(dataset, tags)])

    def model(self, digest: str, maker: Action | None, pipeline: str, run_id: str) -> str:
        """The id of the external model that stands for an artifact; created once per digest."""
        if digest in self._models:
            return self._models[digest]
        own = self.experiment(pipeline)[0]
        home, source_run = own, run_id
        if maker is not None and (maker.pipeline == pipeline or self.client.get_experiment_by_name(maker.pipeline) is not None):
            home = self.experiment(maker.pipeline)[0]
            source_run = self.runs(maker.pipeline, maker.run).get(maker.stage) or run_id
        with self.lock("mlflow-models"):
            found = list(self.client.search_logged_models(sorted({own, home}), f"tags.`gptline.digest` = '{digest}'"))
            if found:
                model = found[0]
            else:
                manifest = self._store.manifest(digest) or {"metadata": {}}
                name = re.sub(r"[/:.%\"']", "-", maker.stage if maker is not None else "model")
                params = {"digest": digest, "path": str(self._store.root.resolve() / "artifacts" / digest), **_flat(manifest["metadata"])}
                model = self.client.create_logged_model(
                    home,
                    name=name,
                    source_run_id=source_run,
                    tags={
                        "gptline.digest": digest,
                        "mlflow.model.isExternal": "true",
                        **({"gptline.key": maker.key, "gptline.made_by_run": maker.run} if maker is not None else {}),
                    },
                    params=dict(list(params.items())[:100]),
                    model_type=str(manifest["metadata"].get("role", "model")),
                )
            if str(model.status) != "READY":
                self.client.finalize_logged_model(model.model_id, "READY")
        self._models[digest] = model.model_id
        return model.model_id


class Sender:
    """Brings one run's journal to one MLflow. Several may do so at once, and again: nothing is doubled."""

    def __init__(self, store: Store, run: str, uri: str, door: _Door | None = None) -> None:
        self._store = store
        self.run = run
        self.uri = uri = _known_as(uri, store)
        self.view = RunView(run)
        self._reader = JournalReader(store, run)
        self._waiting: list[tuple[int, Event]] = []
        self._door = door
        self._ids: dict[str, str | None] | None = None
        self._makers: dict[str, Action] | None = None
        self._state = _read_state(store, run, uri)

    def deliver(self, again: bool = False) -> Delivery:
        """Send what MLflow doesn't have yet; with `again` everything, whatever the cursor says. Never raises."""
        self._take_in()
        if not self._waiting and not again:
            return Delivery(0, 0)
        sent = 0
        why = unreachable(resolve_uri(self.uri, self._store.root))
        if why is not None:
            return self._failed(sent, _kept(self.uri, why))
        try:
            with _locked(self._store.root / f"{_place(self.run, self.uri)}.lock"):
                self._open(again)
                for batch in self._batches():
                    self._send([event for _, event in batch])
                    sent += len(batch)
                    self._state.segments = max(self._state.segments, batch[-1][0])
                    self._state.error = None
                    self._save()
                    del self._waiting[: len(batch)]
        except Exception as error:  # a view that fails must not fail what it shows
            self._ids = None
            return self._failed(sent, self._sentence(error))
        return Delivery(sent, 0)

    def verify(self) -> None:
        """Forget the cursor if the experiment it speaks of is not there any more. For runs that look delivered; may raise."""
        if self._state.segments and self._state.pipeline:
            self._door = self._door or _Door(self._store, self.uri)
            if self._door.experiment(self._state.pipeline)[1] != self._state.view:
                self._state = _State()
                self._save()

    def _take_in(self) -> None:
        for event in self._reader.read():
            self.view.add(event)
            self._waiting.append((self._reader.cursor, event))
        self._waiting = [(segment, event) for segment, event in self._waiting if segment > self._state.segments]

    def _open(self, again: bool) -> None:
        """Under the lock: look at what another sender did meanwhile, and whether MLflow is still the one we knew."""
        self._state = _read_state(self._store, self.run, self.uri)
        self._door = self._door or _Door(self._store, self.uri)
        pipeline = self.view.pipeline or str(self._info().get("pipeline") or "unnamed")
        identity = self._door.experiment(pipeline)[1]
        if again or (self._state.view and self._state.view != identity):
            self._state = _State()
            self._reader, self.view, self._waiting = JournalReader(self._store, self.run), RunView(self.run), []
            self._take_in()
        self._state.pipeline, self._state.view = pipeline, identity
        self._waiting = [(segment, event) for segment, event in self._waiting if segment > self._state.segments]
        if self._ids is None:
            self._ids = self._door.runs(pipeline, self.run)

    def _batches(self) -> Iterator[list[tuple[int, Event]]]:
        """Whole segments, some thousand points at a time; the cursor moves after each."""
        batch: list[tuple[int, Event]] = []
        points = 0
        for segment, event in list(self._waiting):
            if points >= 5 * BATCH and segment != batch[-1][0]:
                yield batch
                batch, points = [], 0
            batch.append((segment, event))
            points += len(event.get("points", ()))
        if batch:
            yield batch

    def _send(self, events: list[Event]) -> None:
        """Points wait for company; everything else goes in its order."""
        pending: dict[str, list[list[Any]]] = {}
        for event in events:
            if event["type"] == "points":
                pending.setdefault(event["stage"], []).extend(event["points"])
                continue
            if event["type"] in ("stage_ended", "run_ended"):
                self._send_points(pending)
            self._taken(self._handle, event)
        self._send_points(pending)
        if any(event["type"] not in ("points", "progress", "note") for event in events) and (parent := self._parent()) is not None:
            self._taken(self._opened.log, parent, tags={"mlflow.note.content": self._note()})

    @property
    def _opened(self) -> _Door:
        assert self._door is not None
        return self._door

    def _taken(self, call: Callable[..., None], *arguments: Any, **named: Any) -> None:
        """Call; what MLflow will refuse for ever is written down and stepped over, or one bad name would hold back all that follows."""
        from mlflow.exceptions import MlflowException

        try:
            call(*arguments, **named)
        except MlflowException as error:
            if error.error_code not in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST"):
                raise
            self._state.refused.append(str(error)[:500])

    def _send_points(self, pending: dict[str, list[list[Any]]]) -> None:
        for stage, points in pending.items():
            run_id = self._child(stage)
            if run_id is not None:
                self._taken(
                    self._opened.log, run_id, metrics=[_metric(name, value, time_ms, step) for name, step, value, time_ms in points]
                )
        pending.clear()

    def _handle(self, event: Event) -> None:
        match event["type"]:
            case "run_started":
                self._parent()
            case "stage_started":
                run_id = self._child(event["stage"])
                if run_id is not None:
                    self._opened.log(run_id, tags=self._stage_tags(event), params=self._stage_params(event["stage"]))
            case "stage_ended" if event["status"] in STATUS:
                self._end_stage(event)
            case "run_ended":
                self._end_run(event)

    def _info(self) -> dict[str, Any]:
        return _run_info(self._store, self.run)

    def _parent(self) -> str | None:
        assert self._ids is not None
        if "" not in self._ids:
            info = self._info()
            git = info.get("git") or {}
            config = info.get("config") or {}
            tags = {
                "gptline.run": self.run,
                "gptline.pipeline": self._state.pipeline,
                "gptline.command": info.get("command"),
                "gptline.snapshot": info.get("snapshot"),
                "gptline.host": info.get("host") or self.view.host,
                "mlflow.user": info.get("user") or self.view.user,
                "mlflow.source.name": info.get("command"),
                "mlflow.source.type": "LOCAL",
                "mlflow.source.git.commit": git.get("commit"),
                "mlflow.source.git.branch": git.get("branch"),
                "mlflow.source.git.repoURL": git.get("url") or git.get("repo"),
                "mlflow.source.git.dirty": None if git.get("dirty") is None else str(git["dirty"]).lower(),
            }
            self._ids[""] = made = self._create(self.run, self.view.started_ms or info.get("started_ms"), tags)
            self._artifact(made, json.dumps(config, indent=1, ensure_ascii=False, sort_keys=True), "config.json")
            self._opened.log(made, params=_flat({name: value for name, value in config.items() if not isinstance(value, dict | list)}))
        parent = self._ids[""]
        self._state.parent = parent or ""
        return parent

    def _child(self, stage: str) -> str | None:
        parent = self._parent()
        assert self._ids is not None
        if parent is not None and stage not in self._ids:
            known = self.view.stage(stage)
            tags = {"mlflow.parentRunId": parent, "gptline.run": self.run, "gptline.stage": stage, "mlflow.user": self.view.user}
            tags |= {"mlflow.source.name": self.view.command, "mlflow.source.type": "LOCAL"}
            self._ids[stage] = self._create(stage, known.started_ms or known.ended_ms, tags)
        return self._ids.get(stage) if parent is not None else None

    def _create(self, name: str, started_ms: int | None, tags: dict[str, Any]) -> str:
        experiment = self._opened.experiment(self._state.pipeline)[0]
        given = {tag: str(value)[:TAG_CHARS] for tag, value in tags.items() if value not in (None, "")}
        return self._opened.client.create_run(experiment, start_time=started_ms, tags=given, run_name=name).info.run_id

    def _stage_tags(self, event: Event) -> dict[str, Any]:
        return {
            "gptline.stage": event["stage"],
            "gptline.decision": event.get("decision"),
            "gptline.reason": event.get("reason"),
            "gptline.key": event.get("key"),
        }

    def _stage_params(self, stage: str) -> dict[str, str]:
        settings = ((self._info().get("config") or {}).get("stages") or {}).get(stage) or {}
        return _flat({name: value for name, value in settings.items() if name != "inputs"})

    def _end_stage(self, event: Event) -> None:
        stage = event["stage"]
        run_id = self._child(stage)
        if run_id is None:
            return
        tags = self._stage_tags(event)
        tags["gptline.error"] = event.get("error")
        tags["gptline.status"] = event["status"]
        action = self._action(event)
        if action is not None:
            tags |= self._action_tags(action)
        tags["mlflow.note.content"] = self._child_note(self.view.stage(stage), action, tags.get("gptline.made_by_mlflow_run"))
        self._opened.log(run_id, tags=tags)
        if action is not None:
            self._log_action(run_id, stage, action)
        self._opened.log(run_id, params=self._stage_params(stage))
        self._opened.client.set_terminated(run_id, STATUS[event["status"]], event["time_ms"])

    def _action(self, event: Event) -> Action | None:
        if event.get("key") and event.get("number") is not None:
            with suppress(KeyError):
                return self._store.action(event["key"], event["number"])
        if event.get("status") == "reused" and event.get("output"):  # an artifact that the command line named
            return self._maker(event["output"])
        return None

    def _action_tags(self, action: Action) -> dict[str, Any]:
        tags: dict[str, Any] = {
            "gptline.action": f"{action.key}/{action.number}",
            "gptline.kind": action.kind,
            "gptline.output": action.output,
            "gptline.code": code_digest(action),
            "gptline.restarts": action.restarts or None,
            "gptline.resumed_from_step": action.resumed_from_step,
        }
        for name, digests in action.inputs.items():
            for at, digest in enumerate(digests):
                tags[f"gptline.in.{name}" if len(digests) == 1 else f"gptline.in.{name}.{at}"] = digest
        tags |= {f"gptline.version.{_name(name)}": version for name, version in action.versions.items()}
        if action.run != self.run:
            tags["gptline.made_by_run"] = action.run
            maker = self._opened.runs(action.pipeline, action.run).get(action.stage) if self._known_pipeline(action.pipeline) else None
            tags["gptline.made_by_mlflow_run"] = maker
            tags |= {f"gptline.made_with.{_name(name)}": value for name, value in _flat(action.operational).items()}
        return tags

    def _known_pipeline(self, pipeline: str) -> bool:
        return pipeline == self._state.pipeline or self._opened.client.get_experiment_by_name(pipeline) is not None

    def _log_action(self, run_id: str, stage: str, action: Action) -> None:
        """What a stage read, made and measured: the same for one that ran and for one that was reused."""
        from mlflow.entities import LoggedModelInput, LoggedModelOutput

        door = self._opened
        models_in: list[str] = []
        for name, digests in action.inputs.items():
            for digest in digests:
                if (self._store.manifest(digest) or {}).get("kind") == "model":
                    models_in.append(door.model(digest, self._maker(digest), self._state.pipeline, run_id))
                else:
                    self._dataset(run_id, digest, "input", name)
        self._sources(run_id, action)
        if models_in:
            door.client.log_inputs(run_id, models=[LoggedModelInput(each) for each in dict.fromkeys(models_in)])
        model = models_in[0] if len(models_in) == 1 else None
        if action.output_kind == "model":
            model = door.model(action.output, action, self._state.pipeline, run_id)
            outputs = door.client.get_run(run_id).outputs
            if model not in {each.model_id for each in (outputs.model_outputs if outputs else [])}:  # a second time would raise
                last = max((point[0] for points in action.curves.values() for point in points), default=0)
                door.client.log_outputs(run_id, [LoggedModelOutput(model, last)])
        else:
            self._dataset(run_id, action.output, "output", "output")
        seen = {name: {step for step, _, _ in points} for name, points in self.view.stage(stage).curves.items()}
        curves = [
            _metric(name, value, time_ms, step)
            for name, points in action.curves.items()
            for step, value, time_ms in points
            if step not in seen.get(name, ())
        ]
        ended_ms = action.started_ms + round(1000 * action.seconds)
        figures = {"time/stage_s": action.seconds, **action.figures}
        singles = [
            _metric(name, value, ended_ms, 0, model) for name, value in figures.items() if name not in action.curves and name not in seen
        ]
        door.log(run_id, metrics=[*curves, *singles])

    def _maker(self, digest: str) -> Action | None:
        """The newest action that made an artifact."""
        if self._makers is None or digest not in self._makers:
            self._makers = {}
            for action in self._store.all_actions():
                known = self._makers.get(action.output)
                if known is None or action.started_ms >= known.started_ms:
                    self._makers[action.output] = action
        return self._makers.get(digest)

    def _dataset(self, run_id: str, digest: str, context: str, parameter: str) -> None:
        manifest = self._store.manifest(digest) or {"kind": "artifact", "metadata": {}}
        maker = self._maker(digest)
        self._opened.dataset(
            run_id,
            name=f"{manifest['kind']}:{maker.stage}" if maker is not None else manifest["kind"],
            digest=digest,
            context=context,
            parameter=parameter,
            source=str(self._store.root.resolve() / "artifacts" / digest),
            metadata=manifest["metadata"],
        )

    def _sources(self, run_id: str, action: Action) -> None:
        sources = {name.removeprefix("source."): str(value) for name, value in action.leaves.items() if name.startswith("source.")}
        if len(sources) > MOST_SOURCES:
            digest = hashlib.sha256(canonical_json(sources)).hexdigest()
            sources = {f"{len(sources)} files": digest}
        for name, digest in sources.items():
            self._opened.dataset(
                run_id, name=f"source:{name}", digest=digest, context="source", parameter="source", source=name, metadata={}
            )

    def _end_run(self, event: Event) -> None:
        parent = self._parent()
        if parent is None:
            return
        for stage in self.view.stages.values():
            if stage.status == "running" and (child := self._child(stage.name)) is not None:
                self._opened.client.set_terminated(child, "KILLED", event["time_ms"])
        figures: dict[str, list[float]] = {}
        digests = []
        for stage in self.view.stages.values():
            if stage.output:
                digests.append(stage.output)
            action = self._action({"key": stage.key, "number": stage.number, "status": stage.status, "output": stage.output})
            if action is not None:
                for name, value in action.figures.items():
                    if name.startswith("eval/"):
                        figures.setdefault(name, []).append(value)
        only = [_metric(name, values[0], event["time_ms"], 0) for name, values in figures.items() if len(values) == 1]
        self._opened.log(parent, metrics=only, tags={"gptline.text": event.get("text"), "gptline.exit_code": event.get("exit_code")})
        self._artifact(parent, render(self._store, self.run), "page.html")
        lineage = trace_all(self._store, digests, downstream=False)
        self._artifact(parent, as_mermaid(lineage), "lineage.mmd")
        self._artifact(parent, as_html(lineage), "lineage.html")
        self._opened.client.set_terminated(parent, event["status"], event["time_ms"])

    def _artifact(self, run_id: str, text: str, name: str) -> None:
        """An artifact store that refuses, while the server itself answers, costs that file alone."""
        try:
            self._opened.client.log_text(run_id, text, name)
        except Exception as error:
            if unreachable(self._opened.uri) is not None:
                raise
            self._state.refused.append(f"{name}: {error}"[:500])

    def _note(self) -> str:
        """The parent's description: a row for every stage, since the page itself lists only the ten newest children."""
        assert self._ids is not None
        experiment = self._opened.experiment(self._state.pipeline)[0]
        for reason_chars in (200, 80, 0):
            rows = ["| stage | decision | why | seconds | output |", "| --- | --- | --- | ---: | --- |"]
            for stage in self.view.stages.values():
                run_id = self._ids.get(stage.name)
                link = f"#/experiments/{experiment}/runs/{run_id}?workflowType=machine_learning"
                name = f"[{stage.name}]({link})" if run_id else stage.name
                ended = "" if stage.status in ("planned", "running", "done", "reused", "blocked") else f", {stage.status}"
                seconds = "" if stage.seconds is None else f"{stage.seconds:.1f}"
                why = _cell(stage.error or stage.reason)[:reason_chars]
                rows.append(f"| {name} | {stage.decision}{ended} | {why} | {seconds} | {stage.output[:12]} |")
            note = "\n".join(rows)
            if len(note) <= NOTE_CHARS:
                break
        return note

    def _child_note(self, stage: StageView, action: Action | None, maker: str | None) -> str:
        parts = [f"**{stage.decision}**: {stage.reason}" if stage.reason else f"**{stage.decision}**", stage.error]
        if action is not None and action.run != self.run:
            link = (
                f"#/experiments/{self._opened.experiment(action.pipeline)[0]}/runs/{maker}?workflowType=machine_learning" if maker else ""
            )
            parts.append(f"made by [{action.run}]({link})" if link else f"made by {action.run}")
        parts += [f"- {note}" for note in stage.notes]
        return "\n\n".join(part for part in parts if part)[:NOTE_CHARS]

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
        return Delivery(sent, len(self._waiting), sentence)

    def _save(self) -> None:
        _write_state(self._store, self.run, self.uri, self._state)


def _metric(name: str, value: float | None, time_ms: int, step: int, model_id: str | None = None) -> Metric:
    from mlflow.entities import Metric

    return Metric(posixpath.normpath(_name(name)), float("nan") if value is None else float(value), int(time_ms), int(step), model_id)


def _name(name: str) -> str:
    """MLflow takes letters, digits and `_ - . : / space` in names."""
    return re.sub(r"[^A-Za-z0-9_\-. :/]", "_", name)[:250]


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as params: `files.0`, `resources.ranks`."""
    flat: dict[str, str] = {}
    for name, value in settings.items():
        path = f"{prefix}{name}"
        if isinstance(value, dict):
            flat |= _flat(value, f"{path}.")
        elif isinstance(value, list | tuple):
            flat |= _flat({str(at): each for at, each in enumerate(value)}, f"{path}.")
        elif value is not None:
            flat[_name(path).strip("/. ")] = (value if isinstance(value, str) else json.dumps(value))[:PARAM_CHARS]
    return flat


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def sync(store: Store, uri: str | None, dead: Iterable[str] = (), again: bool = False) -> list[str]:
    """Deliver what MLflow lacks of every run, oldest first; report lines for people.

    Each run goes to the MLflow that it was started with; a `uri` takes the place of them all. `dead` names runs whose driver is gone
    without a last word: they are ended as KILLED first. `again` sends everything anew.
    """
    lines = []
    for run in dead:
        with suppress(Superseded):
            JournalWriter(store, run).write("run_ended", status="KILLED", exit_code=None, text="its driver is gone")
            lines.append(f"{run}  ended as KILLED: its driver is gone")
    runs: dict[str, list[str]] = {}
    for run in store.runs():
        if next(JournalReader(store, run).read(), None) is not None:
            runs.setdefault(_own_uri(store, run) if uri is None else _known_as(uri, store), []).append(run)
    if not runs:
        lines.append(f"the store {store.root} has no runs yet")
    for each, theirs in runs.items():
        lines += _sync_with(store, each, theirs, again)
    return lines


def _sync_with(store: Store, uri: str, runs: list[str], again: bool) -> list[str]:
    why = unreachable(resolve_uri(uri, store.root))
    if why is not None:
        return [_kept(uri, why)]
    lines = []
    try:
        door = _Door(store, uri)
        for run in runs:
            sender = Sender(store, run, uri, door)
            sender.verify()
            delivery = sender.deliver(again)
            if delivery.sent:
                lines.append(f"{run}  {delivery.sent:,} events delivered")
            if delivery.error is not None:
                return [*lines, delivery.error]
            lines += [f"{run}  MLflow refused: {words}" for words in _read_state(store, run, uri).refused]
    except Exception as error:
        return [*lines, f"MLflow {uri} can't be opened ({error}); mend that and run `gptline sync` again"]
    return [*lines, f"MLflow {uri} has all of {len(runs)} run{'s' if len(runs) != 1 else ''}"]


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

    def url(self) -> str | None:
        """Where the run is seen, once its parent run exists."""
        state = _read_state(self._store, self._run, self._uri)
        return f"{self._uri.rstrip('/')}/{_fragment(state)}" if state.parent and self._uri.startswith("http") else None

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
    environment = {**_ENVIRONMENT, **os.environ}
    home = str(Path(__file__).resolve().parents[1])
    environment["PYTHONPATH"] = os.pathsep.join(path for path in (home, environment.get("PYTHONPATH")) if path)
    log = store.root / f"{_place(run, uri)}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "pipelines.tracking", str(store.root), run, uri, "--driver", str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,  # Ctrl-C at the terminal is the driver's business; the last words must still be sent
        )
    return Tracker(store, run, uri, process)


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
    behind = [other for other, own in theirs.items() if not _caught_up(store, other, _read_state(store, other, own))]
    silent = {own for own in {theirs[other] for other in behind} if unreachable(resolve_uri(own, store.root)) is not None}
    for other in behind:
        if theirs[other] not in silent:
            Sender(store, other, theirs[other]).deliver()


def _fragment(state: _State) -> str:
    return f"#/experiments/{state.view.split(':')[0]}/runs/{state.parent}?workflowType=machine_learning"


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
        ui_command(store, databases[0], port), env={**_ENVIRONMENT, **os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
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


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pipelines.tracking", description="Send one run to MLflow while it happens.")
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


if __name__ == "__main__":
    main()
