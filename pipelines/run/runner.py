"""A run from its plan to its last event: plan, freeze the code, open the session, supervise the stages, end."""

from __future__ import annotations

import socket
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pipelines.observe.plan_rows import forecast
from pipelines.observe.tracker import start_tracking
from pipelines.plan.environment import ROOT, git_state, versions
from pipelines.plan.graph import Graph
from pipelines.plan.planner import Decision, Planner
from pipelines.plan.resolved import resolved
from pipelines.plan.snapshot import Snapshot, freeze
from pipelines.run.ending import Ending
from pipelines.run.recorder import Recorder, RunState
from pipelines.run.session import Interrupts, Session, faults_here
from pipelines.run.supervisor import Begun, Supervisor
from pipelines.store.events import Announcement, JournalEvent, RunStarted, StagePlanned, now_ms
from pipelines.store.journal import JournalWriter, dead_runs, driver_lease, end_dead_run
from pipelines.store.lease import Watch
from pipelines.store.processes import user_name
from pipelines.store.runs import RunFolder, RunRecord, new_run_id
from pipelines.store.store import Store


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
        self._interrupts = Interrupts(at_once=lambda: options.inline and not self._state.is_training())
        self._ending = Ending(graph, store, self.run, options.continue_command, self._state, show)

    def execute(self) -> int:
        """Run to the end. The exit code: 0 done, 1 a stage failed, 130 or 143 interrupted.

        ConfigError: the request is wrong, and nothing was written; or the machines can't do it, and only the code's snapshot was.
        """
        planner = self._planner(ROOT)
        plan = planner.plan()
        to_build = [self.graph.stages[each.stage] for each in plan if each.action != "reuse"]
        if faults := faults_here(to_build, self.graph, inline=self.options.inline):
            raise self.graph.loaded.error(faults)
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
            Supervisor(self.graph, self.store, begun, session, self._state, self._interrupts, self._ending, self._announce).run()
            return self._ending.end(
                begun.recorder,
                begun.tracker,
                given=planner.given,
                fresh=self.options.fresh,
                until=self.options.until,
                signal=self._interrupts.number,
            )

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

    def _begin(self, plan: list[Decision], planner: Planner, snapshot: Snapshot) -> Begun:
        for run in dead_runs(self.store, wait=False):
            end_dead_run(self.store, run)
        file = self.graph.loaded.file
        record = RunRecord(
            run=self.run,
            pipeline=file.pipeline,
            config=resolved(self.graph),
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
        return Begun(self.run, planner, None if self.options.inline else snapshot, journal, recorder, tracker)

    def _announce(self, text: str) -> None:
        self._show(Announcement(text))
