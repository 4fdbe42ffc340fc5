"""What a journal's events add up to: the state of a run and of its stages.

`RunView` is the fold that the progress display, the run's page and the MLflow sender share: give it the events in order.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.events import Curves
from pipelines.store.events import (
    Announcement,
    JournalEvent,
    Note,
    RunEnded,
    RunStarted,
    StageEnded,
    StagePlanned,
    StagePoints,
    StageProgress,
    StageStarted,
)
from pipelines.store.journal import read_journal
from pipelines.store.store import Store


@dataclass
class StageView:
    """One stage of one run, as far as it is known."""

    name: str
    decision: str = ""
    """reuse, run, resume, wait or blocked."""
    reason: str = ""
    status: str = "planned"
    """planned, running, done, reused, failed, stopped, blocked, or killed: the run ended while it was running."""
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
    """How far it is; in training, how far the work outside its steps is that goes on now."""
    since_ms: int | None = None
    """When the work that `done` counts began: a stage may do one thing after the other."""
    reported_ms: int | None = None
    """When it last reported how far it is."""
    notes: list[str] = field(default_factory=list)
    curves: Curves = field(default_factory=dict)
    """The points in the journal. A reused stage has none there: its curves are in its action record."""

    @property
    def step(self) -> int | None:
        """The newest step that has a point."""
        steps = [points[-1].step for points in self.curves.values() if points]
        return max(steps, default=None)

    def newest(self, metric: str) -> float | None:
        points = self.curves.get(metric)
        return points[-1].value if points else None


@dataclass
class RunView:
    """One run, as far as it is known."""

    run: str
    pipeline: str = ""
    command: str = ""
    user: str = ""
    host: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    forecast_s: float | None = None
    status: str = "RUNNING"
    """RUNNING, then FINISHED, FAILED or KILLED."""
    text: str = ""
    started_ms: int | None = None
    ended_ms: int | None = None
    stages: dict[str, StageView] = field(default_factory=dict)
    """In the order in which the journal first names them."""

    def seconds(self) -> float | None:
        """How long the run took; None while that is unknown, or if the clocks of two machines disagree about it."""
        if self.started_ms is None or self.ended_ms is None or self.ended_ms < self.started_ms:
            return None
        return (self.ended_ms - self.started_ms) / 1000

    def stage(self, name: str) -> StageView:
        return self.stages.setdefault(name, StageView(name))

    def add(self, event: JournalEvent | Announcement) -> None:
        match event:
            case RunStarted():
                self.pipeline, self.command, self.versions = event.pipeline, event.command, event.versions
                self.user, self.host = event.user, event.host
                self.started_ms, self.forecast_s = event.time_ms, event.forecast_s
            case StagePlanned():
                stage = self.stage(event.stage)
                stage.decision, stage.reason = event.decision, event.reason
            case StageStarted():
                stage = self.stage(event.stage)
                stage.status, stage.started_ms = "running", event.time_ms
                stage.decision, stage.reason = event.decision, event.reason
                stage.key, stage.steps = event.key, event.steps
            case StageProgress():
                stage = self.stage(event.stage)
                if event.unit != stage.unit or event.done < stage.done:
                    stage.since_ms = stage.reported_ms or stage.started_ms
                stage.done, stage.total, stage.unit = event.done, event.total, event.unit
                stage.reported_ms = event.time_ms
            case StagePoints():
                stage = self.stage(event.stage)
                for metric, points in event.curves.items():
                    stage.curves.setdefault(metric, []).extend(points)
                if stage.steps:
                    stage.done, stage.total, stage.unit = 0, None, ""  # what it did before this step is over
            case Note() if event.stage:
                self.stage(event.stage).notes.append(event.text)
            case StageEnded():
                stage = self.stage(event.stage)
                stage.status, stage.ended_ms = event.status, event.time_ms
                stage.decision = event.decision or stage.decision
                stage.reason = event.reason or stage.reason
                stage.key, stage.number = event.key or stage.key, event.number
                stage.output, stage.seconds, stage.error = event.output, event.seconds, event.error
            case RunEnded():
                self.status, self.text, self.ended_ms = event.status, event.text, event.time_ms
                for stage in self.stages.values():
                    stage.status = "killed" if stage.status == "running" else stage.status


def run_view(store: Store, run: str) -> RunView:
    """Read a run's whole journal."""
    view = RunView(run)
    for event in read_journal(store, run):
        view.add(event)
    return view


def share_done(stage: StageView) -> float | None:
    """The share of a stage's work that is done, from 0 to 1; None if it is unknown, as before the first step of training."""
    if stage.steps:
        return None if stage.step is None else min(1.0, stage.step / stage.steps)
    return min(1.0, stage.done / stage.total) if stage.total else None


def seconds_left(stage: StageView, now_ms: int) -> float | None:
    """Estimate the remaining time from the pace between the first point and the newest, so that a gang's start doesn't count.

    Points from before the stage's start are ignored: a resume restored them from an earlier attempt, perhaps days old.
    """
    if not stage.steps or stage.step is None:
        share = share_done(stage)
        if not share or share >= 1 or stage.since_ms is None:
            return None
        return (now_ms - stage.since_ms) / 1000 * (1 - share) / share
    curves = [[point for point in points if point.time_ms >= (stage.started_ms or 0)] for points in stage.curves.values()]
    times = [(points[0], points[-1]) for points in curves if len(points) > 1]
    if not times:
        return None
    first = min((start for start, _ in times), key=lambda point: point.step)
    last = max((end for _, end in times), key=lambda point: point.step)
    if last.step <= first.step:
        return None
    since_s = max(0.0, (now_ms - last.time_ms) / 1000)  # points may come from a machine whose clock is ahead
    seconds_per_step = (last.time_ms - first.time_ms) / 1000 / (last.step - first.step)
    return max(0.0, seconds_per_step * (stage.steps - last.step) - since_s)
