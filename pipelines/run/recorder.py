"""What has become of a run's stages so far, and the one place that writes it down: journal, action records, watchers."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from cluster.checkpoint import attempts, newest_checkpoint
from cluster.events import Notice, Points, Progress, StageEvent
from pipelines.plan.environment import versions
from pipelines.plan.gates import closed_gate
from pipelines.plan.graph import Graph, Stage
from pipelines.plan.planner import Decision
from pipelines.run.job import Outcome
from pipelines.run.task import StageTask
from pipelines.store.action import Action
from pipelines.store.events import (
    Announcement,
    JournalEvent,
    Note,
    StageEnded,
    StagePoints,
    StageProgress,
    StageStarted,
    StageStatus,
    now_ms,
)
from pipelines.store.journal import JournalWriter
from pipelines.store.lease import Lease
from pipelines.store.processes import user_name
from pipelines.store.runs import RunFolder
from pipelines.store.store import Store

RECODED = "its code was edited after this run was planned, so either version may have run; run again"
LEASE_LOST = (
    "its lease was deleted or taken over by another run, so its result was not recorded; run again to reuse what that run makes of it"
)
_FATE: dict[StageStatus, str] = {"failed": "failed", "blocked": "can't be built", "stopped": "was stopped"}


@dataclass
class RunningStage:
    """A stage whose task has been submitted."""

    stage: Stage
    decision: Decision
    lease: Lease
    task: StageTask
    started_ms: int = field(default_factory=now_ms)
    started_s: float = field(default_factory=time.monotonic)
    wait_reported: bool = False
    """Whether we already reported that it is waiting for resources."""

    def elapsed_s(self) -> float:
        return time.monotonic() - self.started_s


@dataclass
class RunState:
    """The stages of one run by what has become of them."""

    waiting: dict[str, Stage]
    running: dict[str, RunningStage] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)
    """Stage to the digest of its output, whether built or reused."""
    fates: dict[str, str] = field(default_factory=dict)
    """Stage to why it has no output, as the end of a sentence: "failed"."""
    closed: dict[str, str] = field(default_factory=dict)
    """Stage to why its gate is closed."""
    started: set[str] = field(default_factory=set)
    """Every stage whose task was submitted."""

    def is_training(self) -> bool:
        """Whether a stage is running that can finish its step and save a checkpoint."""
        return any(each.stage.kind.trains() for each in self.running.values())

    def failed(self) -> list[str]:
        return [name for name, fate in self.fates.items() if fate == _FATE["failed"]]


class Recorder:
    """Writes down what happens to stages: as events, as action records, and in the `RunState`."""

    def __init__(
        self,
        graph: Graph,
        store: Store,
        run: str,
        journal: JournalWriter,
        show: Callable[[JournalEvent | Announcement], None],
        state: RunState,
    ) -> None:
        self._graph = graph
        self._store = store
        self._folder = RunFolder(store, run)
        self._run = run
        self._journal = journal
        self._show = show
        self._state = state

    def write(self, event: JournalEvent) -> None:
        self._journal.write(event)
        self._show(event)

    def note(self, stage: Stage, text: str) -> None:
        self.write(Note(stage=stage.name, text=text))

    def forward(self, stage: Stage, event: StageEvent) -> None:
        """Journal what a stage reported."""
        match event:
            case Points(curves):
                self.write(StagePoints(stage=stage.name, curves=curves))
            case Progress(done, total, unit):
                self.write(StageProgress(stage=stage.name, done=done, total=total, unit=unit))
            case Notice(text=text):
                self.note(stage, text.removeprefix(f"{stage.name}: "))

    def started(self, stage: Stage, decision: Decision, steps: int | None) -> None:
        event = StageStarted(stage=stage.name, key=decision.key or "", decision=decision.action, reason=decision.reason, steps=steps)
        self.write(event)

    def ended(
        self,
        stage: Stage,
        status: StageStatus,
        decision: Decision,
        *,
        error: str = "",
        number: int | None = None,
        output: str = "",
        seconds: float | None = None,
    ) -> None:
        self._state.waiting.pop(stage.name, None)
        if status in _FATE:
            self._state.fates[stage.name] = _FATE[status]
        self.write(
            StageEnded(
                stage=stage.name,
                status=status,
                decision=decision.action,
                reason=decision.reason,
                key=decision.key or "",
                number=number,
                output=output,
                seconds=seconds,
                error=error,
            )
        )

    def reused(self, stage: Stage, decision: Decision) -> None:
        assert decision.output is not None
        self._state.outputs[stage.name] = decision.output
        action = decision.reused
        if action is not None:
            self._store.note_latest(self._graph.loaded.file.pipeline, stage.name, action)
        if decision.closed:
            self._state.closed[stage.name] = decision.closed
        for note in decision.notes:
            self.note(stage, note)
        self.ended(stage, "reused", decision, number=action.number if action else None, output=decision.output, seconds=0.0)

    def stopped(self, running: RunningStage, *, seconds: float | None = None) -> None:
        """The reason becomes where the stage continues next time; why it was started no longer matters."""
        decision = running.decision
        assert decision.key is not None
        checkpoint, _ = newest_checkpoint(attempts(self._store.work(decision.key), decision.series), verify=False)
        reason = "starts over next time" if checkpoint is None else f"saved at step {checkpoint.step}"
        self.ended(running.stage, "stopped", replace(decision, reason=reason), seconds=seconds)

    def finished(self, running: RunningStage, outcome: Outcome, *, inline: bool, recoded: bool) -> None:
        """Record what a stage's task came to, unless it failed or may not be recorded. `recoded`: its code was edited meanwhile."""
        stage, decision, seconds = running.stage, running.decision, running.elapsed_s()
        damage = self._store.damage(outcome.output) if outcome.output else None
        if outcome.output is None or damage or recoded or running.lease.is_lost():
            error = outcome.error or damage or (RECODED if recoded else LEASE_LOST)
            if outcome.traceback:
                self._folder.write_traceback(stage.name, outcome.traceback)
            self.ended(stage, "failed", decision, seconds=seconds, error=error)
            return
        action = self._store.record(self._action(running, outcome, seconds, inline=inline))
        self._store.note_latest(action.pipeline, stage.name, action)
        self._store.remove_work(action.key)
        self._state.outputs[stage.name] = action.output
        if closed := closed_gate(stage, action):
            self._state.closed[stage.name] = closed
            self.note(stage, closed)
        self.ended(stage, "done", decision, number=action.number, output=action.output, seconds=seconds)

    def _action(self, running: RunningStage, outcome: Outcome, seconds: float, *, inline: bool) -> Action:
        stage, decision = running.stage, running.decision
        assert decision.key is not None
        assert outcome.output is not None
        assert outcome.output_kind is not None
        return Action(
            key=decision.key,
            pipeline=self._graph.loaded.file.pipeline,
            stage=stage.name,
            kind=stage.kind.uses,
            run=self._run,
            leaves=decision.leaves,
            inputs=decision.inputs,
            output=outcome.output,
            output_kind=outcome.output_kind,
            figures=outcome.figures,
            curves=outcome.curves,
            operational=stage.operational() | ({"engine": "torch", "ranks": 1} if inline and stage.kind.trains() else {}),
            versions=outcome.versions or versions(),
            restarts=outcome.restarts,
            resumed_from_step=outcome.resumed_from_step,
            forced=decision.forced,
            started_ms=running.started_ms,
            seconds=round(seconds, 3),
            host=outcome.host or socket.gethostname(),
            user=user_name(),
            pid=outcome.pid or os.getpid(),
        )
