"""A run from outside: the store's word first, Ray's where the store has none."""

from __future__ import annotations

import io
import json
import os
import re
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.events import Point
from cluster.jobs import Jobs, JobState
from pipelines.run import follow
from pipelines.run.follow import known, newest, show_log, status, stop
from pipelines.store.events import RunEnded, RunStarted, StageEnded, StagePlanned, StagePoints, StageProgress, StageStarted
from pipelines.store.journal import JournalWriter, read_journal
from pipelines.store.lease import Lease, Watch
from pipelines.store.store import Store

FIRST, SECOND = "20261122-100000-small-aaaa", "20261122-110000-small-bbbb"
ADDRESS = "http://127.0.0.1:8265"


class Ray:
    """What a cluster would say; itself the door to it."""

    def __init__(self, *states: JobState | None, log: str = "", error: Exception | None = None) -> None:
        """Each look at the job sees the next of `states`, at last always the last one."""
        self.states = list(states)
        self.printed = log
        self.error = error
        self.stopped: list[str] = []
        self.knocked: list[str] = []

    def __call__(self, address: str) -> Jobs:
        self.knocked.append(address)
        if self.error is not None:
            raise self.error
        return self  # type: ignore[return-value]

    def state(self, run: str) -> JobState | None:
        return self.states.pop(0) if len(self.states) > 1 else self.states[0]

    def log(self, run: str) -> str:
        return self.printed

    def stop(self, run: str) -> None:
        self.stopped.append(run)


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOOK_EVERY_S", "ASK_EVERY_S"):
        monkeypatch.setattr(follow, name, 0.01)
    still = SimpleNamespace(monotonic=time.monotonic, time_ns=lambda: 1_790_000_000 * 10**9)  # a run takes 0:00, on any machine
    monkeypatch.setattr("pipelines.store.events.time", still)


@pytest.fixture
def begun(store: Store) -> Callable[..., tuple[JournalWriter, Lease]]:
    """A run under way: its journal, and the lease that its driver, this process, holds."""
    leases = []

    def begin(run: str = FIRST) -> tuple[JournalWriter, Lease]:
        lease = Watch(store, f"run-{run}").take(run=run)
        assert lease is not None
        leases.append(lease)
        journal = JournalWriter(store, run)
        journal.write(RunStarted(pipeline="small", run=run))
        return journal, lease

    yield begin
    for lease in leases:
        lease.release()


def submitted(store: Store, run: str = FIRST) -> None:
    store.backend.put(f"runs/{run}/job.json", json.dumps({"address": ADDRESS, "submitted_ms": 0}).encode())


def train(journal: JournalWriter, steps_done: int) -> None:
    journal.write(StagePlanned(stage="tokenize", decision="reuse", reason="made by run before"))
    journal.write(StageEnded(stage="tokenize", status="reused", decision="reuse", output="ab" * 32))
    journal.write(StageStarted(stage="pretrain", key="k", decision="run", reason="not built here before", steps=30))
    points = [Point(step, 1.0, 0) for step in range(1, steps_done + 1)]
    journal.write(StagePoints(stage="pretrain", curves={"train/loss": points}))
    journal.flush()


def end(journal: JournalWriter, status: str = "FINISHED", text: str = "") -> None:
    journal.write(StageEnded(stage="pretrain", status="done", decision="run", output="cd" * 32, seconds=2.0))
    journal.write(RunEnded(status=status, exit_code=0, text=text))


# ---- status ----


def test_a_run_under_way_is_told_by_its_stage_and_step(store: Store, begun: Any) -> None:
    journal, _ = begun()
    train(journal, 12)
    (line,) = status(store, None, Ray())
    assert re.fullmatch(rf"{FIRST}  RUNNING    pretrain at step 12 of 30, since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d", line)
    store.backend.put(f"runs/{FIRST}/stop", b"")
    assert status(store, FIRST, Ray())[0].startswith(f"{FIRST}  STOPPING   pretrain at step 12")


def test_a_stage_that_counts_no_steps_is_told_by_its_share(store: Store, begun: Any) -> None:
    journal, _ = begun()
    journal.write(StageStarted(stage="documents", key="k", decision="run", reason="", steps=None))
    journal.write(StageProgress(stage="documents", done=43, total=100, unit="files"))
    journal.flush()
    assert "documents 43%, since" in status(store, None, Ray())[0]


