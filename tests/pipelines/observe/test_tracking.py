"""tracking.py and delivery.py: MLflow is a view of the journal. It may be dead, late or killed, and shows each thing once all the same."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.commit import canonical_json
from cluster.events import Point
from pipelines.observe.delivery import Delivery, Sender, sync
from pipelines.observe.mlflow_address import resolve_uri, unreachable
from pipelines.observe.mlflow_session import MlflowModels, MlflowSession
from pipelines.observe.mlflow_ui import serve_ui, ui_command
from pipelines.observe.tracker import follow, start_tracking
from pipelines.store.action import Action
from pipelines.store.events import RunEnded, RunStarted, StageEnded, StagePoints, StageStarted
from pipelines.store.journal import JournalWriter
from pipelines.store.store import Store

START_MS = 1_790_000_000_000


def artifact(store: Store, kind: str, text: str, **metadata: Any) -> str:
    folder = store.new_folder()
    (folder / "file").write_text(text)
    return store.publish(folder, kind, metadata).digest


def action(store: Store, stage: str, run: str, output: str, output_kind: str, **more: Any) -> Action:
    given: dict[str, Any] = dict(
        inputs={}, leaves={"config.lr": 0.1, "code.gpt.model:GPT": "abc"}, versions={"torch": "2.13.0"}, seconds=2.0
    )
    return store.record(
        Action(
            **(given | more), key=f"key-{stage}", pipeline="line", stage=stage, kind=stage, run=run, output=output, output_kind=output_kind,
            started_ms=START_MS, host="h", user="u", pid=1,
        )
    )  # fmt: skip


def begin(store: Store, run: str, stages: dict[str, Any] | None = None, uri: str | None = None) -> JournalWriter:
    info: dict[str, Any] = {
        "run": run,
        "pipeline": "line",
        "config": {"seed": 1, "stages": stages or {}},
        "command": "gptline run line.toml",
        "snapshot": "5" * 64,
    }
    if uri is not None:  # runs of older versions say nothing
        info["tracking"] = {"uri": uri}
    store.backend.put(f"runs/{run}/run.json", canonical_json(info))
    writer = JournalWriter(store, run)
    writer.write(RunStarted(pipeline="line", run=run, command="gptline run line.toml", user="u", host="h"))
    return writer


def a_pretraining(store: Store, run: str, points: int = 100) -> Action:
    """documents -> pretrain, with a curve of `points` points and one figure."""
    documents = artifact(store, "documents", "text", documents=3)
    writer = begin(store, run, {"pretrain": {"lr": 0.1, "files": ["a", "b"], "inputs": {"documents": ["documents"]}}})
    writer.write(StageStarted(stage="documents", key="key-documents", decision="run", reason="new"))
    made = action(store, "documents", run, documents, "documents")
    ended(writer, "documents", made, "done", "run")
    writer.write(StageStarted(stage="pretrain", key="key-pretrain", decision="run", reason="new", steps=points))
    curve = [Point(step, 5.0 - step / 100, START_MS + step) for step in range(points)]
    for at in range(0, points, 10):
        writer.write(StagePoints(stage="pretrain", curves={"train/loss": curve[at : at + 10]}))
        writer.flush()
    model = artifact(store, "model", "weights", role="policy")
    made = action(
        store, "pretrain", run, model, "model", inputs={"documents": [documents]}, curves={"train/loss": curve}, figures={"val/loss": 4.5}
    )  # fmt: skip
    ended(writer, "pretrain", made, "done", "run")
    writer.write(RunEnded(status="FINISHED", exit_code=0, text="done"))
    return made


def ended(writer: JournalWriter, stage: str, made: Action | None, status: Any, decision: Any) -> None:
    given = {} if made is None else {"key": made.key, "number": made.number, "output": made.output}
    writer.write(StageEnded(stage=stage, status=status, decision=decision, reason="nothing changed", seconds=2.0, **given))


def a_reusing(store: Store, run: str, made: list[Action]) -> None:
    writer = begin(store, run)
    for each in made:
        ended(writer, each.stage, each, "reused", "reuse")
    writer.write(RunEnded(status="FINISHED", exit_code=0, text="done"))


def client(store: Store, uri: str = "sqlite") -> Any:
    from mlflow import MlflowClient

    return MlflowClient(resolve_uri(uri, store))


def children(mlflow: Any, run: str, pipeline: str = "line") -> dict[str, Any]:
    """Stage to its run; "" is the parent. Two runs for one stage would show here."""
    experiment = mlflow.get_experiment_by_name(pipeline)
    found = [
        (each.data.tags.get("gptline.stage", ""), each)
        for each in mlflow.search_runs([experiment.experiment_id], f"tags.`gptline.run` = '{run}'")
    ]
    assert len(found) == len(dict(found))
    return dict(found)


def forget(store: Store) -> None:
    """Every cursor: all is sent anew, as by a sender that died before it moved one."""
    for cursor in store.machine_file("runs").glob("*/tracking-*.json"):
        cursor.unlink()


def points(mlflow: Any, run_id: str, metric: str = "train/loss") -> list[tuple[int, float, int]]:
    return sorted((each.step, each.value, each.timestamp) for each in mlflow.get_metric_history(run_id, metric))


def test_sqlite_is_a_file_inside_the_store(store: Store) -> None:
    assert resolve_uri("sqlite", store) == f"sqlite:///{store}/mlflow.db"
    assert resolve_uri("http://mlflow.example:5000", store) == "http://mlflow.example:5000"


@pytest.mark.slow  # it needs this machine's sockets
def test_a_dead_server_costs_one_sentence_and_no_time(store: Store) -> None:
    a_pretraining(store, "r1")
    uri = f"http://127.0.0.1:{free_port()}"
    began_s = time.monotonic()
    delivery = Sender(store, "r1", uri).deliver()
    assert time.monotonic() - began_s < 5  # MLflow itself would try for longer
    assert delivery == Delivery(
        0,
        f"MLflow {uri} can't be reached (connection refused): what happens is kept in the run's journal "
        f"and sent when it is back, at the next run or `gptline sync`",
    )


@pytest.mark.slow  # it needs this machine's sockets
def test_a_server_that_takes_connections_and_never_answers_is_given_up_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.observe.mlflow_address.ANSWER_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        assert unreachable(f"http://127.0.0.1:{mute.getsockname()[1]}") == "no answer in time"


def test_a_cursor_written_by_another_version_is_read_for_what_this_one_knows(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(store, "r1").flush()
    monkeypatch.setattr("pipelines.observe.delivery.unreachable", lambda uri: "gone")
    assert Sender(store, "r1", "http://there").deliver().error is not None
    [cursor] = store.machine_file("runs/r1").glob("tracking-*.json")
    cursor.write_text('{"segments": 1, "parent": "what older versions wrote"}')
    assert Sender(store, "r1", "http://there").deliver() == Delivery(0)  # the one segment was delivered


def test_sync_speaks_of_each_run_to_its_own_mlflow_unless_one_is_named_for_all(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for run, uri in (("r1", "http://there:5000"), ("r2", None), ("r3", "http://there:5000"), ("r4", "http://elsewhere")):
        begin(store, run, uri=uri).flush()
    monkeypatch.setattr("pipelines.observe.delivery.unreachable", lambda uri: "gone")
    told = [line.split(" can't be reached")[0] for line in sync(store, None)]
    assert told == ["MLflow http://there:5000", "MLflow sqlite", "MLflow http://elsewhere"]
    assert [line.split(" can't be reached")[0] for line in sync(store, "http://other")] == ["MLflow http://other"]


def test_ui_names_the_servers_of_runs_that_are_seen_elsewhere(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(store, "r1", uri="http://old:5000").flush()
    begin(store, "r2", uri="http://new:5000/").flush()
    monkeypatch.setattr("pipelines.observe.mlflow_ui.sync", lambda store, uri, dead: [])
    said: list[str] = []
    assert serve_ui(store, None, 5001, said.append) == 0
    assert said == [f"http://{host}:5000/#/experiments?workflowType=machine_learning" for host in ("new", "old")]
    said.clear()
    assert serve_ui(store, "http://third", 5001, said.append) == 0
    assert said == ["http://third/#/experiments?workflowType=machine_learning"]


@pytest.mark.slow
@pytest.mark.parametrize("command", ["sync", "the sender of a later run"])
def test_runs_of_one_store_arrive_each_at_its_own_mlflow(store: Store, tmp_path: Path, command: str) -> None:
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
def test_a_run_is_shown_whole_and_sending_it_again_changes_nothing(store: Store) -> None:
    made = a_pretraining(store, "r1")
    assert Sender(store, "r1", "sqlite").deliver().error is None
    mlflow = client(store)

    def picture() -> Any:
        runs = children(mlflow, "r1")
        return {
            stage: (
                run.info.status, run.info.end_time, run.data.params, run.data.tags, run.data.metrics,
                [(each.dataset.name, each.dataset.digest) for each in run.inputs.dataset_inputs],
                [each.model_id for each in run.outputs.model_outputs], points(mlflow, run.info.run_id),
            )
            for stage, run in runs.items()
        }  # fmt: skip

    first = picture()
    assert set(first) == {"", "documents", "pretrain"}
    status, _, params, tags, metrics, datasets, models, curve = first["pretrain"]
    assert status == "FINISHED"
    assert params == {"lr": "0.1", "files.0": "a", "files.1": "b"}
    assert tags["gptline.action"] == "key-pretrain/1"
    assert tags["gptline.output"] == made.output
    assert tags["gptline.in.documents"] == made.inputs["documents"][0]
    assert tags["gptline.version.torch"] == "2.13.0"
    assert metrics == {"train/loss": 5.0 - 99 / 100, "val/loss": 4.5, "time/stage_s": 2.0}
    assert datasets == [("documents:documents", made.inputs["documents"][0][:36])]
    assert len(models) == 1
    assert curve == [(step, 5.0 - step / 100, START_MS + step) for step in range(100)]
    assert {each.path for each in mlflow.list_artifacts(first[""][3]["mlflow.runName"] and children(mlflow, "r1")[""].info.run_id)} == {
        "config.json", "lineage.html", "lineage.mmd", "page.html",
    }  # fmt: skip

    forget(store)
    assert Sender(store, "r1", "sqlite").deliver() == Delivery(16)  # 1 run_started, 2 x (started, ended), 10 x points, 1 run_ended
    assert picture() == first
    assert Sender(store, "r1", "sqlite").deliver().sent == 0


@pytest.mark.slow
def test_the_config_arrives_though_the_first_delivery_broke_off_before_it(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(store, "r1").flush()

    def broken(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowSession, "log", broken)
        assert "did not take this run (disk full)" in str(Sender(store, "r1", "sqlite").deliver().error)
    assert children(client(store), "r1")[""].data.params == {}  # the run was made, and no more
    assert Sender(store, "r1", "sqlite").deliver() == Delivery(1)
    assert children(client(store), "r1")[""].data.params == {"seed": "1"}


@pytest.mark.slow
def test_a_reused_stage_has_a_child_with_the_curve_and_the_model_of_the_action_it_reuses(store: Store) -> None:
    made = a_pretraining(store, "r1", points=20)
    a_reusing(store, "r2", [store.action("key-documents", 1), made])
    lines = sync(store, "sqlite")
    assert lines == ["r1  8 events delivered", "r2  4 events delivered", "MLflow sqlite has all of 2 runs"]
    mlflow = client(store)
    first, second = children(mlflow, "r1"), children(mlflow, "r2")
    assert set(second) == {"", "documents", "pretrain"}
    reused = second["pretrain"]
    assert reused.data.tags["gptline.decision"] == "reuse"
    assert reused.data.tags["gptline.made_by_run"] == "r1"
    assert reused.data.tags["gptline.made_by_mlflow_run"] == first["pretrain"].info.run_id
    assert points(mlflow, reused.info.run_id) == points(mlflow, first["pretrain"].info.run_id)
    assert [each.model_id for each in reused.outputs.model_outputs] == [each.model_id for each in first["pretrain"].outputs.model_outputs]
    assert len(mlflow.search_logged_models([mlflow.get_experiment_by_name("line").experiment_id])) == 1


@pytest.mark.slow
def test_a_model_that_is_read_is_an_input_and_takes_the_figures_of_who_measured_it(store: Store) -> None:
    model = a_pretraining(store, "r1", points=10).output
    writer = begin(store, "r2")
    report = artifact(store, "report", "{}")
    evaluated = action(store, "evaluate", "r2", report, "report", inputs={"model": [model]}, figures={"eval/bits_per_byte": 1.75})
    ended(writer, "evaluate", evaluated, "done", "run")
    writer.write(RunEnded(status="FINISHED", exit_code=0, text=""))
    sync(store, "sqlite")
    mlflow = client(store)
    runs = children(mlflow, "r2")
    [given] = mlflow.get_run(runs["evaluate"].info.run_id).inputs.model_inputs  # a search leaves these out
    assert mlflow.get_logged_model(given.model_id).tags["gptline.digest"] == model
    assert ("eval/bits_per_byte", 1.75) in [(each.key, each.value) for each in mlflow.get_logged_model(given.model_id).metrics]
    assert runs[""].data.metrics == {"eval/bits_per_byte": 1.75}


POLICY = {"role": "policy", "tokenizer": "7" * 64, "chat_format": "gptline-1", "parameters": 1_074_304}
REWARD = {"role": "reward", "tokenizer": "7" * 64, "score_mean": 0.25, "score_std": 1.5}


def an_assistant(store: Store, run: str, weights: str = "rl", status: str = "FINISHED") -> dict[str, Action]:
    """sft(conversations) -> reward_model(sft, pairs and ratings) -> rl(sft, reward_model, prompts) -> evaluate(all three models)."""
    writer = begin(store, run)
    made: dict[str, Action] = {}

    def make(stage: str, kind: str, metadata: dict[str, Any], text: str = "", **more: Any) -> str:
        writer.write(StageStarted(stage=stage, key=f"key-{stage}", decision="run", reason="new"))
        made[stage] = action(store, stage, run, artifact(store, kind, text or stage, **metadata), kind, **more)
        ended(writer, stage, made[stage], "done", "run")
        return made[stage].output

    for kind, unit in (("conversations", "conversations"), ("preferences", "pairs"), ("ratings", "ratings"), ("prompts", "prompts")):
        make(kind, kind, {"train": {unit: 12}, "held_out": {unit: 3}}, leaves={f"source.{kind}.jsonl": "d" * 64})
    base = artifact(store, "model", "base", role="policy", tokenizer="7" * 64)  # that no action of this store speaks of
    sft = make("sft", "model", POLICY, inputs={"policy": [base], "conversations": [made["conversations"].output]})
    scored = {"policy": [sft], "preferences": [made["preferences"].output], "ratings": [made["ratings"].output]}
    reward_model = make("reward_model", "model", REWARD, inputs=scored, figures={"eval/pair_accuracy": 0.75})
    asked = {"policy": [sft], "reward_model": [reward_model], "prompts": [made["prompts"].output]}
    policy = make("rl", "model", POLICY, weights, inputs=asked)
    judged = {"model": [policy], "baseline": [sft], "reward_model": [reward_model]}
    make("evaluate", "report", {}, weights, inputs=judged, figures={"eval/exactly_right": 0.5})
    store.set_alias("line", "newest", policy)
    writer.write(RunEnded(status=status, exit_code=0, text=""))
    return made


def versions(mlflow: Any, name: str = "line") -> list[tuple[str, str]]:
    """(version, digest), oldest first."""
    found = mlflow.search_model_versions(f"name = '{name}'")
    return sorted((str(each.version), each.tags["gptline.digest"]) for each in found)


def newest(mlflow: Any) -> str:
    return mlflow.get_model_version_by_alias("line", "newest").tags["gptline.digest"]


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, dict[str, Action]]:
    """An assistant's run that was delivered twice: what is not looked up before it is created would be there twice."""
    store = Store(tmp_path_factory.mktemp("shown"))
    made = an_assistant(store, "r1")
    for _ in range(2):
        forget(store)
        assert Sender(store, "r1", "sqlite").deliver().error is None
    assert Sender(store, "r1", "sqlite")._state.refused == []
    return store, made


