"""The one door to MLflow, and how a run looks there. What the journal says is the truth; MLflow is a view that may die and come back.

    delivery.py --> RunInMlflow: events become runs, metrics, datasets, models, versions --> Door: an MlflowClient --> MLflow

Events may come twice, from several processes at once, and each thing is in MLflow once all the same, because MLflow drops an exact
repeat of (key, time, step, value) and because everything else is looked up by its `gptline.*` tags before it is created.

Experiment = pipeline; parent run = one `gptline run`; child run = stage, a reused one too, with the curves of the action it
reuses. A blocked stage has no child, since nothing happened there; it is a row of the parent's table.
Registered model = pipeline; its versions are the assistants that the runs ended with, each once per digest, and the alias `newest` is
on the one that `model:<pipeline>@newest` means. Base models and reward models are logged, not registered.
Leaves out: uploading weights (models are external: a digest and a path into the store).
"""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import json
import os
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from cluster.commit import canonical_json
from cluster.events import Curves, Point
from pipelines.observe.lineage import as_html, as_mermaid, code_digest, trace_all
from pipelines.observe.page import render
from pipelines.observe.view import RunView, StageView
from pipelines.store.action import Action
from pipelines.store.events import JournalEvent, Note, RunEnded, RunStarted, StageEnded, StagePoints, StageProgress, StageStarted
from pipelines.store.runs import RunRecord
from pipelines.store.store import Store

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric
    from mlflow.entities.model_registry import ModelVersion

BATCH = 1000
"""Metrics a call: MLflow's own limit."""
PARAM_CHARS, TAG_CHARS, NOTE_CHARS, DIGEST_CHARS = 6000, 8000, 7900, 36
CONNECT_S, ANSWER_S = 2.0, 5.0
MOST_SOURCES = 20
"""More source files than this are shown as one dataset."""
STATUS = {"done": "FINISHED", "reused": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}

ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # with the default of 7 one call to a dead server blocks for 246 s
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_ALLOW_MODEL_CODE_EXECUTION": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
}
"""What MLflow reads when it is imported; a person's own environment goes before it."""


def resolve_uri(uri: str, store: Store) -> str:
    """`sqlite` is the store's own database; anything else is an address already."""
    return f"sqlite:///{store.machine_file('mlflow.db').resolve()}" if uri == "sqlite" else uri


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


