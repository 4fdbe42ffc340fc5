"""mlflow_session.py: a finished assistant becomes a version of the registered model, once per digest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mlflow_runs import a_pretraining, a_reusing, an_assistant, children, client, forget, free_port, newest, server, versions

from pipelines.observe.delivery import Sender, sync
from pipelines.observe.mlflow_session import MlflowModels
from pipelines.store.store import Store


@pytest.mark.slow
def test_a_runs_assistant_becomes_one_version_per_digest_and_newest_follows_the_store(store: Store, tmp_path: Path) -> None:
    first = an_assistant(store, "r1")
    second = an_assistant(store, "r2", weights="rl of another seed")
    a_reusing(store, "r3", [first["sft"], first["rl"]])
    store.set_alias("line", "newest", first["rl"].output)
    assert [line for line in sync(store, "sqlite") if "refused" in line] == []
    mlflow = client(store)
    assert versions(mlflow) == [("1", first["rl"].output), ("2", second["rl"].output)]
    assert newest(mlflow) == first["rl"].output
    forget(store)
    for run in ("r2", "r1", "r3"):  # in any order, and as often as one likes
        assert Sender(store, run, "sqlite").deliver().error is None
    assert len(versions(mlflow)) == 2
    assert newest(mlflow) == first["rl"].output
    store.set_alias("line", "newest", second["rl"].output)
    forget(store)
    Sender(store, "r1", "sqlite").deliver()
    assert newest(mlflow) == second["rl"].output
    version = mlflow.get_model_version_by_alias("line", "newest")
    model = mlflow.get_logged_model(version.tags["gptline.model_id"])
    assert (version.source, version.run_id) == (model.artifact_location, model.source_run_id)
    assert version.run_id == children(mlflow, "r2")["rl"].info.run_id
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": "line", "version": 2}]


@pytest.mark.slow
def test_registering_a_model_touches_only_the_named_database(store: Store, tmp_path: Path) -> None:
    an_assistant(store, "r1")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    command = [sys.executable, "-m", "pipelines.observe.tracker", str(store), "r1", "sqlite", "--driver", str(os.getpid())]
    root = str(Path(__file__).resolve().parents[3])
    subprocess.run(command, check=True, cwd=elsewhere, env={**os.environ, "PYTHONPATH": root})
    assert list(elsewhere.iterdir()) == []  # no mlflow.db of the ambient tracking URI
    assert len(versions(client(store))) == 1


@pytest.mark.slow
def test_base_models_reward_models_and_models_of_killed_runs_are_not_registered(store: Store) -> None:
    store.set_alias("line", "newest", a_pretraining(store, "a base model", points=10).output)
    a_reusing(store, "a reward model", [an_assistant(store, "killed", status="KILLED")["reward_model"]])
    for run in ("a base model", "killed", "a reward model"):
        assert Sender(store, run, "sqlite").deliver().error is None
    mlflow = client(store)
    assert mlflow.search_registered_models() == []
    statuses = [children(mlflow, run)[""].info.status for run in ("a base model", "killed", "a reward model")]
    assert statuses == ["FINISHED", "KILLED", "FINISHED"]


@pytest.mark.slow
def test_an_assistant_is_registered_once_even_if_the_delivery_broke_off_after_it(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    made = an_assistant(store, "r1")

    def gone(*_: Any) -> None:
        raise OSError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowModels, "set_newest", gone)
        assert "did not take this run (gone)" in str(Sender(store, "r1", "sqlite").deliver().error)
    mlflow = client(store)
    assert children(mlflow, "r1")[""].info.status == "RUNNING"
    assert Sender(store, "r1", "sqlite").deliver().error is None
    assert versions(mlflow) == [("1", made["rl"].output)]
    assert newest(mlflow) == made["rl"].output


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_server_that_was_down_gets_each_assistant_once_with_its_alias(store: Store) -> None:
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    first = an_assistant(store, "r1")
    assert "can't be reached" in str(Sender(store, "r1", uri).deliver().error)
    second = an_assistant(store, "r2", weights="rl of another seed")
    with server(store, port):
        lines = sync(store, uri)
        assert [line for line in lines if "refused" in line or "has all of" in line] == [f"MLflow {uri} has all of 2 runs"]
        mlflow = client(store, uri)
        for _ in range(2):
            forget(store)
            assert Sender(store, "r1", uri).deliver().error is None
            assert versions(mlflow) == [("1", first["rl"].output), ("2", second["rl"].output)]
            assert newest(mlflow) == second["rl"].output
        model = mlflow.get_logged_model(mlflow.get_model_version("line", "1").tags["gptline.model_id"])
        assert model.params["chat_format"] == "gptline-1"
        assert len(json.loads(model.tags["mlflow.modelVersions"])) == 1
