"""A run seen from another process: where it is, what it reported, how it is stopped.

The run's journal in the store is the truth, for a run on this machine as for a submitted one. Ray's view of a job is used while there is no
journal yet, and when a driver ended without writing its last event.
"""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable
from functools import partial
from typing import TextIO

from cluster.jobs import Jobs, JobState
from pipelines.observe.progress import Progress, tally
from pipelines.observe.summary import summary_of
from pipelines.observe.view import RunView, StageView, run_view, share_done
from pipelines.store.events import RunEnded
from pipelines.store.journal import JournalReader, dead_runs, driver_lease, end_dead_run, last_event
from pipelines.store.lease import Watch
from pipelines.store.runs import RunFolder
from pipelines.store.store import Store

NEWEST = 10
LOOK_EVERY_S = 0.5
ASK_EVERY_S = 2.0
STOP_DEADLINE_S = 90.0
NO_DRIVER = "its driver ended without a last event; what it finished is kept"
NOT_BEGUN = "its driver was killed before it began, or is just beginning"

Connect = Callable[[str], Jobs]
"""Opens the job server at a cluster's address; raises what `Jobs` raises."""


def connect(address: str) -> Jobs:
    """`submit` accepted this address, so an insecure one was allowed then."""
    return Jobs(address, insecure=True)


def known(store: Store, run: str) -> str:
    """The run's id. ValueError names the nearest ids if there is no such run."""
    runs = store.runs()
    if run in runs:
        return run
    near = difflib.get_close_matches(run, runs, n=3, cutoff=0.4) or runs[-3:]
    raise ValueError(f"there is no run {run!r} in {store}; " + (f"the nearest are {', '.join(near)}" if near else "it has no runs yet"))


def newest(store: Store) -> str:
    """The newest run that has not ended, or else the newest. ValueError if there are no runs."""
    runs = store.runs()[::-1]
    if not runs:
        raise ValueError(f"the store {store} has no runs yet")
    return next((run for run in runs if _is_open(store, run)), runs[0])


def status(store: Store, run: str | None, connect: Connect) -> list[str]:
    """One line for each of the newest runs, or for this one. Runs whose driver is gone are ended first."""
    for each in dead_runs(store, wait=False):
        end_dead_run(store, each)
    runs = store.runs()[-NEWEST:] if run is None else [run]
    clusters = _Clusters(connect)
    lines = [(each, *_standing(store, each, clusters)) for each in runs]
    width = max((len(each) for each, _, _ in lines), default=0)
    return [f"{each:<{width}}  {state:<9}  {what}" for each, state, what in lines] or [f"the store {store} has no runs yet"]


def show_log(store: Store, run: str, out: TextIO, connect: Connect, *, follow: bool = False) -> None:
    """Print what `gptline run` would have printed; with `follow`, until the run ends.

    If its driver wrote no event, what its job printed is shown instead.
    """
    now_s = 0.0
    reader, watch = JournalReader(store, run), Watch(store, driver_lease(run))
    reported = ""
    with Progress(out, live=False, clock=lambda: now_s, summarize=partial(summary_of, store)) as progress:
        while True:
            had_begun = reader.cursor > 0
            driver_lives = watch.holder() is not None  # before reading, so that its last event is read below
            for event in reader.read():
                now_s = event.time_ms / 1000
                progress.show(event)
            if progress.view.status != "RUNNING":
                return
            if reader.cursor:
                if had_begun and not driver_lives:  # a driver that began only after the look could not be seen
                    progress.say(NO_DRIVER)
                    return
                if not follow:
                    return
                time.sleep(LOOK_EVERY_S)
                continue
            state, sentence = _job_state(store, run, connect)
            if not follow or state is None or state.ended:
                progress.say(sentence)
                out.write(_job_log(store, run, connect))
                return
            if sentence != reported:
                progress.say(reported := sentence)
            time.sleep(ASK_EVERY_S)


