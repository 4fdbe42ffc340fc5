"""A run as it is seen from another process: where it stands, what it said, and how it is stopped.

The store tells: the run's journal is the truth, for a run on this machine as for a submitted one. Ray's word on a job counts where there
is no journal yet, and where a driver ended without a last word.
"""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable
from typing import TextIO

from cluster.jobs import Jobs, JobState
from pipelines.journal import JournalReader, end_dead, last_event
from pipelines.lease import Watch
from pipelines.progress import Progress, RunView, StageView, run_view, share_done, tally
from pipelines.runner import dead_runs
from pipelines.store import Store
from pipelines.submission import submitted

NEWEST = 10
LOOK_EVERY_S = 0.5
ASK_EVERY_S = 2.0
STOP_DEADLINE_S = 90.0

Door = Callable[[str], Jobs]
"""From a cluster's address to its jobs; raises what `Jobs` raises."""


def door(address: str) -> Jobs:
    """The address is one that `submit` took, so what it refuses without --insecure was allowed then."""
    return Jobs(address, insecure=True)


def known(store: Store, run: str) -> str:
    """A run's id as it was given; ValueError names the nearest where there is none."""
    runs = store.runs()
    if run in runs:
        return run
    near = difflib.get_close_matches(run, runs, n=3, cutoff=0.4) or runs[-3:]
    raise ValueError(f"there is no run {run!r} in {store.root}; " + (f"the nearest are {', '.join(near)}" if near else "it has none yet"))


def newest(store: Store) -> str:
    """The newest run that has not ended, or else the newest; ValueError where there is none."""
    runs = store.runs()[::-1]
    if not runs:
        raise ValueError(f"the store {store.root} has no runs yet")
    return next((run for run in runs if _open(store, run)), runs[0])


def status(store: Store, run: str | None, door: Door) -> list[str]:
    """A line for each of the newest runs, or for this one; drivers that are gone get their last word first."""
    for each in dead_runs(store, wait=False):
        end_dead(store, each)
    runs = store.runs()[-NEWEST:] if run is None else [run]
    doors = _Doors(door)
    lines = [(each, *_standing(store, each, doors)) for each in runs]
    width = max((len(each) for each, _, _ in lines), default=0)
    return [f"{each:<{width}}  {word:<9}  {what}" for each, word, what in lines] or [f"the store {store.root} has no runs yet"]


def show_log(store: Store, run: str, out: TextIO, door: Door, *, follow: bool = False) -> None:
    """What `gptline run` would have printed of this run; `follow`: until it ends. Where its driver never spoke, what its job printed."""
    now_s = 0.0
    reader, watch = JournalReader(store, run), Watch(store, f"run-{run}")
    said = ""
    with Progress(out, live=False, clock=lambda: now_s) as progress:
        while True:
            begun = reader.cursor > 0
            driver_lives = watch.taken_by() is not None  # before reading: its last word is then read below
            for event in reader.read():
                now_s = event["time_ms"] / 1000
                progress.show(event)
            if progress.view.status != "RUNNING":
                return
            if reader.cursor:
                if begun and not driver_lives:  # one that has only begun since was not there to be seen
                    progress.say("its driver is gone, without a last word; what it has finished is kept")
                    return
                if not follow:
                    return
                time.sleep(LOOK_EVERY_S)
                continue
            state, sentence = _job(store, run, door)
            if not follow or state is None or state.ended:
                progress.say(sentence)
                out.write(_job_log(store, run, door))
                return
            if sentence != said:
                progress.say(said := sentence)
            time.sleep(ASK_EVERY_S)