@pytest.mark.slow
def test_models_stand_with_role_tokenizer_chat_format_and_scale_as_inputs_of_the_stages_that_read_them(
    shown: tuple[Store, dict[str, Action]],
) -> None:
    store, made = shown
    mlflow = client(store)
    runs = children(mlflow, "r1")

    def read(stage: str) -> list[str]:
        models = mlflow.get_run(runs[stage].info.run_id).inputs.model_inputs
        return sorted(mlflow.get_logged_model(each.model_id).tags["gptline.digest"] for each in models)

    sft, reward_model, rl = (made[stage].output for stage in ("sft", "reward_model", "rl"))
    assert read("reward_model") == [sft]
    assert read("rl") == sorted([sft, reward_model])
    assert read("evaluate") == sorted([sft, reward_model, rl])
    experiment = mlflow.get_experiment_by_name("line").experiment_id
    models = {each.tags["gptline.digest"]: each for each in mlflow.search_logged_models([experiment])}
    assert len(models) == 4  # the base model that nobody here made, and three
    found = models[reward_model]
    assert found.model_type == "reward"
    told = {name: found.params[name] for name in ("role", "tokenizer", "score_mean", "score_std")}
    assert told == {"role": "reward", "tokenizer": "7" * 64, "score_mean": "0.25", "score_std": "1.5"}
    assert models[rl].model_type == models[rl].params["role"] == "policy"
    assert models[rl].params["chat_format"] == "gptline-1"
    assert [(each.key, each.value) for each in models[rl].metrics] == [("eval/exactly_right", 0.5)]  # it was the one measured
    assert [(each.key, each.value) for each in found.metrics] == [("eval/pair_accuracy", 0.75)]
    assert not models[sft].metrics


