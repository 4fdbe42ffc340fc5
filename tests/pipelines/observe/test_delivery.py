"""delivery.py: MLflow may be down, late or fresh, and several senders may be at work: each event arrives once."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow_runs import START_MS, a_pretraining, begin, children, client, ended, free_port, points

from cluster.events import Point
from pipelines.observe.delivery import Delivery, Sender, sync
from pipelines.observe.mlflow_address import resolve_uri
from pipelines.observe.mlflow_session import MlflowSession
from pipelines.observe.tracker import follow
from pipelines.store.events import RunEnded, StagePoints, StageStarted
from pipelines.store.store import Store


@pytest.mark.slow  # it needs this machine's sockets
def test_a_dead_server_costs_one_sentence_and_no_time(store: Store) -> None:
    a_pretraining(store, "r1")
    uri = f"http://127.0.0.1:{free_port()}"
    began_s = time.monotonic()
    delivery = Sender(store, "r1", uri).deliver()
    assert time.monotonic() - began_s < 5  # MLflow itself would try for longer
    assert delivery == Delivery(
        0,
        f"MLflow {uri} can't be reached (connection refused): what happens is kept in the run's journal, "
        f"and the next run or `gptline sync` sends it when MLflow is back",
    )


def test_unknown_fields_in_a_cursor_of_another_version_are_ignored(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(store, "r1").flush()
    monkeypatch.setattr("pipelines.observe.delivery.unreachable", lambda uri: "gone")
    assert Sender(store, "r1", "http://there").deliver().error is not None
    [cursor] = store.machine_file("runs/r1").glob("tracking-*.json")
    cursor.write_text('{"segments": 1, "parent": "what older versions wrote"}')
    assert Sender(store, "r1", "http://there").deliver() == Delivery(0)  # the one segment was delivered


def test_sync_sends_each_run_to_its_own_mlflow_unless_one_is_named_for_all(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for run, uri in (("r1", "http://there:5000"), ("r2", None), ("r3", "http://there:5000"), ("r4", "http://elsewhere")):
        begin(store, run, uri=uri).flush()
    monkeypatch.setattr("pipelines.observe.delivery.unreachable", lambda uri: "gone")
    lines = [line.split(" can't be reached")[0] for line in sync(store, None)]
    assert lines == ["MLflow http://there:5000", "MLflow sqlite", "MLflow http://elsewhere"]
    assert [line.split(" can't be reached")[0] for line in sync(store, "http://other")] == ["MLflow http://other"]


@pytest.mark.slow
@pytest.mark.parametrize("command", ["sync", "the sender of a later run"])
def test_each_run_of_a_store_arrives_at_its_own_mlflow(store: Store, tmp_path: Path, command: str) -> None:
    other = f"sqlite:///{tmp_path}/other.db"
    for run, uri in (("r1", other), ("r2", "sqlite")):
        begin(store, run, uri=uri).write(RunEnded(status="FINISHED", exit_code=0, text="done"))
    if command == "sync":
        expected = [
            "r1  2 events delivered",
            f"MLflow {other} has all of 1 run",
            "r2  2 events delivered",
            "MLflow sqlite has all of 1 run",
        ]
        assert sync(store, None) == expected
    else:
        follow(store, "r2", "sqlite", alive=lambda: False)
    assert (set(children(client(store, other), "r1")), set(children(client(store, other), "r2"))) == ({""}, set())
    assert (set(children(client(store), "r1")), set(children(client(store), "r2"))) == (set(), {""})


@pytest.mark.slow
def test_sync_ends_a_run_whose_driver_died_and_its_open_stages_as_killed(store: Store) -> None:
    writer = begin(store, "r1")
    writer.write(StageStarted(stage="pretrain", key="k", decision="run", reason="", steps=3))
    Sender(store, "r1", "sqlite").deliver()
    assert {run.info.status for run in children(client(store), "r1").values()} == {"RUNNING"}
    assert sync(store, "sqlite", dead=["r1"])[:2] == ["r1  ended as KILLED: its driver is gone", "r1  1 events delivered"]
    assert {run.info.status for run in children(client(store), "r1").values()} == {"KILLED"}


@pytest.mark.slow
def test_a_fresh_database_under_the_same_name_gets_everything_again(store: Store) -> None:
    a_pretraining(store, "r1", points=10)
    sync(store, "sqlite")
    store.machine_file("mlflow.db").unlink()
    # this process keeps the old file open; a person's next command is a process of its own
    subprocess.run([sys.executable, "-c", f"from pipelines.store.store import *; from pipelines.observe.delivery import *; sync(Store(Path({str(store)!r})), 'sqlite')"], check=True)  # fmt: skip  # noqa: E501
    counted = (
        "from mlflow import MlflowClient as M; m = M({!r}); print(len(m.search_runs([m.get_experiment_by_name('line').experiment_id])))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", counted.format(resolve_uri("sqlite", store))], capture_output=True, check=True, text=True
    )
    assert printed.stdout.split()[-1] == "3"


@pytest.mark.slow
def test_a_file_that_mlflow_refused_is_named_by_sync_and_sent_again_by_the_next_one(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(store, "r1").write(RunEnded(status="FINISHED", exit_code=0, text="done"))
    log_file = MlflowSession.log_file

    def full(session: MlflowSession, run_id: str, name: str, text: str) -> None:
        if name == "page.html":
            raise OSError("no space left")
        log_file(session, run_id, name, text)

    with monkeypatch.context() as patch:
        patch.setattr(MlflowSession, "log_file", full)
        refused = "r1  MLflow refused: page.html: no space left"
        last = "MLflow sqlite has all of 1 run except what it refused: 1 item, see above"
        assert sync(store, None) == ["r1  2 events delivered", refused, last]
        assert sync(store, None) == [refused, last]
    assert sync(store, None) == ["MLflow sqlite has all of 1 run"]
    mlflow = client(store)
    files = {each.path for each in mlflow.list_artifacts(children(mlflow, "r1")[""].info.run_id)}
    assert files == {"config.json", "lineage.html", "lineage.mmd", "page.html"}


@pytest.mark.slow
def test_ending_a_run_prints_nothing_of_mlflows_own(store: Store) -> None:
    a_pretraining(store, "r1", points=3)
    code = "import sys; from pathlib import Path; from pipelines.observe.delivery import sync; from pipelines.store.store import Store\n"
    code += "sync(Store(Path(sys.argv[1])), 'sqlite')"
    printed = subprocess.run([sys.executable, "-c", code, str(store)], capture_output=True, check=True, text=True)
    assert printed.stdout == ""
    assert "View run" not in printed.stderr


@pytest.mark.slow
def test_two_senders_at_once_on_one_fresh_database_show_one_run(store: Store) -> None:
    a_pretraining(store, "r1", points=50)
    command = [sys.executable, "-m", "pipelines.observe.tracker", str(store), "r1", "sqlite", "--driver", str(os.getpid())]
    both = [subprocess.Popen(command) for _ in range(2)]
    assert [each.wait(250) for each in both] == [0, 0]
    mlflow = client(store)
    assert len(points(mlflow, children(mlflow, "r1")["pretrain"].info.run_id)) == 50
    assert Sender(store, "r1", "sqlite").deliver().sent == 0


@pytest.mark.slow
@pytest.mark.parametrize("dies", [False, True], ids=["and continues", "and dies before it moves the cursor"])
def test_a_stage_that_another_sender_showed_first_is_shown_once(store: Store, monkeypatch: pytest.MonkeyPatch, dies: bool) -> None:
    writer = begin(store, "r1")
    follower, other_sender = Sender(store, "r1", "sqlite"), Sender(store, "r1", "sqlite")
    assert follower.deliver() == Delivery(1)
    writer.write(StageStarted(stage="pretrain", key="k", decision="run", reason="new", steps=3))
    if dies:

        def killed(*_: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Sender, "_save", killed)
            with pytest.raises(KeyboardInterrupt):
                other_sender.deliver()
    else:
        assert other_sender.deliver() == Delivery(1)
    writer.write(StagePoints(stage="pretrain", curves={"train/loss": [Point(1, 5.0, START_MS)]}))
    writer.flush()
    assert follower.deliver() == Delivery(2 if dies else 1)
    ended(writer, "pretrain", None, "failed", "run")
    assert follower.deliver() == Delivery(1)
    mlflow = client(store)
    shown = children(mlflow, "r1")  # which fails where one stage has two runs
    assert {stage: run.info.status for stage, run in shown.items()} == {"": "RUNNING", "pretrain": "FAILED"}
    assert points(mlflow, shown["pretrain"].info.run_id) == [(1, 5.0, START_MS)]
    assert f"runs/{shown['pretrain'].info.run_id}?" in shown[""].data.tags["mlflow.note.content"]