class RunInMlflow:
    """One run as MLflow shows it: a parent, and a child for each stage that something happened to.

    It takes up what MLflow has of the run already. What a person deleted there stays deleted.
    """

    def __init__(self, door: Door, store: Store, view: RunView, pipeline: str, record: RunRecord) -> None:
        """`view` has seen each event before it is shown."""
        self._door = door
        self._store = store
        self._view = view
        self._pipeline = pipeline
        self._record = record
        self._ids: dict[str, str | None] = {}
        self._makers: dict[str, Action | None] = {}
        self._refused: list[str] = []

    def show(self, events: list[JournalEvent]) -> list[str]:
        """Add what `events` say: points are sent together, everything else in its order.

        Returns what MLflow rejects for good, in its own words. Raises what the client raises when MLflow can't be reached.
        """
        self._refused = []
        changed = any(not isinstance(event, StagePoints | StageProgress | Note) for event in events)
        if changed or any(getattr(event, "stage", "") not in self._ids for event in events):
            self._ids |= self._door.runs(self._pipeline, self._view.run)  # since the last call another sender may have created some
        parent = self._parent()
        if parent is None:
            return []
        pending: dict[str, Curves] = {}
        for event in events:
            if isinstance(event, StagePoints):
                for metric, points in event.curves.items():
                    pending.setdefault(event.stage, {}).setdefault(metric, []).extend(points)
                continue
            if isinstance(event, StageEnded | RunEnded):
                self._log_points(pending)
            self._taken(self._add, parent, event)
        self._log_points(pending)
        if changed:
            self._taken(self._door.log, parent, tags={"mlflow.note.content": self._note()})
        return self._refused

    def _taken(self, call: Callable[..., None], *arguments: Any, **named: Any) -> None:
        """Call; what MLflow will refuse for ever is written down and stepped over, or one bad name would hold back all that follows."""
        from mlflow.exceptions import MlflowException

        try:
            call(*arguments, **named)
        except MlflowException as error:
            if error.error_code not in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST"):
                raise
            self._refused.append(str(error)[:500])

    def _log_points(self, pending: dict[str, Curves]) -> None:
        for stage, curves in pending.items():
            run_id = self._child(stage)
            if run_id is not None:
                metrics = [_metric(name, point) for name, points in curves.items() for point in points]
                self._taken(self._door.log, run_id, metrics=metrics)
        pending.clear()

    def _add(self, parent: str, event: JournalEvent) -> None:
        match event:
            case RunStarted():
                self._start_run(parent)
            case StageStarted():
                run_id = self._child(event.stage)
                if run_id is not None:
                    self._door.log(run_id, tags=self._stage_tags(event), params=self._stage_params(event.stage))
            case StageEnded() if event.status in STATUS:
                self._end_stage(event)
            case RunEnded():
                self._end_run(parent, event)

    def _parent(self) -> str | None:
        if "" not in self._ids:
            record = self._record
            git = record.git or {}
            tags = {
                "gptline.run": self._view.run,
                "gptline.pipeline": self._pipeline,
                "gptline.command": record.command,
                "gptline.snapshot": record.snapshot,
                "gptline.host": record.host or self._view.host,
                "mlflow.user": record.user or self._view.user,
                "mlflow.source.name": record.command,
                "mlflow.source.type": "LOCAL",
                "mlflow.source.git.commit": git.get("commit"),
                "mlflow.source.git.branch": git.get("branch"),
                "mlflow.source.git.dirty": None if git.get("dirty") is None else str(git["dirty"]).lower(),
            }
            self._ids[""] = self._door.create_run(self._pipeline, self._view.run, self._view.started_ms or record.started_ms, tags)
        return self._ids[""]

    def _child(self, stage: str) -> str | None:
        if stage not in self._ids:
            known = self._view.stage(stage)
            tags = {
                "mlflow.parentRunId": self._ids[""],
                "gptline.run": self._view.run,
                "gptline.stage": stage,
                "mlflow.user": self._view.user,
                "mlflow.source.name": self._view.command,
                "mlflow.source.type": "LOCAL",
            }
            self._ids[stage] = self._door.create_run(self._pipeline, stage, known.started_ms or known.ended_ms, tags)
        return self._ids[stage]

    def _start_run(self, parent: str) -> None:
        config = self._record.config
        self._artifact(parent, json.dumps(config, indent=1, ensure_ascii=False, sort_keys=True), "config.json")
        self._door.log(parent, params=_flat({name: value for name, value in config.items() if not isinstance(value, dict | list)}))

    def _stage_tags(self, event: StageStarted | StageEnded) -> dict[str, Any]:
        return {
            "gptline.stage": event.stage,
            "gptline.decision": event.decision,
            "gptline.reason": event.reason,
            "gptline.key": event.key,
        }

    def _stage_params(self, stage: str) -> dict[str, str]:
        settings = (self._record.config.get("stages") or {}).get(stage) or {}
        return _flat({name: value for name, value in settings.items() if name != "inputs"})

    def _end_stage(self, event: StageEnded) -> None:
        stage = event.stage
        run_id = self._child(stage)
        if run_id is None:
            return
        tags = self._stage_tags(event)
        tags["gptline.error"] = event.error
        tags["gptline.status"] = event.status
        action = self._action(event)
        if action is not None:
            tags |= self._action_tags(action)
        tags["mlflow.note.content"] = self._child_note(self._view.stage(stage), action, tags.get("gptline.made_by_mlflow_run"))
        self._door.log(run_id, tags=tags)
        if action is not None:
            self._log_measures(run_id, stage, action, self._log_artifacts(run_id, action))
        self._door.log(run_id, params=self._stage_params(stage))
        self._door.client.set_terminated(run_id, STATUS[event.status], event.time_ms)

    def _action(self, ended: StageEnded | StageView) -> Action | None:
        """The action behind an ended stage."""
        if ended.key and ended.number is not None:
            with suppress(KeyError):
                return self._store.action(ended.key, ended.number)
        if ended.status == "reused" and ended.output:  # an artifact that the command line named
            return self._maker(ended.output)
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
        if action.run != self._view.run:
            tags["gptline.made_by_run"] = action.run
            tags["gptline.made_by_mlflow_run"] = self._door.maker_run(action)
            tags |= {f"gptline.made_with.{_name(name)}": value for name, value in _flat(action.operational).items()}
        return tags

    def _log_artifacts(self, run_id: str, action: Action) -> str | None:
        """What a stage read and made. Returns the model that its figures speak of.

        That is the one it made; else the one that its parameter `model` was given, beside which others serve it; else the only one.
        """
        from mlflow.entities import LoggedModelInput, LoggedModelOutput

        client = self._door.client
        models: dict[str, str] = {}
        for name, digests in action.inputs.items():
            for digest in digests:
                if (self._store.manifest(digest) or {}).get("kind") == "model":
                    models[digest] = self._door.model(digest, self._maker(digest), self._pipeline, run_id)
                else:
                    self._dataset(run_id, digest, "input", name)
        self._sources(run_id, action)
        if models:
            client.log_inputs(run_id, models=[LoggedModelInput(each) for each in models.values()])
        if action.output_kind != "model":
            self._dataset(run_id, action.output, "output", "output")
            measured = action.inputs.get("model") or list(models)
            return models.get(measured[0]) if len(measured) == 1 else None
        model = self._door.model(action.output, action, self._pipeline, run_id)
        outputs = client.get_run(run_id).outputs
        if model not in {each.model_id for each in (outputs.model_outputs if outputs else [])}:  # a second time would raise
            last = max((point.step for points in action.curves.values() for point in points), default=0)
            client.log_outputs(run_id, [LoggedModelOutput(model, last)])
        return model

    def _log_measures(self, run_id: str, stage: str, action: Action, model: str | None) -> None:
        """Figures, and of the curves what the journal doesn't have: nothing of a stage that ran here, all of a reused one."""
        seen = {name: {point.step for point in points} for name, points in self._view.stage(stage).curves.items()}
        curves = [
            _metric(name, point) for name, points in action.curves.items() for point in points if point.step not in seen.get(name, ())
        ]
        ended_ms = action.started_ms + round(1000 * action.seconds)
        figures = {"time/stage_s": action.seconds, **action.figures}
        singles = [
            _metric(name, Point(0, value, ended_ms), model if name in action.figures else None)
            for name, value in figures.items()
            if name not in action.curves and name not in seen
        ]
        self._door.log(run_id, metrics=[*curves, *singles])

    def _maker(self, digest: str) -> Action | None:
        """The newest action that made an artifact."""
        if self._makers.get(digest) is None:
            self._makers[digest] = next(iter(self._store.index.makers(digest)), None)
        return self._makers[digest]

    def _dataset(self, run_id: str, digest: str, context: str, parameter: str) -> None:
        manifest = self._store.manifest(digest) or {"kind": "artifact", "metadata": {}}
        maker = self._maker(digest)
        self._door.dataset(
            run_id,
            name=f"{manifest['kind']}:{maker.stage}" if maker is not None else manifest["kind"],
            digest=digest,
            context=context,
            parameter=parameter,
            source=str(self._store.artifact_folder(digest).resolve()),
            metadata=manifest["metadata"],
        )

    def _sources(self, run_id: str, action: Action) -> None:
        sources = action.sources()
        if len(sources) > MOST_SOURCES:
            digest = hashlib.sha256(canonical_json(sources)).hexdigest()
            sources = {f"{len(sources)} files": digest}
        for name, digest in sources.items():
            self._door.dataset(run_id, name=f"source:{name}", digest=digest, context="source", parameter="source", source=name, metadata={})

    def _end_run(self, parent: str, event: RunEnded) -> None:
        for stage in self._view.stages.values():
            if stage.status == "killed" and (child := self._child(stage.name)) is not None:
                self._door.client.set_terminated(child, "KILLED", event.time_ms)
        figures: dict[str, list[float]] = {}
        digests = []
        for stage in self._view.stages.values():
            if stage.output:
                digests.append(stage.output)
            action = self._action(stage)
            if action is not None:
                for name, value in action.figures.items():
                    if name.startswith("eval/"):
                        figures.setdefault(name, []).append(value)
        only = [_metric(name, Point(0, values[0], event.time_ms)) for name, values in figures.items() if len(values) == 1]
        self._door.log(parent, metrics=only, tags={"gptline.text": event.text, "gptline.exit_code": event.exit_code})
        self._artifact(parent, render(self._store, self._view.run), "page.html")
        lineage = trace_all(self._store, digests, downstream=False)
        self._artifact(parent, as_mermaid(lineage), "lineage.mmd")
        self._artifact(parent, as_html(lineage), "lineage.html")
        if event.status != "KILLED":
            self._taken(self._register, parent)
        self._door.client.set_terminated(parent, event.status, event.time_ms)

    def _register(self, parent: str) -> None:
        """The last policy of the line becomes a version, if it is an assistant; `newest` goes where the store says, if to a version."""
        manifests = [(stage.output, self._store.manifest(stage.output)) for stage in self._view.stages.values() if stage.output]
        policies = [(digest, found["metadata"]) for digest, found in manifests if found and found["metadata"].get("role") == "policy"]
        if policies and policies[-1][1].get("chat_format"):  # stages stand in the order of the line
            digest = policies[-1][0]
            model = self._door.model(digest, self._maker(digest), self._pipeline, parent)
            self._door.register(self._pipeline, model, digest, self._view.run)
        self._door.name_newest(self._pipeline)

    def _artifact(self, run_id: str, text: str, name: str) -> None:
        """An artifact store that refuses, while the server itself answers, costs that file alone."""
        try:
            self._door.client.log_text(run_id, text, name)
        except Exception as error:
            if unreachable(self._door.uri) is not None:
                raise
            self._refused.append(f"{name}: {error}"[:500])

    def _note(self) -> str:
        """The parent's description: a row for every stage, since the page itself lists only the ten newest children."""
        experiment = self._door.experiment(self._pipeline)[0]
        for reason_chars in (200, 80, 0):
            rows = ["| stage | decision | why | seconds | output |", "| --- | --- | --- | ---: | --- |"]
            for stage in self._view.stages.values():
                run_id = self._ids.get(stage.name)
                name = _link(stage.name, experiment, run_id) if run_id else stage.name
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
        if action is not None and action.run != self._view.run:
            parts.append(f"made by {_link(action.run, self._door.experiment(action.pipeline)[0], maker) if maker else action.run}")
        parts += [f"- {note}" for note in stage.notes]
        return "\n\n".join(part for part in parts if part)[:NOTE_CHARS]