@pytest.mark.slow
def test_conversations_preferences_ratings_and_prompts_are_datasets_with_digest_counts_and_source(
    shown: tuple[Store, dict[str, Action]],
) -> None:
    store, made = shown
    mlflow = client(store)
    runs = children(mlflow, "r1")

    def datasets(stage: str) -> dict[tuple[str, str], Any]:
        given = runs[stage].inputs.dataset_inputs
        return {({tag.key: tag.value for tag in each.tags}["mlflow.data.context"], each.dataset.name): each.dataset for each in given}

    assert set(datasets("sft")) == {("input", "conversations:conversations")}
    assert set(datasets("reward_model")) == {("input", "preferences:preferences"), ("input", "ratings:ratings")}
    assert set(datasets("rl")) == {("input", "prompts:prompts")}
    assert set(datasets("prompts")) == {("source", "source:prompts.jsonl"), ("output", "prompts:prompts")}
    pairs = datasets("reward_model")["input", "preferences:preferences"]
    assert pairs.digest == made["preferences"].output[:36]
    assert json.loads(pairs.source) == {"uri": str(store.artifact_folder(made["preferences"].output))}
    assert json.loads(pairs.profile) == {"train": {"pairs": 12}, "held_out": {"pairs": 3}}
    source = datasets("prompts")["source", "source:prompts.jsonl"]
    assert (source.digest, json.loads(source.source)) == ("d" * 36, {"uri": "prompts.jsonl"})


