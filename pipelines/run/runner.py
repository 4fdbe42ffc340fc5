"""Carries a plan out: each stage a Ray task, independent branches at once, every step recorded in the run's journal.

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
import socket
import time
import traceback
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from gpt.settings import TrainSettings
from pipelines.observe.plan_rows import forecast
from pipelines.observe.tracker import Tracker, start_tracking
from pipelines.plan.config import ConfigError
from pipelines.plan.environment import ROOT, git_state, versions
from pipelines.plan.graph import Graph, Stage
from pipelines.plan.planner import Decision, Planner
from pipelines.plan.snapshot import Snapshot, freeze
from pipelines.run.ending import Ending
from pipelines.run.job import Outcome, make_job
from pipelines.run.preflight import waits_for
from pipelines.run.recorder import RECODED, Recorder, RunningStage, RunState, resolved_config
from pipelines.run.session import Interrupts, Session, faults_here
from pipelines.run.task import InlineTask, StageTask, start_ray_task
from pipelines.store.events import Announcement, JournalEvent, RunStarted, StagePlanned, now_ms
from pipelines.store.journal import JournalWriter, Superseded, dead_runs, driver_lease, end_dead_run
from pipelines.store.lease import Lease, Watch
from pipelines.store.processes import user_name
from pipelines.store.runs import RunFolder, RunRecord, StopMark, new_run_id
from pipelines.store.store import Store

LOOK_EVERY_S = 0.1
LEASE_EVERY_S = 1.0
WAIT_REPORTED_AFTER_S = 10.0


@dataclass
class Options:
    """What the command line asks of a run."""

    command: str
    """As the person typed it."""
    continue_command: str
    """The command that resumes this run: without --fresh, except for stages that had not started."""
    fresh: Collection[str] = ()
    use: Mapping[str, str] = field(default_factory=dict)
    until: str | None = None
    inline: bool = False
    run: str = ""
    """The run's id, if it was assigned before the run begins."""
    git: dict[str, Any] | None = field(default_factory=git_state)
    """State of the clone that the command was given in; a snapshot is not a clone."""


@dataclass(frozen=True)
class _Begun:
    """What exists once a run has begun: its record is written and its journal is open."""

    planner: Planner
    """Reads the code that the stages will run: the snapshot's, or inline the working tree's."""
    snapshot: Snapshot
    journal: JournalWriter
    recorder: Recorder
    tracker: Tracker
    stop_mark: StopMark