def test_the_newest_ten_are_shown_and_ray_is_not_asked_of_what_has_ended(store: Store, begun: Any) -> None:
    for hour in range(10, 22):
        run = f"20261122-{hour}0000-small-aaaa"
        journal, _ = begun(run)
        submitted(store, run)
        train(journal, 30)
        end(journal)
    ray = Ray(None)
    lines = status(store, None, ray)
    assert [line.split("-")[1] for line in lines] == [f"{hour}0000" for hour in range(12, 22)]
    assert all("FINISHED   1 reused, 1 made in 0:00, ended " in line for line in lines)
    assert ray.knocked == []


def test_a_store_without_runs_says_so(store: Store) -> None:
    assert status(store, None, Ray()) == [f"the store {store.root} has no runs yet"]
    with pytest.raises(ValueError, match="has no runs yet"):
        newest(store)


@pytest.mark.parametrize(
    ("state", "told"),
    [
        (JobState("PENDING"), f"PENDING    its job at {ADDRESS} is PENDING, submitted 1970"),
        (JobState("RUNNING"), f"STARTING   its job at {ADDRESS} is RUNNING, submitted 1970"),
        (
            JobState("FAILED", "runtime_env setup failed: no disk\nmore"),
            f"FAILED     its job at {ADDRESS} is FAILED: runtime_env setup failed",
        ),
        (JobState("FAILED", "a log", 2), f"FAILED     its job at {ADDRESS} is FAILED, exit code 2, submitted"),
        (None, f"SUBMITTED  the cluster at {ADDRESS} has no such job: it was restarted since, submitted"),
    ],
)
def test_a_job_whose_driver_has_not_spoken_is_told_by_ray(store: Store, state: JobState | None, told: str) -> None:
    submitted(store)
    (line,) = status(store, None, Ray(state))
    assert line.startswith(f"{FIRST}  {told}")


def test_a_cluster_that_can_not_be_asked_hides_nothing_and_is_knocked_at_once(store: Store, begun: Any) -> None:
    for run in (FIRST, SECOND):
        journal, _ = begun(run)
        submitted(store, run)
        train(journal, 3)
    ray = Ray(error=ConnectionError("nothing listens there"))
    lines = status(store, None, ray)
    assert [line.split(", ")[0] for line in lines] == [f"{run}  RUNNING    pretrain at step 3 of 30" for run in (FIRST, SECOND)]
    assert all(line.endswith(", nothing listens there") for line in lines)
    assert ray.knocked == [ADDRESS]


def test_a_driver_that_is_gone_gets_its_last_word_from_who_looks(store: Store, begun: Any) -> None:
    journal, lease = begun()
    train(journal, 3)
    lease.release()
    (line,) = status(store, None, Ray())
    assert line.startswith(f"{FIRST}  KILLED     1 reused, 1 killed in ")
    assert "its driver is gone" in line
    last = read_journal(store, FIRST)[-1]
    assert isinstance(last, RunEnded)
    assert last.status == "KILLED"


def test_ray_knows_at_once_that_a_driver_elsewhere_is_gone(store: Store, begun: Any) -> None:
    journal, _ = begun()  # its lease looks alive, as that of another machine's dead driver does for half a minute
    submitted(store)
    train(journal, 3)
    (line,) = status(store, None, Ray(JobState("FAILED", "a log", -9)))
    assert line.startswith(f"{FIRST}  KILLED ")
    assert f"its driver is gone: its job at {ADDRESS} is FAILED, exit code -9" in line


# ---- which run ----


def test_an_unknown_run_is_answered_with_the_nearest(store: Store, begun: Any) -> None:
    begun(FIRST)
    begun(SECOND)
    assert known(store, FIRST) == FIRST
    with pytest.raises(ValueError, match=f"there is no run '20261122-100000-small-aaab' in .*; the nearest are {FIRST}, {SECOND}$"):
        known(store, "20261122-100000-small-aaab")
    with pytest.raises(ValueError, match=rf"there is no run '\.\./\.\.' in .*; the nearest are {FIRST}, {SECOND}$"):
        known(store, "../..")


def test_where_no_run_is_named_the_newest_open_one_is_meant(store: Store, begun: Any) -> None:
    begun(FIRST)
    journal, _ = begun(SECOND)
    assert newest(store) == SECOND
    end(journal)
    assert newest(store) == FIRST
    submitted(store, "20261122-120000-small-cccc")
    assert newest(store) == "20261122-120000-small-cccc"


# ---- logs ----


