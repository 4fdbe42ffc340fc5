"""Runs whose stages are Ray tasks: when the session is opened, what is reported while a stage waits, who may write the journal."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from cluster.events import StageEvent
from pipelines.plan.config import ConfigError
from pipelines.plan.planner import Decision
from pipelines.run.execute import execute
from pipelines.run.job import Job, Outcome
from pipelines.run.runner import Run
from pipelines.run.session import Session
from pipelines.store.events import Note, RunEnded
from pipelines.store.journal import Superseded, read_journal
from tests.pipelines.run.small import KINDS, OTHERS, TOML, Small


class Cluster:
    """A fake session: a submitted job runs in this process, at the third poll. It has one node of two CPUs, one of them in use."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import ray

        self.joined = self.cancelled = 0
        monkeypatch.setattr(Session, "_ray", self._ray)
        node = {"Alive": True, "NodeID": "4f", "NodeManagerHostname": "head", "Resources": {"CPU": 2.0, "memory": 2.0**31}}
        monkeypatch.setattr(ray, "nodes", lambda: [node])
        monkeypatch.setattr("ray._private.state.available_resources_per_node", lambda: {"4f": {"CPU": 1.0, "memory": 2.0**30}})
        monkeypatch.setattr("pipelines.run.supervisor.WAIT_REPORTED_AFTER_S", 0.0)
        monkeypatch.setattr("cluster.ray_session.submit", lambda function, job, **asked: LateTask(job, self))

    @contextlib.contextmanager
    def _ray(self) -> Iterator[None]:
        self.joined += 1
        yield


class LateTask:
    def __init__(self, job: Job, cluster: Cluster) -> None:
        self.started = self.done = False
        self._cluster = cluster
        self._job = job
        self._looks = 0

    def poll(self) -> list[StageEvent]:
        self._looks += 1
        if self._looks == 3:
            self._outcome = execute(self._job, lambda event: None, lambda: False)
            self.started = self.done = True
        return []

    def result(self) -> Outcome:
        return self._outcome

    def cancel(self) -> None:
        self._cluster.cancelled += 1


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(monkeypatch)


def test_a_stage_that_the_session_can_never_hold_is_refused_before_the_run_begins(small: Small, cluster: Cluster):
    small.write("small.toml", TOML + "\n[stages.words.resources]\nlabels = { tier = 'a100' }\n")
    with pytest.raises(ConfigError, match=r"words.resources: words asks for 1 CPU and labels .* but no node of the cluster has that"):
        small.run(inline=False)
    assert small.store.runs() == []


def test_a_stage_that_waits_for_resources_reports_them_once(small: Small, cluster: Cluster):
    small.write("small.toml", TOML + "\n[stages.words.resources]\ncpus = 2\nmemory_gib = 2\n")
    assert small.run(inline=False) == (0, {"words": "done", "cut": "done", "report": "done"})
    notes = [event.text for event in small.events if isinstance(event, Note) and event.stage == "words"]
    assert notes == ["waiting for 2 CPUs and 2 GiB (free now: 1 of 2 CPUs and 1.0 of 2.0 GiB on head)"]


def test_a_session_is_opened_when_an_artifact_to_reuse_is_gone(small: Small, cluster: Cluster, monkeypatch: pytest.MonkeyPatch):
    small.run()
    assert small.run(inline=False)[0] == 0
    assert cluster.joined == 0
    begin = Run._begin

    def lose_one(run: Run, plan: list[Decision], *others: Any) -> Any:
        begun = begin(run, plan, *others)
        digest = next(each.output for each in plan if each.stage == "cut")
        assert digest is not None
        (small.store.artifact(digest).path / "train.jsonl").unlink()
        return begun

    monkeypatch.setattr(Run, "_begin", lose_one)
    before = signal.getsignal(signal.SIGTERM)
    assert small.run(inline=False) == (0, {"words": "reused", "cut": "done", "report": "reused"})
    assert cluster.joined == 1
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_stage_that_lost_its_lease_records_nothing_and_says_what_to_do(small: Small):
    lose = "    [stage._store.backend.delete(each) for each in stage._store.backend.list(f'leases/{stage._job.key}')]\n    with stage.open"
    small.write("kinds.py", KINDS.replace("    with stage.open", lose))
    assert small.run() == (1, {"words": "failed", "cut": "blocked", "report": "blocked"})
    assert small.error().startswith("its lease was deleted or taken over by another run, so its result was not recorded; run again ")
    assert list(small.store.all_actions()) == []


def test_a_driver_whose_journal_was_taken_over_releases_its_stages_and_writes_no_more(small: Small, cluster: Cluster):
    end = (
        "    from pipelines.store.events import RunEnded\n"
        "    from pipelines.store.journal import JournalWriter\n"
        "    JournalWriter(stage._store, stage._job.run).write(RunEnded(status='KILLED'))\n"
    )
    small.write("kinds.py", KINDS.replace("    with stage.open", f"{end}    with stage.open"))
    small.write("small.toml", TOML + OTHERS)  # `others` runs meanwhile
    small.write("other.txt", "uvw")
    with pytest.raises(Superseded):
        small.run(inline=False)
    assert cluster.cancelled == 1
    (run,) = small.store.runs()
    assert isinstance(last := read_journal(small.store, run)[-1], RunEnded)
    assert last.status == "KILLED"
    for lease in small.store.backend.list("leases"):
        assert b'"released": true' in (small.store.backend.get(lease) or b"")
