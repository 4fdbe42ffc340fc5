"""The loop of a run: each stage a Ray task, independent branches at once.

    decide(stage) -> reuse: take the output            \\
                  -> wait:  look again in a second       >  one loop, which never blocks
                  -> run:   lease, task, record         /

Only the driver writes action records and the journal. The loop waits for a task's events, for a task's end, for a lease to become free, or
for 0.1 s. A stage that fails leaves the others running, and stages that read it are blocked; so are stages that read one whose gate is
closed, although that stage itself is done.
"""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from gpt.settings import TrainSettings
from pipelines.observe.tracker import Tracker
from pipelines.plan.config import ConfigError
from pipelines.plan.graph import Graph, Stage
from pipelines.plan.planner import Decision, Planner
from pipelines.plan.snapshot import Snapshot
from pipelines.run.ending import Ending
from pipelines.run.job import Outcome, make_job
from pipelines.run.preflight import waits_for
from pipelines.run.recorder import RECODED, Recorder, RunningStage, RunState
from pipelines.run.session import Interrupts, Session
from pipelines.run.task import InlineTask, StageTask, start_ray_task
from pipelines.store.journal import JournalWriter, Superseded
from pipelines.store.lease import Lease, Watch
from pipelines.store.runs import RunFolder, StopMark
from pipelines.store.store import Store

LOOK_EVERY_S = 0.1
LEASE_EVERY_S = 1.0
WAIT_REPORTED_AFTER_S = 10.0


@dataclass(frozen=True)
class Begun:
    """What exists once a run has begun: its record is written and its journal is open."""

    run: str
    planner: Planner
    """Reads the code that the stages will run: the snapshot's, or inline the working tree's."""
    snapshot: Snapshot | None
    """None: stages run inline, from the working tree."""
    journal: JournalWriter
    recorder: Recorder
    tracker: Tracker