LINES = [
    "tokenize    reuse: abababababab  made by run before",
    "pretrain    run: not built here before",
    "pretrain    made: 2.0 s  cdcdcdcdcdcd",
    "1 reused, 1 made in 0:00",
]


def test_a_log_is_what_run_would_have_printed(store: Store, begun: Any) -> None:
    journal, _ = begun()
    train(journal, 3)
    out = io.StringIO()
    show_log(store, FIRST, out, Ray())
    assert out.getvalue().splitlines() == LINES[:2]
    end(journal, text="all is well")
    out = io.StringIO()
    show_log(store, FIRST, out, Ray())
    assert out.getvalue().splitlines() == [*LINES, "all is well"]


def test_lines_of_a_long_training_are_told_by_the_journals_clock(store: Store, begun: Any) -> None:
    begun()
    name = f"runs/{FIRST}/journal/00000002.jsonl"
    events: list[dict[str, Any]] = [{"time_ms": 0, "type": "stage_started", "stage": "pretrain", "decision": "run", "steps": 30}]
    events += [
        {"time_ms": 5000 * n, "type": "points", "stage": "pretrain", "points": [["train/loss", n, 2.0, 5000 * n]]} for n in (1, 2, 3, 6)
    ]
    store.backend.put(name, "".join(json.dumps(event) + "\n" for event in events).encode())
    out = io.StringIO()
    show_log(store, FIRST, out, Ray())
    assert out.getvalue().splitlines() == [
        "pretrain    run",
        "pretrain    step 3/30  loss 2.000  left 2:15",
        "pretrain    step 6/30  loss 2.000  left 2:00",
    ]


def test_following_waits_for_the_driver_and_goes_on_to_the_end(store: Store, begun: Any) -> None:
    submitted(store)
    ray = Ray(JobState("PENDING"), JobState("PENDING"), JobState("RUNNING"))
    out = io.StringIO()
    follower = threading.Thread(target=show_log, args=(store, FIRST, out, ray), kwargs={"follow": True})
    follower.start()
    while len(ray.states) > 1:
        time.sleep(0.01)
    journal, _ = begun()
    train(journal, 3)
    end(journal)
    follower.join(20)
    assert not follower.is_alive()
    said = out.getvalue().splitlines()
    assert said[0] == f"its job at {ADDRESS} is PENDING"
    assert said[-4:] == LINES
    assert said[1:-4] in ([], [f"its job at {ADDRESS} is RUNNING"])


def test_following_ends_where_the_driver_was_killed(store: Store, begun: Any) -> None:
    journal, lease = begun()
    train(journal, 3)
    lease.release()
    out = io.StringIO()
    show_log(store, FIRST, out, Ray(), follow=True)
    assert out.getvalue().splitlines() == [*LINES[:2], "its driver ended without a last event; what it finished is kept"]


@pytest.fixture
def begins_when_looked_for(store: Store, begun: Any, monkeypatch: pytest.MonkeyPatch) -> list[JournalWriter]:
    """Whoever looks for the driver first finds none, and it begins right after that look."""
    look, journals = Watch.holder, []

    def late(watch: Watch) -> Any:
        if journals:
            return look(watch)
        journals.append(None)
        journals[:] = [begun()[0]]
        train(journals[0], 3)
        return None

    monkeypatch.setattr(Watch, "holder", late)
    return journals


def test_a_driver_that_begins_as_it_is_looked_for_is_followed(store: Store, begins_when_looked_for: Any) -> None:
    submitted(store)
    out = io.StringIO()
    follower = threading.Thread(target=show_log, args=(store, FIRST, out, Ray(JobState("PENDING"))), kwargs={"follow": True})
    follower.start()
    while not store.backend.list(f"runs/{FIRST}/journal/"):
        time.sleep(0.01)
    time.sleep(0.1)  # several more looks
    end(begins_when_looked_for[0])
    follower.join(20)
    assert out.getvalue().splitlines() == LINES


def test_a_driver_that_begins_as_it_is_stopped_is_not_taken_for_dead(store: Store, begins_when_looked_for: Any) -> None:
    submitted(store)
    stop(store, FIRST, lambda sentence: None, Ray(JobState("RUNNING")), deadline_s=0.3)
    assert not any(isinstance(event, RunEnded) for event in read_journal(store, FIRST))


def test_a_job_that_failed_before_its_driver_spoke_shows_its_own_log(store: Store) -> None:
    submitted(store)
    out = io.StringIO()
    show_log(store, FIRST, out, Ray(JobState("FAILED", "a log", 127), log="sh: no such python\n"), follow=True)
    assert out.getvalue().splitlines() == [f"its job at {ADDRESS} is FAILED, exit code 127", "sh: no such python"]