class Door:
    """An opened MlflowClient and what is looked up once. Every call names its run; nothing is ambient."""

    def __init__(self, store: Store, uri: str) -> None:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient

        self.uri = resolve_uri(uri, store)
        self._store = store
        self._experiments: dict[str, tuple[str, str]] = {}
        self._models: dict[str, str] = {}
        with self.lock("mlflow"):  # a fresh database migrates when it is first opened, and two migrations at once both fail
            self.client: MlflowClient = MlflowClient(self.uri)
            self.client.get_experiment_by_name("Default")

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """One process at a time in this store; the lock ends with its holder, however that ends."""
        path = self._store.machine_file(f"{name}.lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def experiment(self, pipeline: str) -> tuple[str, str]:
        """Its id, and what tells it from another of the same name."""
        from mlflow.exceptions import MlflowException

        if pipeline not in self._experiments:
            found = self.client.get_experiment_by_name(pipeline)
            if found is None:
                place = (
                    self._store.machine_file(f"mlflow-artifacts/{pipeline}").resolve().as_uri() if self.uri.startswith("sqlite:") else None
                )
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

    def maker_run(self, action: Action) -> str | None:
        """The run of the stage that carried an action out; None where this MLflow lacks it."""
        if not self._has(action.pipeline):
            return None
        return self.runs(action.pipeline, action.run).get(action.stage)

    def _has(self, pipeline: str) -> bool:
        return pipeline in self._experiments or self.client.get_experiment_by_name(pipeline) is not None

    def create_run(self, pipeline: str, name: str, started_ms: int | None, tags: dict[str, Any]) -> str:
        given = {tag: str(value)[:TAG_CHARS] for tag, value in tags.items() if value not in (None, "")}
        return self.client.create_run(self.experiment(pipeline)[0], start_time=started_ms, tags=given, run_name=name).info.run_id

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

        dataset = Dataset(name[:500], digest[:DIGEST_CHARS], "local", json.dumps({"uri": source}), profile=json.dumps(metadata))
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
        home = self.experiment(maker.pipeline)[0] if maker is not None and self._has(maker.pipeline) else own
        source_run = (self.maker_run(maker) if maker is not None else None) or run_id
        with self.lock("mlflow-models"):
            found = list(self.client.search_logged_models(sorted({own, home}), f"tags.`gptline.digest` = '{digest}'"))
            if found:
                model = found[0]
            else:
                manifest = self._store.manifest(digest) or {"metadata": {}}
                name = re.sub(r"[/:.%\"']", "-", maker.stage if maker is not None else "model")
                params = {"digest": digest, "path": str(self._store.artifact_folder(digest).resolve()), **_flat(manifest["metadata"])}
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

    def register(self, name: str, model_id: str, digest: str, run: str) -> None:
        """Let a logged model be a version of the registered model `name`, once per digest."""
        from mlflow.exceptions import MlflowException

        with self.lock("mlflow-models"):
            try:
                self.client.create_registered_model(name, tags={"gptline.pipeline": name})
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            model = self.client.get_logged_model(model_id)
            version = self._version(name, digest) or self.client.create_model_version(
                name,
                # Not models:/<id>: a database looks that up through the process's own tracking URI, and so it does without the run's id.
                model.artifact_location,
                run_id=model.source_run_id,
                model_id=model_id,  # without it a server refuses the source
                tags={"gptline.digest": digest, "gptline.model_id": model_id, "gptline.run": run},
                await_creation_for=0,
            )
            # A server writes this link, which the logged model's page shows; a database's client does not.
            links = json.loads(model.tags.get("mlflow.modelVersions", "[]"))
            link = {"name": name, "version": int(version.version)}
            if link not in links:
                self.client.set_logged_model_tags(model_id, {"mlflow.modelVersions": json.dumps([*links, link])})

    def name_newest(self, name: str) -> None:
        """Put the alias `newest` on the version that the store's pointer of that name means, whichever run is being sent."""
        with self.lock("mlflow-models"):
            digest = self._store.alias(name, "newest")
            version = None if digest is None else self._version(name, digest)
            if version is not None:
                self.client.set_registered_model_alias(name, "newest", str(version.version))

    def _version(self, name: str, digest: str) -> ModelVersion | None:
        """The first, should senders of two machines have made two. A database numbers with int, a server with str."""
        found = self.client.search_model_versions(f"name = '{name}' AND tags.`gptline.digest` = '{digest}'")
        return min(found, key=lambda version: int(version.version), default=None)


def _metric(name: str, point: Point, model_id: str | None = None) -> Metric:
    from mlflow.entities import Metric

    return Metric(posixpath.normpath(_name(name)), float(point.value), int(point.time_ms), int(point.step), model_id)


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


def _link(text: str, experiment: str, run_id: str) -> str:
    return f"[{text}](#/experiments/{experiment}/runs/{run_id}?workflowType=machine_learning)"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