@pytest.mark.slow
def test_the_assistant_of_a_run_is_a_version_once_per_digest_and_newest_follows_the_store(store: Store, tmp_path: Path) -> None:
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
def test_registering_speaks_to_the_named_database_alone(store: Store, tmp_path: Path) -> None:
    an_assistant(store, "r1")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    command = [sys.executable, "-m", "pipelines.observe.tracker", str(store), "r1", "sqlite", "--driver", str(os.getpid())]
    root = str(Path(__file__).resolve().parents[3])
    subprocess.run(command, check=True, cwd=elsewhere, env={**os.environ, "PYTHONPATH": root})
    assert list(elsewhere.iterdir()) == []  # no mlflow.db of the ambient tracking URI
    assert len(versions(client(store))) == 1


@pytest.mark.slow
def test_a_base_model_a_reward_model_and_what_a_killed_run_ended_with_are_not_registered(store: Store) -> None:
    store.set_alias("line", "newest", a_pretraining(store, "a base model", points=10).output)
    a_reusing(store, "a reward model", [an_assistant(store, "killed", status="KILLED")["reward_model"]])
    for run in ("a base model", "killed", "a reward model"):
        assert Sender(store, run, "sqlite").deliver().error is None
    mlflow = client(store)
    assert mlflow.search_registered_models() == []
    statuses = [children(mlflow, run)[""].info.status for run in ("a base model", "killed", "a reward model")]
    assert statuses == ["FINISHED", "KILLED", "FINISHED"]


