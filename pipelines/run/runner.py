"""Carries a plan out: each stage a Ray task, independent branches at once, every step of it in the run's journal.

    decide(stage) -> reuse: take the output            \\
                  -> wait:  look again in a second       >  one loop, which never blocks
                  -> run:   lease, task, record         /

The driver alone writes action records and the journal. It waits for a task's events and is unblocked by them, by the task's end, by
a lease that comes free, or by 0.1 s passing. A stage that fails leaves the others running; what reads it is blocked. So is what reads a
stage whose gate is closed, though that stage itself is done.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shlex
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import Any

from cluster.checkpoint import attempts, newest_checkpoint
from gpt.settings import TrainSettings
from pipelines.artifacts import Model
from pipelines.observe.progress import forecast
from pipelines.plan.config import ConfigError, Fault
from pipelines.plan.environment import ROOT, git_state, versions
from pipelines.plan.gates import closed_gate
from pipelines.plan.graph import Graph, Stage
from pipelines.plan.planner import Decision, Planner, identity
from pipelines.plan.references import IMPORTS
from pipelines.plan.snapshot import freeze
from pipelines.run.execute import Job, Outcome, StopFile, execute, stream
from pipelines.run.preflight import lacks_here, lacks_in_cluster, room_of, unshared, waits_for
from pipelines.store.journal import Event, JournalWriter, Superseded, end_dead, last_event
from pipelines.store.lease import Lease, Watch, dead, describe, user_name
from pipelines.store.store import Action, Store

LOOK_EVERY_S = 0.1
LEASE_EVERY_S = 1.0
TRACKING_DEADLINE_S = 20.0
WAITING_TOLD_S = 10.0
RECODED = "its code was changed since this run was planned, so what ran may be either; run again"
LEASE_LOST = (
    "its lease is another run's by now, or was deleted, so its result was not recorded; run again: what that run makes of it is reused"
)


@dataclass
class Options:
    """What the command line asks of a run."""

    command: str
    """As the person typed it."""
    go_on: str
    """What goes on after an interruption: the same without what asks for a stage afresh. For those that were not begun it is added."""
    fresh: Collection[str] = ()
    use: Mapping[str, str] = field(default_factory=dict)
    until: str | None = None
    inline: bool = False
    run: str = ""
    """The run's id, where it was told before the run began; else it gets one of its own."""
    git: dict[str, Any] | None = field(default_factory=lambda: git_state())
    """Of the clone that the command was given in, as `git_state` tells it: a snapshot is none."""


@dataclass
class _Running:
    """A stage whose task is under way."""

    stage: Stage
    decision: Decision
    lease: Lease
    task: Any
    started_ms: int
    started_s: float
    told: bool = False
    """That it waits for room."""


