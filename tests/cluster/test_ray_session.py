"""Tasks and their events, the code that workers import, and what is freed when a stage's task is killed."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import session_functions

from cluster import ray_session
from cluster.events import GangStarted
from cluster.ray_session import Session, Task, TaskDied, submit
from pipelines.run import preflight
from pipelines.store.store import Store

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("snapshot")
    for package in ("cluster", "gpt"):
        shutil.copytree(HERE.parents[1] / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "cluster" / "marker.py").write_text('VALUE = "from the snapshot"\n')
    return folder


@pytest.fixture(scope="module")
def session(snapshot: Path) -> Iterator[Session]:
    with ray_session.start(code_path=snapshot, cpus=2, environment={"PYTHONPATH": str(HERE)}) as session:
        yield session


def finished(task: Task, limit_s: float = 60) -> list[dict[str, Any]]:
    events = []
    until_s = time.monotonic() + limit_s
    while not task.done:
        assert time.monotonic() < until_s, "the task did not end"
        events += task.poll()
        time.sleep(0.02)
    return events


def connections(process: psutil.Process) -> list[Any]:
    try:
        return process.net_connections()
    except psutil.NoSuchProcess:  # it has just ended
        return []


def test_a_local_session_listens_only_on_the_loopback_interface(session: Session) -> None:
    listening = [
        connection.laddr.ip.removeprefix("::ffff:")
        for process in psutil.Process().children(recursive=True)
        for connection in connections(process)
        if connection.status == "LISTEN"
    ]
    assert listening
    assert set(listening) <= {"127.0.0.1", "::1"}
    assert os.environ["RAY_AUTH_MODE"] == "token"


def test_a_task_that_yields_three_events_streams_them_and_returns_its_value(session: Session) -> None:
    task = submit(session_functions.count, 3, name="count")
    assert finished(task) == [{"number": 0}, {"number": 1}, {"number": 2}]
    assert task.result() == "counted to 3"


def test_tasks_and_their_gangs_import_the_snapshot(session: Session, snapshot: Path, tmp_path: Path) -> None:
    task = submit(session_functions.where_code_comes_from, str(tmp_path / "work"), name="where", cpus=0)
    events = finished(task)
    expected = {"marker": "from the snapshot", "gpt": str(snapshot / "gpt" / "settings.py")}
    assert events[0] == {"task": expected}
    assert task.result() == expected


def test_a_task_waiting_for_cpus_has_not_started(session: Session) -> None:
    first = submit(session_functions.sleep, 2, name="first", cpus=2)
    while not first.started:
        first.poll()
    second = submit(session_functions.count, 1, name="second", cpus=2)
    assert (second.poll(), second.started) == ([], False)
    finished(second)
    assert second.started


def test_the_functions_exception_is_raised_with_its_type_and_message(session: Session) -> None:
    task = submit(session_functions.fail, "no such record", name="ingest")
    assert finished(task) == [{"before": "the end"}]
    with pytest.raises(ValueError, match=r"^no such record$"):
        task.result()


def test_a_task_that_breaks_its_output_does_not_break_the_next_one(session: Session) -> None:
    for how in ("closed", "none", "descriptors"):
        task = submit(session_functions.break_output, how, name=how, cpus=2)
        assert finished(task) == [{"broken": how}]
        assert task.result() == "done"
    task = submit(session_functions.count, 1, name="count", cpus=2)  # usually in the same process
    finished(task)
    assert task.result() == "counted to 1"


@pytest.mark.parametrize("how", ["closed", "none", "descriptors"])
def test_changes_to_stdout_and_stderr_are_undone(how: str) -> None:
    before = sys.stdout, sys.stderr
    assert list(session_functions.break_output(how)) == [{"broken": how}]
    assert (sys.stdout, sys.stderr) == before
    assert os.write(1, b"") == 0
    assert not sys.stdout.closed


def test_a_task_that_calls_os_exit_is_reported_with_the_possible_causes(session: Session) -> None:
    task = submit(session_functions.leave, "", name="ingest")
    finished(task)
    with pytest.raises(TaskDied) as caught:
        task.result()
    assert str(caught.value) == (
        "ingest: its process died without a message: it was killed (by SIGKILL, as the kernel does when memory runs out), "
        "it crashed in native code, or its code called os._exit"
    )


def test_a_killed_task_is_reported_as_such(session: Session) -> None:
    task = submit(session_functions.die, "", name="tokenize")
    finished(task)
    with pytest.raises(TaskDied, match=r"^tokenize: its process died without a message: it was killed"):
        task.result()


@pytest.mark.parametrize("end", ["kill", "cancel"])
def test_the_end_of_a_stages_task_ends_its_gang_and_frees_its_cpus(session: Session, tmp_path: Path, end: str) -> None:
    import ray

    task = submit(session_functions.stage_with_a_gang, str(tmp_path / "work"), name="pretrain", cpus=0)
    events: list[Any] = []
    until_s = time.monotonic() + 60
    while not any(isinstance(event, GangStarted) for event in events):
        assert time.monotonic() < until_s, "the gang did not start"
        events += task.poll()
        time.sleep(0.05)
    pids = next(event.pids for event in events if isinstance(event, GangStarted))
    if end == "kill":
        os.kill(events[0]["pid"], signal.SIGKILL)
    else:
        task.cancel()
    finished(task)
    until_s = time.monotonic() + 10
    while any(psutil.pid_exists(pid) for pid in pids) or ray.available_resources().get("CPU") != 2:
        assert time.monotonic() < until_s, (pids, ray.available_resources())
        time.sleep(0.1)
    with pytest.raises(TaskDied, match="pretrain: cancelled" if end == "cancel" else "SIGKILL"):
        task.result()


def test_every_node_answers_a_question_although_it_lacks_our_packages(session: Session, snapshot: Path, tmp_path: Path) -> None:
    assert not (snapshot / "pipelines").exists()
    store = Store(tmp_path / "shared")
    assert preflight.unshared(store) == []
    assert list((store.root / "tmp").iterdir()) == []

    def answer() -> str:
        return "has two eyes"

    def fail() -> str:
        raise ValueError("no idea")

    def think() -> str:
        import time

        time.sleep(60)
        return "late"

    (node,) = ray_session.ask_nodes(answer, 60)
    assert ray_session.ask_nodes(answer, 60) == {node: "has two eyes"}
    assert ray_session.ask_nodes(fail, 60) == {node: "can't answer: no idea"}
    assert ray_session.ask_nodes(think, 0.1) == {node: "did not answer within 0.1 s"}


def test_ray_is_started_twice_before_giving_up(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    asked = []

    def slow(**options: Any) -> None:
        asked.append(options)
        raise Exception("The current node timed out during startup. This could happen because ...")

    monkeypatch.setattr(ray, "init", slow)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with pytest.raises(RuntimeError, match="did not start within 30 s, in 2 attempts; the machine is too busy"):
        ray_session._init({"num_cpus": 2})
    assert [options["num_cpus"] for options in asked] == [2, 2]


def test_a_lost_cluster_ends_its_tasks_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def lost(*_: object, **__: object) -> None:
        raise ray.exceptions.RaySystemError("the connection to the head is gone")

    monkeypatch.setattr(ray, "wait", lost)
    monkeypatch.setattr(ray_session, "remove_groups_of", lost)
    task = Task("pretrain", None)
    task._worker_id = "ab12"
    assert task.poll() == []
    with pytest.raises(TaskDied, match=r"^pretrain: its process was lost: RaySystemError: .* the connection to the head is gone"):
        task.result()
