"""Following a run from outside: the store is asked first, and Ray only where the store can't tell."""

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
    """A fake cluster, and the function that connects to it."""

    def __init__(self, *states: JobState | None, log: str = "", error: Exception | None = None) -> None:
        """Each query of the job's state returns the next of `states`; the last one repeats."""
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
    frozen = SimpleNamespace(monotonic=time.monotonic, time_ns=lambda: 1_790_000_000 * 10**9)  # every run takes 0:00
    monkeypatch.setattr("pipelines.store.events.time", frozen)


@pytest.fixture
def begun(store: Store) -> Callable[..., tuple[JournalWriter, Lease]]:
    """Begin a run: return its journal, and the lease that its driver (this process) holds."""
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


def test_the_status_of_a_run_is_its_stage_and_step(store: Store, begun: Any) -> None:
    journal, _ = begun()
    train(journal, 12)
    (line,) = status(store, None, Ray())
    assert re.fullmatch(rf"{FIRST}  RUNNING    pretrain at step 12 of 30, since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d", line)
    store.backend.put(f"runs/{FIRST}/stop", b"")
    assert status(store, FIRST, Ray())[0].startswith(f"{FIRST}  STOPPING   pretrain at step 12")


def test_the_status_of_a_stage_without_steps_is_its_share(store: Store, begun: Any) -> None:
    journal, _ = begun()
    journal.write(StageStarted(stage="documents", key="k", decision="run", reason="", steps=None))
    journal.write(StageProgress(stage="documents", done=43, total=100, unit="files"))
    journal.flush()
    assert "documents 43%, since" in status(store, None, Ray())[0]


def test_the_newest_ten_runs_are_shown_and_ray_is_not_asked_about_finished_ones(store: Store, begun: Any) -> None:
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
    ("state", "shown"),
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
def test_ray_gives_the_status_of_a_job_whose_driver_has_not_started(store: Store, state: JobState | None, shown: str) -> None:
    submitted(store)
    (line,) = status(store, None, Ray(state))
    assert line.startswith(f"{FIRST}  {shown}")


def test_an_unreachable_cluster_hides_nothing_and_is_asked_only_once(store: Store, begun: Any) -> None:
    for run in (FIRST, SECOND):
        journal, _ = begun(run)
        submitted(store, run)
        train(journal, 3)
    ray = Ray(error=ConnectionError("nothing listens there"))
    lines = status(store, None, ray)
    assert [line.split(", ")[0] for line in lines] == [f"{run}  RUNNING    pretrain at step 3 of 30" for run in (FIRST, SECOND)]
    assert all(line.endswith(", nothing listens there") for line in lines)
    assert ray.knocked == [ADDRESS]


def test_status_ends_a_run_whose_driver_is_gone(store: Store, begun: Any) -> None:
    journal, lease = begun()
    train(journal, 3)
    lease.release()
    (line,) = status(store, None, Ray())
    assert line.startswith(f"{FIRST}  KILLED     1 reused, 1 killed in ")
    assert "its driver is gone" in line
    last = read_journal(store, FIRST)[-1]
    assert isinstance(last, RunEnded)
    assert last.status == "KILLED"


def test_ray_reports_at_once_that_a_driver_on_another_machine_is_gone(store: Store, begun: Any) -> None:
    journal, _ = begun()  # its lease looks held, as that of a dead driver on another machine does for half a minute
    submitted(store)
    train(journal, 3)
    (line,) = status(store, None, Ray(JobState("FAILED", "a log", -9)))
    assert line.startswith(f"{FIRST}  KILLED ")
    assert f"its driver is gone: its job at {ADDRESS} is FAILED, exit code -9" in line


# ---- which run ----


def test_an_unknown_run_is_refused_with_the_nearest(store: Store, begun: Any) -> None:
    begun(FIRST)
    begun(SECOND)
    assert known(store, FIRST) == FIRST
    with pytest.raises(ValueError, match=f"there is no run '20261122-100000-small-aaab' in .*; the nearest are {FIRST}, {SECOND}$"):
        known(store, "20261122-100000-small-aaab")
    with pytest.raises(ValueError, match=rf"there is no run '\.\./\.\.' in .*; the nearest are {FIRST}, {SECOND}$"):
        known(store, "../..")


def test_without_a_name_the_newest_run_that_has_not_ended_is_used(store: Store, begun: Any) -> None:
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


def test_a_log_is_what_gptline_run_prints(store: Store, begun: Any) -> None:
    journal, _ = begun()
    train(journal, 3)
    out = io.StringIO()
    show_log(store, FIRST, out, Ray())
    assert out.getvalue().splitlines() == LINES[:2]
    end(journal, text="all is well")
    out = io.StringIO()
    show_log(store, FIRST, out, Ray())
    assert out.getvalue().splitlines() == [*LINES, "all is well"]


def test_the_log_of_a_long_training_follows_the_journals_clock(store: Store, begun: Any) -> None:
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


def test_following_waits_for_the_driver_and_continues_to_the_end(store: Store, begun: Any) -> None:
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
    printed = out.getvalue().splitlines()
    assert printed[0] == f"its job at {ADDRESS} is PENDING"
    assert printed[-4:] == LINES
    assert printed[1:-4] in ([], [f"its job at {ADDRESS} is RUNNING"])