# ---- stop ----


def test_stop_sets_the_mark_waits_and_says_what_became_of_the_run(store: Store, begun: Any) -> None:
    journal, _ = begun()
    train(journal, 3)

    def heed() -> None:
        while store.backend.get(f"runs/{FIRST}/stop") is None:
            time.sleep(0.01)
        journal.write(StageEnded(stage="pretrain", status="stopped", decision="run", reason="saved at step 4"))
        journal.write(RunEnded(status="KILLED", exit_code=143, text="interrupted; go on with: gptline run small.toml"))

    driver = threading.Thread(target=heed)
    driver.start()
    said: list[str] = []
    assert stop(store, FIRST, said.append, Ray())
    driver.join()
    assert said[0] == f"{FIRST}: asked to stop; training stages finish their step and save a checkpoint"
    assert said[1] == f"{FIRST} ended: KILLED, 1 reused, 1 stopped in 0:00; interrupted; go on with: gptline run small.toml"
    assert stop(store, FIRST, said.append, Ray())
    assert said[2] == f"{FIRST} has ended already: KILLED"


def test_stop_waits_no_longer_than_its_deadline(store: Store, begun: Any) -> None:
    journal, _ = begun()
    train(journal, 3)
    said: list[str] = []
    assert not stop(store, FIRST, said.append, Ray(), deadline_s=0.05)
    assert said[-1] == f"{FIRST} is still stopping after 0 s; `gptline status {FIRST}` shows when it has ended"


def test_stop_reads_each_segment_once_however_long_it_waits(store: Store, begun: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    journal, _ = begun()
    train(journal, 3)
    looks, read = [], []
    real = store.backend.get

    def get(name: str) -> bytes | None:
        (read if name.endswith("/00000001.jsonl") else looks).append(name)
        return real(name)

    monkeypatch.setattr(store.backend, "get", get)
    assert not stop(store, FIRST, lambda line: None, Ray(), deadline_s=0.1)
    assert len(looks) > 2
    assert read == [f"runs/{FIRST}/journal/00000001.jsonl"]


def test_stop_tells_the_last_word_of_a_driver_that_ended_while_it_was_taken_for_dead(
    store: Store, begun: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal, lease = begun()
    train(journal, 3)
    lease.release()
    real = follow.end_dead_run

    def ended_meanwhile(store: Store, run: str) -> bool:
        end(journal)
        return real(store, run)

    monkeypatch.setattr(follow, "end_dead_run", ended_meanwhile)
    said: list[str] = []
    assert stop(store, FIRST, said.append, Ray())
    assert said[1:] == [f"{FIRST} ended: FINISHED, 1 reused, 1 made in 0:00"]


def test_stop_of_a_run_whose_driver_is_gone_ends_it(store: Store, begun: Any) -> None:
    journal, lease = begun()
    train(journal, 3)
    lease.release()
    said: list[str] = []
    assert stop(store, FIRST, said.append, Ray())
    assert said[-1] == f"{FIRST}: its driver ended without a last event; what it finished is kept"
    assert isinstance(read_journal(store, FIRST)[-1], RunEnded)


def test_stop_of_a_job_that_waits_to_be_started_asks_ray(store: Store) -> None:
    submitted(store)
    ray = Ray(JobState("PENDING"), JobState("STOPPED"))
    said: list[str] = []
    assert stop(store, FIRST, said.append, ray)
    assert ray.stopped == [FIRST]
    assert said[1:] == [f"its job at {ADDRESS} is PENDING", f"its job at {ADDRESS} is STOPPED"]


def test_stop_of_a_driver_that_does_not_come_to_its_journal_asks_ray_in_the_end(store: Store) -> None:
    submitted(store)
    ray = Ray(JobState("RUNNING"))
    said: list[str] = []
    assert not stop(store, FIRST, said.append, ray, deadline_s=0.05)
    assert ray.stopped == [FIRST]
    assert "did not begin within 0 s, so its job was stopped" in said[-1]


def test_stop_of_a_run_that_never_began_has_nothing_to_do(store: Store) -> None:
    os.makedirs(store.root / "runs" / FIRST)
    said: list[str] = []
    assert stop(store, FIRST, said.append, Ray())
    assert said == [f"{FIRST} never began: there is nothing to stop"]