class Supervisor:
    """Runs the stages of one begun run until none is waiting or running, and leaves nothing running however that ends."""

    def __init__(
        self,
        graph: Graph,
        store: Store,
        begun: Begun,
        session: Session,
        state: RunState,
        interrupts: Interrupts,
        ending: Ending,
        announce: Callable[[str], None],
    ) -> None:
        self._graph = graph
        self._store = store
        self._begun = begun
        self._session = session
        self._state = state
        self._interrupts = interrupts
        self._ending = ending
        self._announce = announce
        self._inline = begun.snapshot is None
        self._folder = RunFolder(store, begun.run)
        self._stop_mark = StopMark(store, begun.run)
        self._watches: dict[str, Watch] = {}
        self._looked_at_s: dict[str, float] = {}
        self._reported_holders: dict[str, str] = {}

    def run(self) -> None:
        """Run the loop, and leave nothing running however it ends."""
        try:
            self._loop()
        except KeyboardInterrupt:
            self._interrupts.request(signal.SIGINT)
            self._abandon()
        except Superseded:
            self._let_go()  # nothing more is written: the journal belongs to another driver
            raise
        except Exception as error:
            if os.environ.get("GPTLINE_DEBUG"):
                traceback.print_exc()
            what = str(error) if isinstance(error, (OSError, ConfigError)) else f"{type(error).__name__}: {error}"
            self._announce(f"can't go on: {what}")
            self._ending.broken = f"the {f'store {self._store}' if isinstance(error, OSError) else 'driver'} failed ({what})"
            self._abandon()

    def _loop(self) -> None:
        state, stopping = self._state, False
        while state.waiting or state.running:
            if self._interrupts.number is None and self._stop_mark():
                self._interrupts.request(signal.SIGTERM)  # requested elsewhere, through the store
            if self._interrupts.number is not None and not stopping:
                stopping = True
                self._folder.request_stop()
                self._announce("stopping: training stages finish their step and save a checkpoint (again: stop at once)")
                state.waiting.clear()
                self._cancel_plain_stages()
            for stage in list(state.waiting.values()):
                self._consider(stage)
            for running in list(state.running.values()):
                self._attend(running)
            self._begun.journal.flush_due()
            if (sentence := self._begun.tracker.news()) is not None:
                self._announce(sentence)
            if state.waiting or state.running:
                time.sleep(LOOK_EVERY_S)

    def _consider(self, stage: Stage) -> None:
        """Start a stage whose inputs exist, reuse its output, block it, or leave it for later."""
        state, planner = self._state, self._begun.planner
        upstream = planner.upstream(stage)
        closed = [state.closed[name] for name in upstream if name in state.closed]
        broken = [f"its input {name} {state.fates[name]}" for name in upstream if name in state.fates]
        if closed or broken:
            self._begun.recorder.ended(stage, "blocked", Decision(stage.name, "blocked", (closed or broken)[0]))
            return
        if any(name not in state.outputs for name in upstream) or not self._is_due(stage):
            return
        decision = planner.decide(stage, state.outputs)
        if self._settle(stage, decision):
            return
        self._session.open_for([stage])  # for a plan that had nothing to build, and changed since
        lease = self._lease(stage, decision)
        if lease is None:
            return
        # while the lease was being taken another run may have finished the work
        decision = planner.decide(stage, state.outputs, held=True)
        if self._settle(stage, decision):
            lease.release()
        elif self._is_recoded(stage):
            lease.release()
            self._begun.recorder.ended(stage, "failed", decision, error=RECODED)
        else:
            self._start(stage, decision, lease)

    def _is_due(self, stage: Stage) -> bool:
        """Whether to look at a stage again: each look reads the store."""
        now_s = time.monotonic()
        if now_s - self._looked_at_s.get(stage.name, -LEASE_EVERY_S) < LEASE_EVERY_S:
            return False
        self._looked_at_s[stage.name] = now_s
        return True

    def _settle(self, stage: Stage, decision: Decision) -> bool:
        """Deal with a stage that needs no run, or can't have one. Whether it was such a stage."""
        if decision.action == "reuse":
            self._begun.recorder.reused(stage, decision)
        elif decision.action == "blocked":
            self._begun.recorder.ended(stage, "failed", decision, error=decision.reason)
        return decision.action in ("reuse", "blocked")

    def _lease(self, stage: Stage, decision: Decision) -> Lease | None:
        """The lease on the stage's key, or None while another run holds it, which is reported once."""
        assert decision.key is not None
        watch = self._watches.setdefault(decision.key, Watch(self._store, decision.key))
        holder = watch.holder()
        if holder is None:
            return watch.take(run=self._begun.run, stage=stage.name)
        if self._reported_holders.get(stage.name) != holder.run:
            self._reported_holders[stage.name] = holder.run
            self._begun.recorder.note(stage, f"waiting for {holder}, which is building it")
        return None

    def _is_recoded(self, stage: Stage) -> bool:
        """Whether an inline stage may run other code than its key holds: modules are imported when a stage first needs them."""
        return self._inline and self._begun.planner.recoded(stage)

    def _start(self, stage: Stage, decision: Decision, lease: Lease) -> None:
        state = self._state
        del state.waiting[stage.name]
        self._begun.recorder.started(stage, decision, stage.config.steps if isinstance(stage.config, TrainSettings) else None)
        job = make_job(self._begun.run, self._graph, stage, decision, self._store.root, self._begun.snapshot)
        if decision.forced:  # later plans see from it that a rerun was asked for and is unfinished, until its action is recorded
            (self._store.work(job.key) / f"{decision.series}.0").mkdir(parents=True, exist_ok=True)
        task: StageTask
        if self._inline:
            task = InlineTask(job, lambda event: self._begun.recorder.forward(stage, event), self._should_stop)
        else:
            task = start_ray_task(job, stage, self._graph.loaded.file.pipeline)
        state.running[stage.name] = RunningStage(stage, decision, lease, task)
        state.started.add(stage.name)

    def _attend(self, running: RunningStage) -> None:
        """Pass on a task's events, and deal with its end."""
        stage, task = running.stage, running.task
        for event in task.poll():
            self._begun.recorder.forward(stage, event)
        if not task.done:
            if not task.started and not running.wait_reported and running.elapsed_s() > WAIT_REPORTED_AFTER_S and not stage.kind.trains():
                running.wait_reported = True  # a gang reports by itself that it waits
                self._begun.recorder.note(stage, waits_for(stage))
            return
        try:
            outcome = task.result()
        except Exception as error:
            outcome = Outcome(error=str(error))
        del self._state.running[stage.name]
        try:
            if outcome.stopped:
                self._interrupts.request(signal.SIGTERM)  # the store's stop mark may reach a stage before it reaches this loop
                self._begun.recorder.stopped(running, seconds=running.elapsed_s())
            else:
                recoded = outcome.output is not None and self._is_recoded(stage)
                self._begun.recorder.finished(running, outcome, inline=self._inline, recoded=recoded)
        except OSError as error:
            message = outcome.error or f"its result can't be recorded: {error}"
            self._begun.recorder.ended(stage, "failed", running.decision, error=message)
        finally:
            running.lease.release()

    # ---- stopping ----

    def _should_stop(self) -> bool:
        return self._interrupts.number is not None or self._stop_mark()

    def _cancel_plain_stages(self) -> None:
        """End the stages that have no checkpoint; they start over next time."""
        for running in list(self._state.running.values()):
            if not running.stage.kind.trains() and not self._inline:
                running.task.cancel()
                del self._state.running[running.stage.name]
                running.lease.release()
                self._begun.recorder.stopped(running)

    def _abandon(self) -> None:
        """Stop at once: only what is on disk is kept."""
        self._let_go()
        for running in self._state.running.values():
            self._ending.attempt(f"record that {running.stage.name} was stopped", self._begun.recorder.stopped, running)
        self._state.running.clear()

    def _let_go(self) -> None:
        for running in self._state.running.values():
            self._ending.attempt(f"end {running.stage.name}", running.task.cancel)
            self._ending.attempt(f"release the lease of {running.stage.name}", running.lease.release)