class Run:
    """One execution of a pipeline."""

    def __init__(self, graph: Graph, store: Store, options: Options, show: Callable[[JournalEvent | Announcement], None]) -> None:
        self.graph = graph
        self.store = store
        self.options = options
        self.run = options.run or new_run_id(graph.loaded.file.pipeline)
        self.folder = RunFolder(store, self.run)
        self._show = show
        self._state = RunState(waiting={})
        self._interrupts = Interrupts(at_once=self._has_no_step_to_finish)
        self._ending = Ending(graph, store, self.run, options.continue_command, self._state, show)
        self._watches: dict[str, Watch] = {}
        self._looked_at_s: dict[str, float] = {}
        self._reported_holders: dict[str, str] = {}

    def execute(self) -> int:
        """Run to the end. The exit code: 0 done, 1 a stage failed, 130 or 143 interrupted.

        ConfigError: the request is wrong, and nothing was written; or the machines can't do it, and only the code's snapshot was.
        """
        planner = self._planner(ROOT)
        plan = planner.plan()
        to_build = [self.graph.stages[each.stage] for each in plan if each.action != "reuse"]
        if faults := faults_here(to_build, self.graph, inline=self.options.inline):
            raise ConfigError(self.graph.loaded.path, faults)
        self.store.create()
        self.store.sweep()
        snapshot = freeze(self.graph, self.store)
        if not self.options.inline:
            planner = self._planner(snapshot.path, snapshot.user_folders())
        if to_build:
            for line in forecast(plan, self.graph.loaded.file.about_itself()):
                self._announce(line)
        with Session(self.graph, self.store, snapshot.path, self._interrupts, self._announce, inline=self.options.inline) as session:
            session.open_for(to_build)
            lease = Watch(self.store, driver_lease(self.run)).take(run=self.run)
            assert lease is not None, "a run's id is its own"
            session.on_exit(lambda: self._ending.attempt("release the run's lease", lease.release))
            begun = self._begin(plan, planner, snapshot)
            self._state.waiting.update({name: stage for name, stage in self.graph.stages.items() if name in planner.chosen})
            self._supervise(begun, session)
            return self._ending.end(self.options, planner.given, begun.recorder, begun.tracker, self._interrupts.number)

    # ---- before the loop ----

    def _planner(self, code_root: Path, user_folders: Mapping[str, Path] = MappingProxyType({})) -> Planner:
        options = self.options
        return Planner(
            self.graph,
            self.store,
            code_root,
            user_folders=user_folders,
            fresh=options.fresh,
            given=options.use,
            until=options.until,
            inline=options.inline,
        )

    def _begin(self, plan: list[Decision], planner: Planner, snapshot: Snapshot) -> _Begun:
        for run in dead_runs(self.store, wait=False):
            end_dead_run(self.store, run)
        file = self.graph.loaded.file
        record = RunRecord(
            run=self.run,
            pipeline=file.pipeline,
            config=resolved_config(self.graph),
            config_path=str(self.graph.loaded.path),
            command=self.options.command,
            tracking=file.tracking.model_dump(),
            started_ms=now_ms(),
            user=user_name(),
            host=socket.gethostname(),
            snapshot=snapshot.artifact.digest,
            git=self.options.git,
        )
        self.folder.write_record(record)
        journal = JournalWriter(self.store, self.run)
        recorder = Recorder(self.graph, self.store, self.run, journal, self._show, self._state)
        expected = [each.expected_s for each in plan if each.action != "blocked"]
        recorder.write(
            RunStarted(
                run=self.run,
                pipeline=record.pipeline,
                config=record.config_path,
                command=record.command,
                snapshot=record.snapshot,
                user=record.user,
                host=record.host,
                versions=versions(),
                forecast_s=None if any(each is None for each in expected) else sum(each for each in expected if each),
            )
        )
        for decision in plan:
            recorder.write(StagePlanned(stage=decision.stage, decision=decision.action, reason=decision.reason))
        tracker = start_tracking(self.store, self.run, file.tracking.uri)
        return _Begun(planner, snapshot, journal, recorder, tracker, StopMark(self.store, self.run))

    # ---- the loop ----

    def _supervise(self, begun: _Begun, session: Session) -> None:
        """Run the loop, and leave nothing running however it ends."""
        try:
            self._loop(begun, session)
        except KeyboardInterrupt:
            self._interrupts.request(signal.SIGINT)
            self._abandon(begun.recorder)
        except Superseded:
            self._let_go()  # nothing more is written: the journal belongs to another driver
            raise
        except Exception as error:
            if os.environ.get("GPTLINE_DEBUG"):
                traceback.print_exc()
            what = str(error) if isinstance(error, (OSError, ConfigError)) else f"{type(error).__name__}: {error}"
            self._announce(f"can't go on: {what}")
            self._ending.broken = f"the {f'store {self.store}' if isinstance(error, OSError) else 'driver'} failed ({what})"
            self._abandon(begun.recorder)

    def _loop(self, begun: _Begun, session: Session) -> None:
        state, stopping = self._state, False
        while state.waiting or state.running:
            if self._interrupts.number is None and begun.stop_mark():
                self._interrupts.request(signal.SIGTERM)  # requested elsewhere, through the store
            if self._interrupts.number is not None and not stopping:
                stopping = True
                self.folder.request_stop()
                self._announce("stopping: training stages finish their step and save a checkpoint (again: stop at once)")
                state.waiting.clear()
                self._cancel_plain_stages(begun.recorder)
            for stage in list(state.waiting.values()):
                self._consider(stage, begun, session)
            for running in list(state.running.values()):
                self._attend(running, begun)
            begun.journal.flush_due()
            if (sentence := begun.tracker.news()) is not None:
                self._announce(sentence)
            if state.waiting or state.running:
                time.sleep(LOOK_EVERY_S)

    def _consider(self, stage: Stage, begun: _Begun, session: Session) -> None:
        """Start a stage whose inputs exist, reuse its output, block it, or leave it for later."""
        state, planner = self._state, begun.planner
        upstream = planner.upstream(stage)
        closed = [state.closed[name] for name in upstream if name in state.closed]
        broken = [f"its input {name} {state.fates[name]}" for name in upstream if name in state.fates]
        if closed or broken:
            begun.recorder.ended(stage, "blocked", Decision(stage.name, "blocked", (closed or broken)[0]))
            return
        if any(name not in state.outputs for name in upstream) or not self._is_due(stage):
            return
        decision = planner.decide(stage, state.outputs)
        if self._settle(stage, decision, begun.recorder):
            return
        session.open_for([stage])  # for a plan that had nothing to build, and changed since
        lease = self._lease(stage, decision, begun.recorder)
        if lease is None:
            return
        # while the lease was being taken another run may have finished the work
        decision = planner.decide(stage, state.outputs, held=True)
        if self._settle(stage, decision, begun.recorder):
            lease.release()
        elif self._is_recoded(stage, planner):
            lease.release()
            begun.recorder.ended(stage, "failed", decision, error=RECODED)
        else:
            self._start(stage, decision, lease, begun)

    def _is_due(self, stage: Stage) -> bool:
        """Whether to look at a stage again: each look reads the store."""
        now_s = time.monotonic()
        if now_s - self._looked_at_s.get(stage.name, -LEASE_EVERY_S) < LEASE_EVERY_S:
            return False
        self._looked_at_s[stage.name] = now_s
        return True

    def _settle(self, stage: Stage, decision: Decision, recorder: Recorder) -> bool:
        """Deal with a stage that needs no run, or can't have one. Whether it was such a stage."""
        if decision.action == "reuse":
            recorder.reused(stage, decision)
        elif decision.action == "blocked":
            recorder.ended(stage, "failed", decision, error=decision.reason)
        return decision.action in ("reuse", "blocked")

    def _lease(self, stage: Stage, decision: Decision, recorder: Recorder) -> Lease | None:
        """The lease on the stage's key, or None while another run holds it, which is reported once."""
        assert decision.key is not None
        watch = self._watches.setdefault(decision.key, Watch(self.store, decision.key))
        holder = watch.holder()
        if holder is None:
            return watch.take(run=self.run, stage=stage.name)
        if self._reported_holders.get(stage.name) != holder.run:
            self._reported_holders[stage.name] = holder.run
            recorder.note(stage, f"waiting for {holder}, which is building it")
        return None

    def _is_recoded(self, stage: Stage, planner: Planner) -> bool:
        """Whether an inline stage may run other code than its key holds: modules are imported when a stage first needs them."""
        return self.options.inline and planner.recoded(stage)

    def _start(self, stage: Stage, decision: Decision, lease: Lease, begun: _Begun) -> None:
        state = self._state
        del state.waiting[stage.name]
        begun.recorder.started(stage, decision, stage.config.steps if isinstance(stage.config, TrainSettings) else None)
        snapshot = None if self.options.inline else begun.snapshot
        job = make_job(self.run, self.graph, stage, decision, self.store.root, snapshot)
        if decision.forced:  # later plans see from it that a rerun was asked for and is unfinished, until its action is recorded
            (self.store.work(job.key) / f"{decision.series}.0").mkdir(parents=True, exist_ok=True)
        task: StageTask
        if self.options.inline:
            task = InlineTask(job, lambda event: begun.recorder.forward(stage, event), lambda: self._should_stop(begun))
        else:
            task = start_ray_task(job, stage, self.graph.loaded.file.pipeline)
        state.running[stage.name] = RunningStage(stage, decision, lease, task)
        state.started.add(stage.name)

    def _attend(self, running: RunningStage, begun: _Begun) -> None:
        """Pass on a task's events, and deal with its end."""
        stage, task = running.stage, running.task
        for event in task.poll():
            begun.recorder.forward(stage, event)
        if not task.done:
            if not task.started and not running.wait_reported and running.elapsed_s() > WAIT_REPORTED_AFTER_S and not stage.kind.trains():
                running.wait_reported = True  # a gang reports by itself that it waits
                begun.recorder.note(stage, waits_for(stage))
            return
        try:
            outcome = task.result()
        except Exception as error:
            outcome = Outcome(error=str(error))
        del self._state.running[stage.name]
        try:
            if outcome.stopped:
                self._interrupts.request(signal.SIGTERM)  # the store's stop mark may reach a stage before it reaches this loop
                begun.recorder.stopped(running, seconds=running.elapsed_s())
            else:
                recoded = outcome.output is not None and self._is_recoded(stage, begun.planner)
                begun.recorder.finished(running, outcome, inline=self.options.inline, recoded=recoded)
        except OSError as error:
            message = outcome.error or f"its result can't be recorded: {error}"
            begun.recorder.ended(stage, "failed", running.decision, error=message)
        finally:
            running.lease.release()

    # ---- stopping ----

    def _should_stop(self, begun: _Begun) -> bool:
        return self._interrupts.number is not None or begun.stop_mark()

    def _has_no_step_to_finish(self) -> bool:
        return self.options.inline and not any(each.stage.kind.trains() for each in self._state.running.values())

    def _cancel_plain_stages(self, recorder: Recorder) -> None:
        """End the stages that have no checkpoint; they start over next time."""
        for running in list(self._state.running.values()):
            if not running.stage.kind.trains() and not self.options.inline:
                running.task.cancel()
                del self._state.running[running.stage.name]
                running.lease.release()
                recorder.stopped(running)

    def _abandon(self, recorder: Recorder) -> None:
        """Stop at once: only what is on disk is kept."""
        self._let_go()
        for running in self._state.running.values():
            self._ending.attempt(f"record that {running.stage.name} was stopped", recorder.stopped, running)
        self._state.running.clear()

    def _let_go(self) -> None:
        for running in self._state.running.values():
            self._ending.attempt(f"end {running.stage.name}", running.task.cancel)
            self._ending.attempt(f"release the lease of {running.stage.name}", running.lease.release)

    def _announce(self, text: str) -> None:
        self._show(Announcement(text))
