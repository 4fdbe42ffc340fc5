"""How a run ends: the newest model's alias, the last event, the run's page, MLflow. Each step is tried even if one before it failed."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection
from typing import Any

from pipelines.artifacts import Model
from pipelines.observe.page import render
from pipelines.observe.tracker import Tracker
from pipelines.plan.graph import Graph
from pipelines.plan.references import IMPORTS
from pipelines.run.recorder import Recorder, RunState
from pipelines.store.events import Announcement, JournalEvent, RunEnded
from pipelines.store.runs import RunFolder
from pipelines.store.store import Store

TRACKING_DEADLINE_S = 20.0


class Ending:
    """Ends one run. A store that is full or gone does not keep the remaining steps from being tried."""

    def __init__(
        self,
        graph: Graph,
        store: Store,
        run: str,
        continue_command: str,
        state: RunState,
        show: Callable[[JournalEvent | Announcement], None],
    ) -> None:
        self.broken = ""
        """Why the run itself failed, whatever its stages came to."""
        self._graph = graph
        self._store = store
        self._folder = RunFolder(store, run)
        self._continue_command = continue_command
        self._state = state
        self._show = show

    def attempt(self, what: str, action: Callable[..., object], *arguments: Any) -> bool:
        """Run a cleanup step; report a failure and set the exit code, but continue with the next step."""
        try:
            action(*arguments)
        except Exception as error:
            self.broken = self.broken or f"could not {what}"
            self._announce(f"could not {what}: {type(error).__name__}: {error}")
            return False
        return True

    def end(
        self,
        recorder: Recorder,
        tracker: Tracker,
        *,
        given: Collection[str],
        fresh: Collection[str],
        until: str | None,
        signal: int | None,
    ) -> int:
        """End the run and return its exit code.

        The command line named the outputs of the stages `given`, asked for the stages `fresh` to run again, and for none behind `until`;
        `signal` stopped the run.
        """
        partial = bool(signal is not None or self.broken or self._state.fates or self._state.closed or until)
        self.attempt("name the newest model", self._name_newest_model, given, partial)
        ended = self._last_event(fresh, signal)
        if not self.attempt("record how the run ended", recorder.write, ended):
            self._show(ended)
        self.attempt("write the run's page", self._write_page)
        if self._state.started:  # a run that only reused ends at once; the process that delivers it to MLflow outlives it
            self.attempt("wait for MLflow", self._wait_for, tracker)
        code = ended.exit_code or 0
        return code or int(bool(self.broken))

    def _last_event(self, fresh: Collection[str], signal: int | None) -> RunEnded:
        failed = self._state.failed()
        closed = "".join(f"{each}. " for each in self._state.closed.values())
        again = "".join(f" --fresh {shlex.quote(name)}" for name in fresh if name not in self._state.started)
        resume = f"resume with: {self._continue_command}{again}"
        if signal is not None:
            return RunEnded(status="KILLED", exit_code=128 + signal, text=f"interrupted; {resume}")
        if failed:
            text = f"{closed}{' and '.join(failed)} failed; the other results are kept. Fix the cause, then {resume}"
        elif self.broken:
            text = f"{self.broken}; what the store has is kept. Fix the cause, then {resume}"
        elif closed:
            text = f"{closed}Then {resume}"
        else:
            return RunEnded(status="FINISHED", exit_code=0)
        return RunEnded(status="FAILED", exit_code=1, text=text)

    def _write_page(self) -> None:
        name = self._folder.write_page(render(self._store, self._folder.run))
        for stage, figures in self._figures().items():
            measured = ", ".join(f"{figure.removeprefix('eval/')} {value:.4g}" for figure, value in figures.items())
            self._announce(f"{stage}: {measured}")
        self._announce(f"the run's page: {self._graph.loaded.file.store.root}/{name}")

    def _figures(self) -> dict[str, dict[str, float]]:
        """Stage to its figures, from this run or from the one that built its output."""
        found = {}
        for name, output in self._state.outputs.items():
            latest = self._store.latest(self._graph.loaded.file.pipeline, name)
            if latest is not None and latest.output == output and latest.figures:
                found[name] = latest.figures
        return found

    def _wait_for(self, tracker: Tracker) -> None:
        if (sentence := tracker.finish(TRACKING_DEADLINE_S)) is not None:
            self._announce(sentence)

    def _name_newest_model(self, given: Collection[str], partial: bool) -> None:
        """Point `model:<pipeline>@newest` at the last policy that this run built or reused: not an import, and not behind a closed gate.

        A run that did not complete the pipeline only sets the alias if there is none, or if it points behind a gate that is closed now:
        otherwise it would replace a finished assistant.
        """
        pipeline = self._graph.loaded.file.pipeline
        state = self._state
        if partial and self._store.alias(pipeline, "newest") not in {None, *(state.outputs[name] for name in state.closed)}:
            return
        for name, stage in self._graph.stages.items():
            own = name not in given and stage.kind.uses != IMPORTS["model"]
            if own and name in state.outputs and name not in state.closed:
                artifact = self._store.artifact(state.outputs[name])
                if isinstance(artifact, Model) and artifact.metadata.get("role") == "policy":
                    self._store.set_alias(pipeline, "newest", artifact.digest)

    def _announce(self, text: str) -> None:
        self._show(Announcement(text))