def stop(store: Store, run: str, say: Callable[[str], None], door: Door, deadline_s: float = STOP_DEADLINE_S) -> bool:
    """Ask a run to finish its step, save and end; True when it has ended by the deadline, or had before."""
    reader, view = JournalReader(store, run), RunView(run)

    def look() -> str:
        for event in reader.read():
            view.add(event)
        return view.status

    if look() != "RUNNING":
        say(f"{run} has ended already: {view.status}")
        return True
    begun, job = view.started_ms is not None, submitted(store, run) is not None
    if not begun and not job:
        say(f"{run} never began: there is nothing to stop")
        return True
    store.backend.put(f"runs/{run}/stop", b"")
    say(f"{run}: asked to stop; training stages finish their step and save a checkpoint")
    if not begun:
        state, sentence = _job(store, run, door)
        say(sentence)
        if state is None or state.ended:
            return state is not None
        if state.status == "PENDING":
            door(_address(store, run)).stop(run)
    watch = Watch(store, f"run-{run}")
    until_s = time.monotonic() + deadline_s
    asked_at_s = time.monotonic()
    while time.monotonic() < until_s:
        begun, driver_lives = view.started_ms is not None, watch.taken_by() is not None
        if look() != "RUNNING":
            say(f"{run} ended: {view.status}, {tally(view)}; {view.text}".removesuffix("; "))
            return True
        if begun and not driver_lives and end_dead(store, run):
            say(f"{run}: its driver is gone, without a last word; what it has finished is kept")
            return True
        if view.started_ms is None and time.monotonic() - asked_at_s > ASK_EVERY_S:
            asked_at_s = time.monotonic()
            state, sentence = _job(store, run, door)
            if state is not None and state.ended:
                say(sentence)
                return True
        time.sleep(LOOK_EVERY_S)
    if view.started_ms is None:
        door(_address(store, run)).stop(run)
        say(f"{run} did not begin within {deadline_s:.0f} s: its job was stopped; `gptline status {run}` tells what becomes of it")
    else:
        say(f"{run} is still stopping after {deadline_s:.0f} s; `gptline status {run}` tells when it has ended")
    return False


class _Doors:
    """Each cluster is knocked at once, however many runs were sent to it."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._known: dict[str, Jobs | Exception] = {}

    def __call__(self, address: str) -> Jobs:
        if address not in self._known:
            try:
                self._known[address] = self._door(address)
            except (OSError, ValueError) as error:
                self._known[address] = error
        found = self._known[address]
        if isinstance(found, Exception):
            raise found
        return found


def _standing(store: Store, run: str, door: Door) -> tuple[str, str]:
    """A word and a sentence."""
    view = run_view(store, run)
    if view.status != "RUNNING":
        return view.status, _sentence(tally(view), view.text.partition("; ")[0], _since("ended", view.ended_ms))
    job = submitted(store, run)
    if job is None and view.started_ms is None:
        return "NEVER", "its driver was killed before it began, or begins just now"
    state, sentence = (None, "") if job is None else _job(store, run, door)
    if view.started_ms is None:
        assert job is not None
        word = "SUBMITTED" if state is None else "STARTING" if state.status == "RUNNING" else state.status
        return word, _sentence(sentence, _since("submitted", job["submitted_ms"]))
    if state is not None and state.ended:
        end_dead(store, run, f"its driver is gone: {sentence}")
        return _standing(store, run, door)
    stopping = store.backend.get(f"runs/{run}/stop") is not None
    under_way = [_under_way(stage) for stage in view.stages.values() if stage.status == "running"]
    return "STOPPING" if stopping else "RUNNING", _sentence(", ".join(under_way) or "between stages", _since_newest(view), sentence)


def _job(store: Store, run: str, door: Door) -> tuple[JobState | None, str]:
    """Ray's view of a submitted run, and a sentence about it; None when Ray has none, or can't be asked."""
    if submitted(store, run) is None:
        return None, "its driver was killed before it began, or begins just now"
    address = _address(store, run)
    try:
        state = door(address).state(run)
    except (OSError, ValueError) as error:
        return None, str(error)
    if state is None:
        return None, f"the cluster at {address} has no such job: it was started anew since"
    code = "" if state.exit_code is None else f", exit code {state.exit_code}"
    why = state.message.partition("\n")[0] if state.status == "FAILED" and state.exit_code is None else ""
    return state, f"its job at {address} is {state.status}{code}" + (f": {why}" if why else "")


def _job_log(store: Store, run: str, door: Door) -> str:
    if submitted(store, run) is None:
        return ""
    try:
        return door(_address(store, run)).log(run)
    except (OSError, ValueError):
        return ""  # why it can't be asked was said with its state


def _address(store: Store, run: str) -> str:
    job = submitted(store, run)
    assert job is not None
    return str(job["address"])


def _open(store: Store, run: str) -> bool:
    last = last_event(store, run)
    return submitted(store, run) is not None if last is None else last["type"] != "run_ended"


def _under_way(stage: StageView) -> str:
    if stage.step is not None and stage.steps:
        return f"{stage.name} at step {stage.step:,} of {stage.steps:,}"
    share = share_done(stage)
    return stage.name if share is None else f"{stage.name} {share:.0%}"


def _since_newest(view: RunView) -> str:
    started = [stage.started_ms for stage in view.stages.values() if stage.status == "running" and stage.started_ms is not None]
    return _since("since", max(started, default=view.started_ms))


def _since(word: str, time_ms: int | None) -> str:
    return "" if time_ms is None else f"{word} {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(time_ms / 1000))}"


def _sentence(*parts: str) -> str:
    return ", ".join(part for part in parts if part)
