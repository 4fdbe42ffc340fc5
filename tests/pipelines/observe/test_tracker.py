"""tracker.py: the process that delivers a run depends on neither the driver nor the server."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow_runs import START_MS, a_pretraining, begin, children, client, ended, free_port, is_zombie, points, seen, server, wait_for

from cluster.events import Point
from pipelines.observe.delivery import DeliveryState
from pipelines.observe.tracker import start_tracking
from pipelines.store.events import RunEnded, StagePoints, StageStarted
from pipelines.store.store import Store


@pytest.mark.slow
def test_the_sending_process_ends_by_itself_with_the_run(store: Store) -> None:
    tracker = start_tracking(store, "r1", "sqlite")
    a_pretraining(store, "r1")
    assert tracker.finish(200) is None
    assert tracker._process.wait(60) == 0
    mlflow = client(store)
    assert len(points(mlflow, children(mlflow, "r1")["pretrain"].info.run_id)) == 100


@pytest.mark.slow
def test_the_sending_process_outlives_a_killed_driver_and_delivers_what_it_wrote(store: Store) -> None:
    driver = (
        "import os, signal, sys; from pathlib import Path; from pipelines.store.store import Store\n"
        "from cluster.events import Point; from pipelines.store.events import RunStarted, StagePoints, StageStarted\n"
        "from pipelines.store.journal import JournalWriter\n"
        "from pipelines.observe.tracker import start_tracking\n"
        "store = Store(Path(sys.argv[1])); tracker = start_tracking(store, 'r1', 'sqlite'); writer = JournalWriter(store, 'r1')\n"
        "writer.write(RunStarted(pipeline='line')); writer.write(StageStarted(stage='pretrain', decision='run'))\n"
        "writer.write(StagePoints(stage='pretrain', curves={'train/loss': [Point(s, 1.0, s) for s in range(100)]})); writer.flush()\n"
        "print(tracker._process.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    ended = subprocess.run([sys.executable, "-c", driver, str(store)], capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGKILL
    wait_for(lambda: not Path(f"/proc/{int(ended.stdout)}").exists() or is_zombie(int(ended.stdout)))
    mlflow = client(store)
    assert len(points(mlflow, children(mlflow, "r1")["pretrain"].info.run_id)) == 100


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_server_that_is_down_at_first_and_killed_during_the_run_has_each_point_once_in_the_end(store: Store) -> None:
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    tracker = start_tracking(store, "r1", uri)
    writer = begin(store, "r1")
    writer.write(StageStarted(stage="pretrain", key="k", decision="run", reason="", steps=100))
    reported: list[str | None] = []
    wait_for(lambda: reported.append(tracker.news()) or reported[-1])
    assert "can't be reached (connection refused)" in str(reported[-1])
    assert tracker.news() is None  # reported once

    def train(steps: range) -> None:
        for step in steps:
            writer.write(StagePoints(stage="pretrain", curves={"train/loss": [Point(step, float(step), START_MS + step)]}))
            writer.flush()

    train(range(20))
    with server(store, port):
        wait_for(lambda: len(seen(store, uri)) == 20)
    train(range(20, 60))
    with server(store, port):
        train(range(60, 100))
        ended(writer, "pretrain", None, "failed", "run")
        writer.write(RunEnded(status="FAILED", exit_code=1, text=""))
        # `finish` does not wait while the newest attempt failed, so wait until the sender has noticed that the server is back
        wait_for(lambda: DeliveryState.read(store, "r1", uri).is_complete(store, "r1"))
        assert tracker.finish(200) is None
        assert seen(store, uri) == [(step, float(step), START_MS + step) for step in range(100)]
        assert children(client(store, uri), "r1")["pretrain"].info.status == "FAILED"
