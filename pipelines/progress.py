"""What a journal's events add up to, and how a person follows them: live rows on a terminal, plain lines in a pipe.

`RunView` is the fold that the progress, the run's page and MLflow's sender share: give it the events in order.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pipelines.journal import Event, read_journal
from pipelines.store import Store

Point = tuple[int, float, int]
"""Step, value, time in ms since 1970."""


@dataclass
class StageView:
    """One stage of one run, as far as it is known."""

    name: str
    decision: str = ""
    """reuse, run, resume, wait or blocked."""
    reason: str = ""
    status: str = "planned"
    """planned, running, done, reused, failed, stopped or blocked."""
    steps: int | None = None
    key: str = ""
    number: int | None = None
    output: str = ""
    seconds: float | None = None
    error: str = ""
    started_ms: int | None = None
    ended_ms: int | None = None
    done: float = 0
    total: float | None = None
    unit: str = ""
    notes: list[str] = field(default_factory=list)
    curves: dict[str, list[Point]] = field(default_factory=dict)
    """What the journal has; a reused stage's curves stand in its action record."""

    def newest(self, metric: str) -> float | None:
        points = self.curves.get(metric)
        return points[-1][1] if points else None


@dataclass
class RunView:
    run: str
    pipeline: str = ""
    command: str = ""
    user: str = ""
    host: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    status: str = "RUNNING"
    """RUNNING, then FINISHED, FAILED or KILLED."""
    text: str = ""
    started_ms: int | None = None
    ended_ms: int | None = None
    stages: dict[str, StageView] = field(default_factory=dict)
    """In the order in which the journal first names them."""

    def stage(self, name: str) -> StageView:
        return self.stages.setdefault(name, StageView(name))

    def add(self, event: Event) -> None:
        match event["type"]:
            case "run_started":
                self.pipeline, self.command = event["pipeline"], event.get("command") or ""
                self.user, self.host = event.get("user") or "", event.get("host") or ""
                self.versions = event.get("versions") or {}
                self.started_ms = event["time_ms"]
            case "stage_planned":
                stage = self.stage(event["stage"])
                stage.decision, stage.reason = event["decision"], event.get("reason") or ""
            case "stage_started":
                stage = self.stage(event["stage"])
                stage.status, stage.started_ms = "running", event["time_ms"]
                stage.decision, stage.reason = event["decision"], event.get("reason") or ""
                stage.key, stage.steps = event.get("key") or "", event.get("steps")
            case "progress":
                stage = self.stage(event["stage"])
                stage.done, stage.total, stage.unit = event["done"], event.get("total"), event.get("unit") or ""
            case "points":
                stage = self.stage(event["stage"])
                for metric, step, value, time_ms in event["points"]:
                    stage.curves.setdefault(metric, []).append((step, value, time_ms))
            case "note":
                self.stage(event["stage"]).notes.append(event["text"])
            case "stage_ended":
                stage = self.stage(event["stage"])
                stage.status, stage.ended_ms = event["status"], event["time_ms"]
                stage.decision = event.get("decision") or stage.decision
                stage.reason = event.get("reason") or stage.reason
                stage.key, stage.number = event.get("key") or stage.key, event.get("number")
                stage.output, stage.seconds = event.get("output") or "", event.get("seconds")
                stage.error = event.get("error") or ""
            case "run_ended":
                self.status, self.text, self.ended_ms = event["status"], event.get("text") or "", event["time_ms"]


def run_view(store: Store, run: str) -> RunView:
    view = RunView(run)
    for event in read_journal(store, run):
        view.add(event)
    return view