def test_following_ends_when_the_driver_was_killed(store: Store, begun: Any) -> None:
    journal, lease = begun()
    train(journal, 3)
    lease.release()
    out = io.StringIO()
    show_log(store, FIRST, out, Ray(), follow=True)
    assert out.getvalue().splitlines() == [*LINES[:2], "its driver ended without a last event; what it finished is kept"]


@pytest.fixture
def begins_when_looked_for(store: Store, begun: Any, monkeypatch: pytest.MonkeyPatch) -> list[JournalWriter]:
    """The first check for a driver finds none, and a driver starts right after it."""
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


def test_a_driver_that_starts_during_the_check_is_followed(store: Store, begins_when_looked_for: Any) -> None:
    submitted(store)
    out = io.StringIO()
    follower = threading.Thread(target=show_log, args=(store, FIRST, out, Ray(JobState("PENDING"))), kwargs={"follow": True})
    follower.start()
    while not store.backend.list(f"runs/{FIRST}/journal/"):
        time.sleep(0.01)
    time.sleep(0.1)  # several more checks
    end(begins_when_looked_for[0])
    follower.join(20)
    assert out.getvalue().splitlines() == LINES


def test_a_driver_that_starts_during_a_stop_does_not_count_as_dead(store: Store, begins_when_looked_for: Any) -> None:
    submitted(store)
    stop(store, FIRST, lambda sentence: None, Ray(JobState("RUNNING")), deadline_s=0.3)
    assert not any(isinstance(event, RunEnded) for event in read_journal(store, FIRST))


def test_the_log_of_a_job_that_failed_before_its_driver_started_is_rays(store: Store) -> None:
    submitted(store)
    out = io.StringIO()
    show_log(store, FIRST, out, Ray(JobState("FAILED", "a log", 127), log="sh: no such python\n"), follow=True)
    assert out.getvalue().splitlines() == [f"its job at {ADDRESS} is FAILED, exit code 127", "sh: no such python"]


# ---- stop ----


def test_stop_sets_the_mark_waits_and_reports_how_the_run_ended(store: Store, begun: Any) -> None:
    journal, _ = begun()
    train(journal, 3)

    def heed() -> None:
        while store.backend.get(f"runs/{FIRST}/stop") is None:
            time.sleep(0.01)
        journal.write(StageEnded(stage="pretrain", status="stopped", decision="run", reason="saved at step 4"))
        journal.write(RunEnded(status="KILLED", exit_code=143, text="interrupted; resume with: gptline run small.toml"))

    driver = threading.Thread(target=heed)
    driver.start()
    shown: list[str] = []
    assert stop(store, FIRST, shown.append, Ray())
    driver.join()
    assert shown[0] == f"{FIRST}: asked to stop; training stages finish their step and save a checkpoint"
    assert shown[1] == f"{FIRST} ended: KILLED, 1 reused, 1 stopped in 0:00; interrupted; resume with: gptline run small.toml"
    assert stop(store, FIRST, shown.append, Ray())
    assert shown[2] == f"{FIRST} has ended already: KILLED"


def test_stop_waits_no_longer_than_its_deadline(store: Store, begun: Any) -> None:
    journal, _ = begun()
    train(journal, 3)
    shown: list[str] = []
    assert not stop(store, FIRST, shown.append, Ray(), deadline_s=0.05)
    assert shown[-1] == f"{FIRST} is still stopping after 0 s; `gptline status {FIRST}` shows when it has ended"


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


def test_stop_reports_the_ending_of_a_driver_that_ended_while_it_counted_as_dead(
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
    shown: list[str] = []
    assert stop(store, FIRST, shown.append, Ray())
    assert shown[1:] == [f"{FIRST} ended: FINISHED, 1 reused, 1 made in 0:00"]


def test_stop_ends_a_run_whose_driver_is_gone(store: Store, begun: Any) -> None:
    journal, lease = begun()
    train(journal, 3)
    lease.release()
    shown: list[str] = []
    assert stop(store, FIRST, shown.append, Ray())
    assert shown[-1] == f"{FIRST}: its driver ended without a last event; what it finished is kept"
    assert isinstance(read_journal(store, FIRST)[-1], RunEnded)


def test_stop_stops_a_pending_job_through_ray(store: Store) -> None:
    submitted(store)
    ray = Ray(JobState("PENDING"), JobState("STOPPED"))
    shown: list[str] = []
    assert stop(store, FIRST, shown.append, ray)
    assert ray.stopped == [FIRST]
    assert shown[1:] == [f"its job at {ADDRESS} is PENDING", f"its job at {ADDRESS} is STOPPED"]


def test_stop_stops_a_job_through_ray_if_its_driver_writes_no_journal_in_time(store: Store) -> None:
    submitted(store)
    ray = Ray(JobState("RUNNING"))
    shown: list[str] = []
    assert not stop(store, FIRST, shown.append, ray, deadline_s=0.05)
    assert ray.stopped == [FIRST]
    assert "did not begin within 0 s, so its job was stopped" in shown[-1]


def test_stop_has_nothing_to_do_for_a_run_that_never_began(store: Store) -> None:
    os.makedirs(store.root / "runs" / FIRST)
    shown: list[str] = []
    assert stop(store, FIRST, shown.append, Ray())
    assert shown == [f"{FIRST} never began: there is nothing to stop"]