def stop(store: Store, run: str, say: Callable[[str], None], connect: Connect, deadline_s: float = STOP_DEADLINE_S) -> bool:
    """Ask a run to finish its step, save and end. Whether it has ended by the deadline."""
    reader, view = JournalReader(store, run), RunView(run)

    def has_ended() -> bool:
        for event in reader.read():
            view.add(event)
        return view.status != "RUNNING"

    if has_ended():
        say(f"{run} has ended already: {view.status}")
        return True
    folder = RunFolder(store, run)
    if view.started_ms is None and folder.job() is None:
        say(f"{run} never began: there is nothing to stop")
        return True
    folder.request_stop()
    say(f"{run}: asked to stop; training stages finish their step and save a checkpoint")
    if view.started_ms is None:
        state, sentence = _job_state(store, run, connect)
        say(sentence)
        if state is None or state.ended:
            return state is not None
        if state.status == "PENDING":
            connect(_address(store, run)).stop(run)
    watch = Watch(store, driver_lease(run))
    until_s = time.monotonic() + deadline_s
    asked_at_s = time.monotonic()
    while time.monotonic() < until_s:
        had_begun, driver_lives = view.started_ms is not None, watch.holder() is not None
        if has_ended():
            say(f"{run} ended: {view.status}, {tally(view)}; {view.text}".removesuffix("; "))
            return True
        if had_begun and not driver_lives and end_dead_run(store, run):
            say(f"{run}: {NO_DRIVER}")
            return True
        if view.started_ms is None and time.monotonic() - asked_at_s > ASK_EVERY_S:
            asked_at_s = time.monotonic()
            state, sentence = _job_state(store, run, connect)
            if state is not None and state.ended:
                say(sentence)
                return True
        time.sleep(LOOK_EVERY_S)
    if view.started_ms is None:
        connect(_address(store, run)).stop(run)
        say(f"{run} did not begin within {deadline_s:.0f} s, so its job was stopped; `gptline status {run}` shows how it ends")
    else:
        say(f"{run} is still stopping after {deadline_s:.0f} s; `gptline status {run}` shows when it has ended")
    return False


class _Clusters:
    """Connects to each cluster once, however many runs were sent to it."""

    def __init__(self, connect: Connect) -> None:
        self._connect = connect
        self._known: dict[str, Jobs | Exception] = {}

    def __call__(self, address: str) -> Jobs:
        if address not in self._known:
            try:
                self._known[address] = self._connect(address)
            except (OSError, ValueError) as error:
                self._known[address] = error
        found = self._known[address]
        if isinstance(found, Exception):
            raise found
        return found


def _standing(store: Store, run: str, connect: Connect) -> tuple[str, str]:
    """A run's state in one word, and a sentence about it."""
    view = run_view(store, run)
    if view.status != "RUNNING":
        return view.status, _sentence(tally(view), view.text.partition("; ")[0], _at("ended", view.ended_ms))
    folder = RunFolder(store, run)
    job = folder.job()
    if job is None and view.started_ms is None:
        return "NEVER", NOT_BEGUN
    state, sentence = (None, "") if job is None else _job_state(store, run, connect)
    if view.started_ms is None:
        assert job is not None
        word = "SUBMITTED" if state is None else "STARTING" if state.status == "RUNNING" else state.status
        return word, _sentence(sentence, _at("submitted", job.submitted_ms))
    if state is not None and state.ended:
        end_dead_run(store, run, f"its driver is gone: {sentence}")
        return _standing(store, run, connect)
    running = [_where(stage) for stage in view.stages.values() if stage.status == "running"]
    word = "STOPPING" if folder.stop_requested() else "RUNNING"
    return word, _sentence(", ".join(running) or "between stages", _since_newest(view), sentence)


def _job_state(store: Store, run: str, connect: Connect) -> tuple[JobState | None, str]:
    """Ray's view of a submitted run and a sentence about it; None if Ray has no such job or can't be asked."""
    if RunFolder(store, run).job() is None:
        return None, NOT_BEGUN
    address = _address(store, run)
    try:
        state = connect(address).state(run)
    except (OSError, ValueError) as error:
        return None, str(error)
    if state is None:
        return None, f"the cluster at {address} has no such job: it was restarted since"
    code = "" if state.exit_code is None else f", exit code {state.exit_code}"
    why = state.message.partition("\n")[0] if state.status == "FAILED" and state.exit_code is None else ""
    return state, f"its job at {address} is {state.status}{code}" + (f": {why}" if why else "")


def _job_log(store: Store, run: str, connect: Connect) -> str:
    if RunFolder(store, run).job() is None:
        return ""
    try:
        return connect(_address(store, run)).log(run)
    except (OSError, ValueError):
        return ""  # the reason was reported with the job's state


def _address(store: Store, run: str) -> str:
    job = RunFolder(store, run).job()
    assert job is not None
    return job.address


def _is_open(store: Store, run: str) -> bool:
    last = last_event(store, run)
    return RunFolder(store, run).job() is not None if last is None else not isinstance(last, RunEnded)


def _where(stage: StageView) -> str:
    if stage.step is not None and stage.steps:
        return f"{stage.name} at step {stage.step:,} of {stage.steps:,}"
    share = share_done(stage)
    return stage.name if share is None else f"{stage.name} {share:.0%}"


def _since_newest(view: RunView) -> str:
    started = [stage.started_ms for stage in view.stages.values() if stage.status == "running" and stage.started_ms is not None]
    return _at("since", max(started, default=view.started_ms))


def _at(word: str, time_ms: int | None) -> str:
    return "" if time_ms is None else f"{word} {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(time_ms / 1000))}"


def _sentence(*parts: str) -> str:
    return ", ".join(part for part in parts if part)
