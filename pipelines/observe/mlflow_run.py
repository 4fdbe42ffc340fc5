"""How a run looks in MLflow. The journal is the truth; MLflow is a view of it that may be down and come back.

    delivery.py --> RunInMlflow: events become runs, metrics, datasets, models, versions --> MlflowSession --> MLflow

Events may come twice, and from several processes at once. Each thing is in MLflow once all the same: MLflow drops an exact repeat of
(key, time, step, value), and the session looks everything else up before creating it.

Experiment = pipeline; parent run = one `gptline run`; child run = stage. A reused stage has a child too, with the curves of the action it
reuses. A blocked stage has none, since nothing happened: it is a row in the parent's description. Registered model = pipeline; its versions
are the assistants that runs ended with, and the alias `newest` is on the one that `model:<pipeline>@newest` means. Base models and reward
models are logged but not registered. Weights are not uploaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from cluster.events import Curves, Point
from pipelines.observe.lineage import trace_all
from pipelines.observe.lineage_text import as_html, as_mermaid
from pipelines.observe.mlflow_action import ActionsInMlflow
from pipelines.observe.mlflow_address import unreachable
from pipelines.observe.mlflow_notes import link, run_name, source_name, stage_name, stage_note, stage_table
from pipelines.observe.mlflow_session import Measure, MlflowSession, flat
from pipelines.observe.page import render
from pipelines.observe.summary import summary_of
from pipelines.observe.view import RunView
from pipelines.store.action import Action
from pipelines.store.events import JournalEvent, Note, RunEnded, RunStarted, StageEnded, StagePoints, StageProgress, StageStarted
from pipelines.store.runs import RunRecord
from pipelines.store.store import Store

REASON_CHARS = 500
STATUS = {"done": "FINISHED", "reused": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}


@dataclass
class Refused:
    """What MLflow did not take although it could be reached."""

    requests: list[str] = field(default_factory=list)
    """Requests that it will never take, in its own words."""
    files: dict[str, str] = field(default_factory=dict)
    """Name of a file of the parent run to why it was refused. Another time it may be taken."""


class RunInMlflow:
    """One run in MLflow: a parent, and a child for each stage that something happened to.

    It continues what MLflow already has of the run. What a person deleted there stays deleted.
    """

    def __init__(self, session: MlflowSession, store: Store, view: RunView, pipeline: str, record: RunRecord) -> None:
        """`view` has seen every event before it is shown."""
        self._session = session
        self._store = store
        self._view = view
        self._pipeline = pipeline
        self._record = record
        self._ids: dict[str, str | None] = {}
        """Stage to its MLflow run, "" to the parent; None where a person deleted it."""
        self._actions = ActionsInMlflow(session, store, pipeline, view.run)
        self._refused = Refused()

    def show(self, events: list[JournalEvent]) -> Refused:
        """Add what `events` say: points together, everything else in order. Raises what the client raises if MLflow can't be reached."""
        self._refused = Refused()
        changed = any(not isinstance(event, StagePoints | StageProgress | Note) for event in events)
        if changed or any(getattr(event, "stage", "") not in self._ids for event in events):
            self._ids |= self._session.runs(self._pipeline, self._view.run)  # another sender may have created some since the last call
        parent = self._parent()
        if parent is None:
            return self._refused
        pending: dict[str, Curves] = {}
        for event in events:
            if isinstance(event, StagePoints):
                for metric, points in event.curves.items():
                    pending.setdefault(event.stage, {}).setdefault(metric, []).extend(points)
                continue
            if isinstance(event, StageEnded | RunEnded):
                self._log_points(pending)
            self._attempt(self._add, parent, event)
        self._log_points(pending)
        if changed:
            table = stage_table(self._view, self._session.experiment(self._pipeline)[0], self._ids)
            self._attempt(self._session.log, parent, tags={"mlflow.note.content": table})
        return self._refused

    def send_files(self, names: Collection[str]) -> dict[str, str]:
        """Send files of the parent run again. Those that are refused once more, with the reason."""
        self._refused = Refused()
        self._ids |= self._session.runs(self._pipeline, self._view.run)
        parent = self._parent()
        for name in names:
            if parent is not None:
                self._log_file(parent, name)
        return self._refused.files

    def _attempt(self, call: Callable[..., None], *arguments: Any, **named: Any) -> None:
        """Call it; record and skip what MLflow rejects for good, so that one bad name doesn't block the rest."""
        try:
            call(*arguments, **named)
        except Exception as error:
            if not self._session.refused(error):
                raise
            self._refused.requests.append(str(error)[:REASON_CHARS])

    # ---- events ----

    def _add(self, parent: str, event: JournalEvent) -> None:
        match event:
            case RunStarted():
                self._log_file(parent, "config.json")
                config = self._record.config
                settings = {name: value for name, value in config.items() if not isinstance(value, dict | list)}
                self._session.log(parent, params=flat(settings))
            case StageStarted():
                run_id = self._child(event.stage)
                if run_id is not None:
                    self._session.log(run_id, tags=_stage_tags(event), params=self._stage_params(event.stage))
            case StageEnded() if event.status in STATUS:
                self._end_stage(event)
            case RunEnded():
                self._end_run(parent, event)

    def _log_points(self, pending: dict[str, Curves]) -> None:
        for stage, curves in pending.items():
            run_id = self._child(stage)
            if run_id is not None:
                measures = [Measure(name, point) for name, points in curves.items() for point in points]
                self._attempt(self._session.log, run_id, measures=measures)
        pending.clear()

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
                "mlflow.source.name": source_name(record.command),
                "mlflow.source.type": "LOCAL",
                "mlflow.source.git.commit": git.get("commit"),
                "mlflow.source.git.branch": git.get("branch"),
                "mlflow.source.git.dirty": None if git.get("dirty") is None else str(git["dirty"]).lower(),
            }
            started_ms = self._view.started_ms or record.started_ms
            self._ids[""] = self._session.create_run(self._pipeline, run_name(self._view), started_ms, tags)
        return self._ids[""]

    def _child(self, stage: str) -> str | None:
        if stage not in self._ids:
            known = self._view.stage(stage)
            tags = {
                "mlflow.parentRunId": self._ids[""],
                "gptline.run": self._view.run,
                "gptline.stage": stage,
                "mlflow.user": self._view.user,
                "mlflow.source.name": source_name(self._view.command),
                "mlflow.source.type": "LOCAL",
            }
            name = stage_name(self._view, stage)
            self._ids[stage] = self._session.create_run(self._pipeline, name, known.started_ms or known.ended_ms, tags)
        return self._ids[stage]

    def _stage_params(self, stage: str) -> dict[str, str]:
        settings = (self._record.config.get("stages") or {}).get(stage) or {}
        return flat({name: value for name, value in settings.items() if name != "inputs"})

    # ---- the end of a stage ----

    def _end_stage(self, event: StageEnded) -> None:
        run_id = self._child(event.stage)
        if run_id is None:
            return
        stage, action = self._view.stage(event.stage), self._actions.find(event)
        tags = _stage_tags(event) | {"gptline.error": event.error, "gptline.status": event.status}
        if action is not None:
            tags |= self._actions.tags(action)
        maker = self._maker_link(action, tags.get("gptline.made_by_mlflow_run"))
        tags["mlflow.note.content"] = stage_note(stage, summary_of(self._store, event.output) if event.output else "", maker)
        self._session.log(run_id, tags=tags)
        if action is not None:
            self._actions.log_measures(run_id, stage, action, self._actions.log_artifacts(run_id, action))
        self._session.log(run_id, params=self._stage_params(event.stage))
        self._session.end_run(run_id, STATUS[event.status], event.time_ms)

    def _maker_link(self, action: Action | None, mlflow_run: str | None) -> str:
        """The run that made what a stage reused, as a link if this MLflow has it; empty for what this run made itself."""
        if action is None or action.run == self._view.run:
            return ""
        return link(action.run, self._session.experiment(action.pipeline)[0], mlflow_run) if mlflow_run else action.run

    # ---- the end of the run ----

    def _end_run(self, parent: str, event: RunEnded) -> None:
        figures: dict[str, list[float]] = {}
        for stage in self._view.stages.values():
            if stage.status == "killed" and (child := self._child(stage.name)) is not None:
                self._session.end_run(child, "KILLED", event.time_ms)
            action = self._actions.find(stage)
            for name, value in (action.figures if action is not None else {}).items():
                if name.startswith("eval/"):
                    figures.setdefault(name, []).append(value)
        unique = [Measure(name, Point(0, values[0], event.time_ms)) for name, values in figures.items() if len(values) == 1]
        self._session.log(parent, measures=unique, tags={"gptline.text": event.text, "gptline.exit_code": event.exit_code})
        for name in ("page.html", "lineage.mmd", "lineage.html"):
            self._log_file(parent, name)
        if event.status != "KILLED":
            self._attempt(self._register, parent)
        self._session.end_run(parent, event.status, event.time_ms)

    def _register(self, parent: str) -> None:
        """Make the pipeline's last policy a version if it is an assistant, and move `newest` to where the store has it."""
        manifests = [(stage.output, self._store.manifest(stage.output)) for stage in self._view.stages.values() if stage.output]
        policies = [(digest, found["metadata"]) for digest, found in manifests if found and found["metadata"].get("role") == "policy"]
        if policies and policies[-1][1].get("chat_format"):  # stages are in the pipeline's order
            digest = policies[-1][0]
            model = self._session.models.logged(digest, self._actions.maker(digest), self._pipeline, parent)
            self._session.models.register(self._pipeline, model, digest, self._view.run)
        self._session.models.set_newest(self._pipeline)

    def _log_file(self, parent: str, name: str) -> None:
        """Log a file of the parent run. If only MLflow's artifact store refuses, that costs this file and nothing else."""
        text = self._file(name)
        try:
            self._session.log_file(parent, name, text)
        except Exception as error:
            if unreachable(self._session.uri) is not None:
                raise
            self._refused.files[name] = str(error)[:REASON_CHARS]

    def _file(self, name: str) -> str:
        if name == "config.json":
            return json.dumps(self._record.config, indent=1, ensure_ascii=False, sort_keys=True)
        if name == "page.html":
            return render(self._store, self._view.run)
        outputs = [stage.output for stage in self._view.stages.values() if stage.output]
        lineage = trace_all(self._store, outputs, downstream=False)
        return as_mermaid(lineage) if name == "lineage.mmd" else as_html(lineage)


def _stage_tags(event: StageStarted | StageEnded) -> dict[str, Any]:
    return {
        "gptline.stage": event.stage,
        "gptline.decision": event.decision,
        "gptline.reason": event.reason,
        "gptline.key": event.key,
    }