@pytest.mark.slow
def test_an_assistant_is_registered_once_though_the_delivery_broke_off_after_it(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_a_server_that_was_away_has_each_assistant_once_with_its_alias(store: Store) -> None:
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    first = an_assistant(store, "r1")
    assert "not reachable" in str(Sender(store, "r1", uri).deliver().error)
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


@pytest.mark.slow
def test_the_parents_note_has_a_row_with_a_link_for_each_of_twelve_stages(store: Store) -> None:
    writer = begin(store, "r1")
    for number in range(12):
        made = action(store, f"stage{number}", "r1", artifact(store, "documents", str(number)), "documents")
        ended(writer, f"stage{number}", made, "done" if number % 2 else "reused", "run" if number % 2 else "reuse")
    writer.write(StageEnded(stage="last", status="blocked", decision="blocked", reason="a | b\nc"))
    writer.write(RunEnded(status="FAILED", exit_code=1, text=""))
    Sender(store, "r1", "sqlite").deliver()
    runs = children(client(store), "r1")
    rows = runs[""].data.tags["mlflow.note.content"].splitlines()[2:]
    assert len(rows) == 13
    experiment = runs[""].info.experiment_id
    for number in range(12):
        link = f"#/experiments/{experiment}/runs/{runs[f'stage{number}'].info.run_id}?workflowType=machine_learning"
        assert rows[number].startswith(f"| [stage{number}]({link}) |")
    assert rows[12] == r"| last | blocked | a \| b c |  |  |"
    assert "last" not in runs
    assert runs[""].info.status == "FAILED"


@pytest.mark.slow
def test_values_that_are_no_numbers_arrive_once_and_hold_nothing_back(store: Store) -> None:
    writer = begin(store, "r1")
    writer.write(StageStarted(stage="pretrain", key="k", decision="run", reason="", steps=3))
    losses = [Point(0, math.nan, 1), Point(1, math.inf, 2), Point(2, 1.0, 3)]
    writer.write(StagePoints(stage="pretrain", curves={"train/loss": losses, "odd (name)%": [Point(0, 7.0, 4)]}))
    writer.flush()
    for _ in range(2):
        forget(store)
        assert Sender(store, "r1", "sqlite").deliver().error is None
    mlflow = client(store)
    run_id = children(mlflow, "r1")["pretrain"].info.run_id
    values = [each.value for each in sorted(mlflow.get_metric_history(run_id, "train/loss"), key=lambda each: each.step)]
    assert len(values) == 3
    assert math.isnan(values[0])
    assert values[1:] == [sys.float_info.max, 1.0]
    assert points(mlflow, run_id, "odd _name__") == [(0, 7.0, 4)]


@pytest.mark.slow
def test_points_that_a_resumed_gang_repeats_are_in_mlflow_once_even_from_a_cursor(store: Store) -> None:
    writer = begin(store, "r1")
    writer.write(StagePoints(stage="pretrain", curves={"train/loss": [Point(step, 1.0, step) for step in range(20)]}))
    writer.flush()
    Sender(store, "r1", "sqlite").deliver()
    writer.write(StagePoints(stage="pretrain", curves={"train/loss": [Point(step, 1.5, 100 + step) for step in range(10, 30)]}))
    writer.flush()
    Sender(store, "r1", "sqlite").deliver()
    mlflow = client(store)
    assert [step for step, _, _ in points(mlflow, children(mlflow, "r1")["pretrain"].info.run_id)] == list(range(30))


@pytest.mark.slow
def test_a_run_whose_driver_died_is_killed_by_sync_and_so_are_its_open_stages(store: Store) -> None:
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
    told = subprocess.run([sys.executable, "-c", counted.format(resolve_uri("sqlite", store))], capture_output=True, check=True, text=True)
    assert told.stdout.split()[-1] == "3"


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
@pytest.mark.parametrize("dies", [False, True], ids=["and goes on", "and dies before it moves the cursor"])
def test_a_stage_that_another_sender_showed_first_is_shown_once(store: Store, monkeypatch: pytest.MonkeyPatch, dies: bool) -> None:
    writer = begin(store, "r1")
    follower, passer_by = Sender(store, "r1", "sqlite"), Sender(store, "r1", "sqlite")
    assert follower.deliver() == Delivery(1)
    writer.write(StageStarted(stage="pretrain", key="k", decision="run", reason="new", steps=3))
    if dies:

        def killed(*_: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Sender, "_save", killed)
            with pytest.raises(KeyboardInterrupt):
                passer_by.deliver()
    else:
        assert passer_by.deliver() == Delivery(1)
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


@pytest.mark.slow
def test_the_senders_process_ends_by_itself_with_the_run(store: Store) -> None:
    tracker = start_tracking(store, "r1", "sqlite")
    a_pretraining(store, "r1")
    assert tracker.finish(200) is None
    assert tracker._process.wait(60) == 0
    mlflow = client(store)
    assert len(points(mlflow, children(mlflow, "r1")["pretrain"].info.run_id)) == 100


@pytest.mark.slow
def test_the_sender_outlives_a_killed_driver_and_delivers_what_it_wrote(store: Store) -> None:
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
def test_a_server_dead_at_the_start_and_killed_in_mid_run_has_each_point_once_in_the_end(store: Store) -> None:
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    tracker = start_tracking(store, "r1", uri)
    writer = begin(store, "r1")
    writer.write(StageStarted(stage="pretrain", key="k", decision="run", reason="", steps=100))
    said: list[str | None] = []
    wait_for(lambda: said.append(tracker.news()) or said[-1])
    assert "not reachable (connection refused)" in str(said[-1])
    assert tracker.news() is None  # said once

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
        assert wait_for(lambda: tracker.finish(200) is None)
        assert seen(store, uri) == [(step, float(step), START_MS + step) for step in range(100)]
        assert children(client(store, uri), "r1")["pretrain"].info.status == "FAILED"


def seen(store: Store, uri: str) -> list[tuple[int, float, int]]:
    mlflow = client(store, uri)
    if mlflow.get_experiment_by_name("line") is None:
        return []
    runs = children(mlflow, "r1")
    return points(mlflow, runs["pretrain"].info.run_id) if "pretrain" in runs else []


class server:
    """A real server on loopback; killed -9 at the end of the block."""

    def __init__(self, store: Store, port: int) -> None:
        self._command = ui_command(store, "sqlite", port)
        self._url = f"http://127.0.0.1:{port}"

    def __enter__(self) -> None:
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        self._process = subprocess.Popen(
            self._command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wait_for(lambda: unreachable(self._url) is None)

    def __exit__(self, *_: object) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_for(true: Any, seconds: float = 90) -> bool:
    until_s = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until_s, "waited in vain"
        time.sleep(0.1)
    return True


def free_port() -> int:
    """Below those that the kernel gives to whoever asks for any: MLflow is imported before it is used."""
    while True:
        with contextlib.closing(socket.socket()) as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", 20_000 + secrets.randbelow(12_000)))
            return probe.getsockname()[1]