class Run:
    """One execution of a pipeline."""

    def __init__(self, graph: Graph, store: Store, options: Options, say: Callable[[Event], None]) -> None:
        self.graph = graph
        self.store = store
        self.options = options
        self.run = options.run or new_run(graph.loaded.file.pipeline)
        self._say = say
        self._outputs: dict[str, str] = {}
        self._waiting: dict[str, Stage] = {}
        self._running: dict[str, _Running] = {}
        self._watches: dict[str, Watch] = {}
        self._told: dict[str, str] = {}
        self._looked_at_s: dict[str, float] = {}
        self._failed: dict[str, str] = {}
        self._closed: dict[str, str] = {}
        self._signal: int | None = None
        self._made = False
        self._joined = False
        self._begun: set[str] = set()
        self._broken = ""
        """Why the run itself failed, whatever its stages came to."""
        self._tracking_said: str | None = None

    def execute(self) -> int:
        """Run to the end; the exit code: 0 done, 1 a stage failed, 130 or 143 interrupted.

        ConfigError: what was asked for is wrong, and nothing is written; or the machines can't do it, and the code's snapshot alone is.
        """
        planner = self._planner(ROOT)
        plan = planner.plan()
        to_make = [self.graph.stages[each.stage] for each in plan if each.action != "reuse"]
        if to_make and not self.options.inline and not self._remote() and (faults := lacks_here(to_make)):
            raise ConfigError(self.graph.loaded.path, faults)
        self.store.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.store.sweep()
        self._snapshot = freeze(self.graph, self.store)
        self._planner_of_run = planner if self.options.inline else self._planner(self._snapshot.path, self._snapshot.user_folders())
        self._stop_asked = StopFile(self.store, self.run)
        if to_make:
            self._forecast(plan)
        with contextlib.ExitStack() as self._open:
            if self.options.inline:
                self._open.enter_context(_importable(self._snapshot.path))
            if to_make and not self.options.inline:
                self._join(to_make)
            else:
                self._open.enter_context(self._signals())
            lease = Watch(self.store, f"run-{self.run}").take(run=self.run)
            assert lease is not None
            self._open.callback(self._try_to, "give the run's lease back", lease.release)
            self._begin(plan)
            self._waiting = {name: stage for name, stage in self.graph.stages.items() if name in planner.chosen}
            try:
                self._loop()
            except KeyboardInterrupt:
                self._signal = self._signal or signal.SIGINT
                self._abandon()
            except Superseded:
                self._let_go()  # without a last word: the journal is another's
                raise
            except Exception as error:
                if os.environ.get("GPTLINE_DEBUG"):
                    traceback.print_exc()
                what = str(error) if isinstance(error, (OSError, ConfigError)) else f"{type(error).__name__}: {error}"
                self._say({"type": "said", "text": f"can't go on: {what}"})
                self._broken = f"the {f'store {self.store.root}' if isinstance(error, OSError) else 'driver'} failed ({what})"
                self._abandon()
            return self._end()

    # ---- before ----

    def _forecast(self, plan: list[Decision]) -> None:
        for text in forecast(plan, self.graph.loaded.file.about_itself()):
            self._say({"type": "said", "text": text})

    def _planner(self, code_root: Path, user_folders: Mapping[str, Path] = MappingProxyType({})) -> Planner:
        asked = self.options
        return Planner(
            self.graph,
            self.store,
            code_root,
            user_folders=user_folders,
            fresh=asked.fresh,
            given=asked.use,
            until=asked.until,
            inline=asked.inline,
        )

    def _remote(self) -> bool:
        return self.graph.loaded.file.cluster.address != "local"

    def _join(self, to_make: list[Stage]) -> None:
        """Open the session, until the run ends. ConfigError says what it can never hold: who asked for that would wait for ever."""
        self._open.enter_context(self._session())
        self._joined = True
        if faults := [*lacks_in_cluster(to_make), *(unshared(self.store) if self._remote() else [])]:
            raise ConfigError(self.graph.loaded.path, faults)
        self._open.enter_context(self._signals())  # after the session: Ray puts a SIGTERM handler of its own in place

    @contextlib.contextmanager
    def _session(self) -> Iterator[None]:
        from cluster import ray_session

        address = self.graph.loaded.file.cluster.address
        self._say({"type": "said", "text": "starting Ray on this machine" if address == "local" else f"joining the Ray cluster {address}"})
        environment = {"PYTHONDONTWRITEBYTECODE": "1"}  # the snapshot is an artifact: nobody writes into it
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(ray_session.start(address, code_path=self._snapshot.path, environment=environment))
            except (OSError, RuntimeError, ValueError) as error:
                what = f"{address!r} can't be joined: {error}" if address != "local" else f"Ray does not start here: {error}"
                raise ConfigError(self.graph.loaded.path, [Fault("cluster.address", what)]) from error
            yield

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """First signal: finish the step and checkpoint. Second: stop now."""

        def heard(number: int, frame: FrameType | None) -> None:
            if self._signal is not None:
                raise KeyboardInterrupt
            self._signal = number
            if self.options.inline and not any(each.stage.kind.trains() for each in self._running.values()):
                raise KeyboardInterrupt

        before = {number: signal.signal(number, heard) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _begin(self, plan: list[Decision]) -> None:
        for run in dead_runs(self.store, wait=False):
            end_dead(self.store, run)
        file = self.graph.loaded.file
        record = {
            "run": self.run,
            "pipeline": file.pipeline,
            "config": self._resolved(),
            "config_path": str(self.graph.loaded.path),
            "command": self.options.command,
            "tracking": file.tracking.model_dump(),
            "started_ms": _now_ms(),
            "user": user_name(),
            "host": socket.gethostname(),
            "snapshot": self._snapshot.artifact.digest,
            "git": self.options.git,
        }
        self.store.backend.put_if_absent(f"runs/{self.run}/run.json", json.dumps(record, ensure_ascii=False).encode())
        self._journal = JournalWriter(self.store, self.run)
        expected = [each.expected_s for each in plan if each.action != "blocked"]
        forecast_s = None if any(each is None for each in expected) else sum(each for each in expected if each)
        begun = {name: record[name] for name in ("run", "pipeline", "command", "snapshot", "user", "host")}
        self._write("run_started", config=record["config_path"], versions=versions(), forecast_s=forecast_s, **begun)
        for decision in plan:
            self._write("stage_planned", stage=decision.stage, decision=decision.action, reason=decision.reason)
        self._tracker = self._start_tracking()

    def _start_tracking(self) -> Any:
        from pipelines.observe.delivery import start_tracking

        return start_tracking(self.store, self.run, self.graph.loaded.file.tracking.uri)

    def _resolved(self) -> dict[str, Any]:
        """The whole config with every default filled in."""
        file = self.graph.loaded.file.model_dump(mode="json")
        file["stages"] = {
            name: {
                "uses": stage.kind.uses,
                "inputs": stage.inputs,
                **stage.config.model_dump(mode="json"),
                "resources": stage.resources.model_dump(mode="json"),
                **({"gate": [gate.model_dump(mode="json") for gate in stage.gates]} if stage.gates else {}),
            }
            for name, stage in self.graph.stages.items()
        }
        return file

    # ---- the loop ----

    def _loop(self) -> None:
        stopping = False
        while self._waiting or self._running:
            if self._signal is None and self._stop_asked():
                self._signal = signal.SIGTERM  # from elsewhere, through the store: as if it had been sent here
            if self._signal is not None and not stopping:
                stopping = True
                self.store.backend.put(f"runs/{self.run}/stop", b"")
                self._say(
                    {"type": "said", "text": "stopping: training stages finish their step and save a checkpoint (again: stop at once)"}
                )
                self._waiting.clear()
                self._cancel_plain_stages()
            for stage in list(self._waiting.values()):
                self._consider(stage)
            for running in list(self._running.values()):
                self._attend(running)
            self._journal.keep_up()
            self._say_of_tracking(self._tracker.news())
            if self._waiting or self._running:
                time.sleep(LOOK_EVERY_S)

    def _consider(self, stage: Stage) -> None:
        """Start a stage whose inputs are there, take its output, or leave it for later."""
        upstream = self._planner_of_run.upstream(stage)
        closed = [self._closed[name] for name in upstream if name in self._closed]
        broken = [name for name in upstream if name in self._failed]
        if closed:
            self._finish(stage, "blocked", Decision(stage.name, "blocked", closed[0]))
            return
        if broken:
            reason = f"its input {broken[0]} {self._failed[broken[0]]}"
            self._finish(stage, "blocked", Decision(stage.name, "blocked", reason))
            return
        if any(name not in self._outputs for name in upstream):
            return
        if time.monotonic() - self._looked_at_s.get(stage.name, -LEASE_EVERY_S) < LEASE_EVERY_S:
            return
        self._looked_at_s[stage.name] = time.monotonic()
        decision = self._planner_of_run.decide(stage, self._outputs)
        if self._settled(stage, decision):
            return
        if not self.options.inline and not self._joined:
            self._join([stage])  # the plan had nothing to make, and things changed since
        assert decision.key is not None
        watch = self._watches.setdefault(decision.key, Watch(self.store, decision.key))
        holder = watch.taken_by()
        lease = watch.take(run=self.run, stage=stage.name) if holder is None else None
        if lease is None:
            if holder is not None and self._told.get(stage.name) != holder.get("run"):
                self._told[stage.name] = holder.get("run", "")
                self._write("note", stage=stage.name, text=f"waits for {describe(holder)}, who is building it")
            return
        # while the lease was being taken another run may have finished the work
        decision = self._planner_of_run.decide(stage, self._outputs, held=True)
        if self._settled(stage, decision):
            lease.release()
        elif self._recoded(stage):
            lease.release()
            self._finish(stage, "failed", decision, error=RECODED)
        else:
            self._start(stage, decision, lease)

    def _settled(self, stage: Stage, decision: Decision) -> bool:
        """What needs no making, or can't be made."""
        if decision.action == "reuse":
            self._reuse(stage, decision)
        elif decision.action == "blocked":
            self._finish(stage, "failed", decision, error=decision.reason)
        return decision.action in ("reuse", "blocked")

    def _recoded(self, stage: Stage) -> bool:
        """Whether what runs in this process may be other code than the key has: modules are imported when a stage first needs them."""
        return self.options.inline and self._planner_of_run.recoded(stage)

    def _start(self, stage: Stage, decision: Decision, lease: Lease) -> None:
        del self._waiting[stage.name]
        self._made = True
        steps = stage.config.steps if isinstance(stage.config, TrainSettings) else None
        self._write("stage_started", stage=stage.name, key=decision.key, decision=decision.action, reason=decision.reason, steps=steps)
        job = self._job(stage, decision)
        self._running[stage.name] = running = _Running(stage, decision, lease, None, _now_ms(), time.monotonic())
        self._begun.add(stage.name)
        if decision.forced:  # seen by later plans: until the series is recorded, it is a rerun that did not come to its end
            (self.store.work(job.key) / f"{decision.series}.0").mkdir(parents=True, exist_ok=True)
        if self.options.inline:
            running.task = _Inline(job, lambda event: self._heard(stage, event), lambda: self._signal is not None or self._stop_asked())
            return
        from cluster.ray_session import submit

        # a stage that trains holds nothing itself: a task that held what its gang waits for would never end
        room = {} if stage.kind.trains() else room_of(stage)
        running.task = submit(
            stream,
            job,
            name=f"{self.graph.loaded.file.pipeline}:{stage.name}",
            cpus=room.get("cpus_per_rank", 0),
            gpus=room.get("gpus_per_rank", 0),
            memory_gib=room.get("memory_gib"),
            labels=room.get("labels"),
            accelerator=room.get("accelerator"),
            environment={"OMP_NUM_THREADS": str(room.get("cpus_per_rank", 1))},
        )

    def _job(self, stage: Stage, decision: Decision) -> Job:
        planned = {name.removeprefix("source."): digest for name, digest in decision.leaves.items() if name.startswith("source.")}
        assert decision.key is not None
        inline = self.options.inline
        places = {} if inline else self._snapshot.references
        return Job(
            run=self.run,
            stage=stage.name,
            uses=places.get(stage.kind.uses, stage.kind.uses),
            user_folder=self.graph.user_folder() if inline else self._snapshot.user,
            functions={each.reference: places.get(each.reference, each.reference) for each in stage.user_code},
            config=stage.config.model_dump(mode="json"),
            inputs=decision.inputs,
            sources=[replace(source, sha256=planned[source.name]) for source in stage.sources],
            seed=self.graph.loaded.file.seed,
            store=self.store.root,
            key=decision.key,
            series=decision.series,
            resources=stage.resources,
            identity=identity(stage, inline=inline) if stage.kind.trains() else {},
            inline=inline,
        )

    def _attend(self, running: _Running) -> None:
        """Pass on a task's events, and deal with its end."""
        for event in running.task.poll():
            self._heard(running.stage, event)
        if not running.task.done:
            late = not running.task.started and time.monotonic() - running.started_s > WAITING_TOLD_S
            if late and not running.told and not running.stage.kind.trains():  # a gang tells of itself
                running.told = True
                self._write("note", stage=running.stage.name, text=waits_for(running.stage))
            return
        try:
            outcome = running.task.result()
        except Exception as error:
            outcome = Outcome(error=str(error))
        del self._running[running.stage.name]
        try:
            self._record(running, outcome)
        except OSError as error:
            said = outcome.error or f"what came of it can't be recorded: {error}"
            self._finish(running.stage, "failed", running.decision, error=said)
        finally:
            running.lease.release()

    def _heard(self, stage: Stage, event: Event) -> None:
        if event["type"] in ("points", "progress"):
            self._write(**{**event, "stage": stage.name})
        elif "text" in event:
            self._write("note", stage=stage.name, text=event["text"].removeprefix(f"{stage.name}: "))

    def _record(self, running: _Running, outcome: Outcome) -> None:
        stage, decision = running.stage, running.decision
        seconds = time.monotonic() - running.started_s
        if outcome.stopped:
            self._signal = self._signal or signal.SIGTERM  # the store's mark may reach a stage before it reaches this loop
            self._stopped(running, seconds=seconds)
            return
        damage = self.store.intact(outcome.output) if outcome.output else None
        recoded = outcome.output is not None and self._recoded(stage)
        if outcome.output is None or damage or recoded or running.lease.lost():
            error = outcome.error or damage or (RECODED if recoded else LEASE_LOST)
            if outcome.traceback:
                self.store.backend.put(f"runs/{self.run}/{stage.name}.traceback.txt", outcome.traceback.encode(errors="backslashreplace"))
            self._finish(stage, "failed", decision, seconds=seconds, error=error)
            return
        assert decision.key is not None
        assert outcome.output_kind is not None
        action = self.store.record(
            Action(
                key=decision.key,
                pipeline=self.graph.loaded.file.pipeline,
                stage=stage.name,
                kind=stage.kind.uses,
                run=self.run,
                leaves=decision.leaves,
                inputs=decision.inputs,
                output=outcome.output,
                output_kind=outcome.output_kind,
                figures=outcome.figures,
                curves=outcome.curves,
                operational=stage.operational() | ({"engine": "torch", "ranks": 1} if self.options.inline and stage.kind.trains() else {}),
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
        )
        self.store.note_latest(action.pipeline, stage.name, action.key, action.number)
        shutil.rmtree(self.store.work(action.key), ignore_errors=True)
        self._outputs[stage.name] = action.output
        if closed := closed_gate(stage, action):
            self._closed[stage.name] = closed
            self._write("note", stage=stage.name, text=closed)
        self._finish(stage, "done", decision, number=action.number, output=action.output, seconds=seconds)

    def _reuse(self, stage: Stage, decision: Decision) -> None:
        assert decision.output is not None
        self._outputs[stage.name] = decision.output
        action = decision.reused
        if action is not None:
            self.store.note_latest(self.graph.loaded.file.pipeline, stage.name, action.key, action.number)
        if decision.closed:
            self._closed[stage.name] = decision.closed
        for note in decision.notes:
            self._write("note", stage=stage.name, text=note)
        self._finish(stage, "reused", decision, number=action.number if action else None, output=decision.output, seconds=0.0)

    def _finish(self, stage: Stage, status: str, decision: Decision, **more: Any) -> None:
        self._waiting.pop(stage.name, None)
        if status in ("failed", "blocked", "stopped"):
            self._failed[stage.name] = {"failed": "failed", "blocked": "can't be built", "stopped": "was stopped"}[status]
        told = {"decision": decision.action, "reason": decision.reason, "key": decision.key, **more}
        self._write("stage_ended", stage=stage.name, status=status, **told)

    # ---- after ----

    def _cancel_plain_stages(self) -> None:
        """Stages that have no checkpoint are simply begun again next time."""
        for running in list(self._running.values()):
            if not running.stage.kind.trains() and not self.options.inline:
                running.task.cancel()
                del self._running[running.stage.name]
                running.lease.release()
                self._stopped(running)

    def _abandon(self) -> None:
        """Stop at once: what is on disk is what is kept."""
        self._let_go()
        for running in self._running.values():
            self._try_to(f"write down that {running.stage.name} was stopped", self._stopped, running)
        self._running.clear()

    def _let_go(self) -> None:
        for running in self._running.values():
            if running.task is not None and not self.options.inline:
                self._try_to(f"end {running.stage.name}", running.task.cancel)
            self._try_to(f"give back the lease of {running.stage.name}", running.lease.release)

    def _stopped(self, running: _Running, **more: Any) -> None:
        """A stage's last word is where it goes on next time, and no longer why it was begun."""
        assert running.decision.key is not None
        made_so_far = attempts(self.store.work(running.decision.key), running.decision.series)
        checkpoint, _ = newest_checkpoint(made_so_far, verify=False)
        reason = "begins again next time" if checkpoint is None else f"saved at step {checkpoint.step}"
        self._finish(running.stage, "stopped", replace(running.decision, reason=reason), **more)

    def _end(self) -> int:
        """The last words, each for itself: of a store that is full or gone, what can still be said is said."""
        self._try_to("name the newest model", self._name_newest_model)
        failed = [name for name, how in self._failed.items() if how == "failed"]
        closed = "".join(f"{each}. " for each in self._closed.values())
        fresh = "".join(f" --fresh {shlex.quote(name)}" for name in self.options.fresh if name not in self._begun)
        go_on = f"go on with: {self.options.go_on}{fresh}"
        if self._signal is not None:
            status, code, text = "KILLED", 128 + self._signal, f"interrupted; {go_on}"
        elif failed:
            status, code = "FAILED", 1
            text = f"{closed}{' and '.join(failed)} failed; the other results are kept. Mend it, then {go_on}"
        elif self._broken:
            status, code = "FAILED", 1
            text = f"{self._broken}; what the store has is kept. Mend it, then {go_on}"
        elif closed:
            status, code, text = "FAILED", 1, f"{closed}Then {go_on}"
        else:
            status, code, text = "FINISHED", 0, ""
        ended = {"status": status, "exit_code": code, "text": text}
        if not self._try_to("write down how the run ended", self._write, "run_ended", **ended):
            self._say({"type": "run_ended", "time_ms": _now_ms(), **ended})
        self._try_to("make the run's page", self._render_page)
        # a run that only reused ends at once: what delivers it is a process of its own
        if self._made:
            self._try_to("wait for MLflow", lambda: self._say_of_tracking(self._tracker.finish(TRACKING_DEADLINE_S)))
        return code or int(bool(self._broken))

    def _try_to(self, what: str, action: Callable[..., object], *arguments: Any, **named: Any) -> bool:
        """Where it can't be done, a sentence says so, and the exit code: who comes next has something to do of its own."""
        try:
            action(*arguments, **named)
        except Exception as error:
            self._broken = self._broken or f"could not {what}"
            self._say({"type": "said", "text": f"could not {what}: {type(error).__name__}: {error}"})
            return False
        return True

    def _render_page(self) -> None:
        from pipelines.observe.page import render

        page = f"runs/{self.run}/page.html"
        self.store.backend.put(page, render(self.store, self.run).encode(errors="backslashreplace"))
        for name, figures in self._figures().items():
            measured = ", ".join(f"{figure.removeprefix('eval/')} {value:.4g}" for figure, value in figures.items())
            self._say({"type": "said", "text": f"{name}: {measured}"})
        self._say({"type": "said", "text": f"the run's page: {self.graph.loaded.file.store.root}/{page}"})

    def _say_of_tracking(self, sentence: str | None) -> None:
        if sentence is not None and sentence != self._tracking_said:
            self._tracking_said = sentence
            self._say({"type": "said", "text": sentence})

    def _figures(self) -> dict[str, dict[str, float]]:
        """Stage to what it measured, in this run or in the one that made its output."""
        found = {}
        for name in self._outputs:
            latest = self.store.latest(self.graph.loaded.file.pipeline, name)
            if latest is not None and latest.output == self._outputs[name] and latest.figures:
                found[name] = latest.figures
        return found

    def _name_newest_model(self) -> None:
        """`model:<pipeline>@newest` is the line's last policy that this run made or reused: no import, and none whose gate is closed.

        A run that came to less than the whole line names one only where there was none: it would take a finished assistant away.
        """
        pipeline = self.graph.loaded.file.pipeline
        partial = self._signal is not None or self._broken or self._failed or self._closed or self.options.until
        if partial and self.store.pointed(pipeline, "newest") not in {None, *(self._outputs[name] for name in self._closed)}:
            return
        for name, stage in self.graph.stages.items():
            own = name not in self._planner_of_run.given and stage.kind.uses != IMPORTS["model"]
            if own and name in self._outputs and name not in self._closed:
                made = self.store.artifact(self._outputs[name])
                if isinstance(made, Model) and made.metadata.get("role") == "policy":
                    self.store.point(pipeline, "newest", made.digest)

    def _write(self, type: str, **fields: Any) -> None:
        self._say(self._journal.write(type, **fields))


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Processes that a stage starts from here find the user's code where those of a Ray worker do."""
    sys.path.append(str(folder))  # last: the rest of it is here already
    try:
        yield
    finally:
        sys.path[:] = [each for each in sys.path if each != str(folder)]  # whatever a stage did to it


class _Inline:
    """A stage in this process, with the interface of a Ray task: it runs when it is first polled."""

    def __init__(self, job: Job, emit: Callable[[Event], None], should_stop: Callable[[], bool]) -> None:
        self.done = False
        self.started = True
        self._run = lambda: execute(job, emit, should_stop)

    def poll(self) -> list[Event]:
        self._outcome = self._run()
        self.done = True
        return []

    def result(self) -> Outcome:
        return self._outcome


def new_run(pipeline: str) -> str:
    """The id of a run that begins now. Its last part begins with the 256th of the second, so that runs of one second have an order."""
    now_s = time.time()
    return f"{time.strftime('%Y%m%d-%H%M%S', time.localtime(now_s))}-{pipeline}-{int(now_s % 1 * 256):02x}{secrets.token_hex(2)}"


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def dead_runs(store: Store, *, wait: bool = True) -> list[str]:
    """Runs without a last word whose driver is gone. `wait`: watch drivers of other machines until it is sure, half a minute at most."""
    last_events = {run: last_event(store, run) for run in store.runs()}
    open_runs = [run for run, last in last_events.items() if last is not None and last["type"] != "run_ended"]
    if wait:
        return [name.removeprefix("run-") for name in dead(store, [f"run-{run}" for run in open_runs])]
    return [run for run in open_runs if Watch(store, f"run-{run}").taken_by() is None]
