"""mlflow_run.py and mlflow_action.py: what MLflow shows of a run. Everything is there once, however often it is sent."""

from __future__ import annotations

import json
import math
import sys
from typing import Any

import pytest
from mlflow_runs import START_MS, a_pretraining, a_reusing, action, an_assistant, artifact, begin, children, client, ended, forget, points

from cluster.events import Point
from pipelines.observe.delivery import Delivery, Sender, sync
from pipelines.observe.mlflow_session import MlflowSession
from pipelines.store.action import Action
from pipelines.store.events import RunEnded, StageEnded, StagePoints, StageStarted
from pipelines.store.store import Store


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, dict[str, Action]]:
    """An assistant's run, delivered twice: whatever is created without being looked up first would be there twice."""
    store = Store(tmp_path_factory.mktemp("shown"))
    made = an_assistant(store, "r1")
    for _ in range(2):
        forget(store)
        assert Sender(store, "r1", "sqlite").deliver().error is None
    assert Sender(store, "r1", "sqlite")._state.refused == []
    return store, made


@pytest.mark.slow
def test_a_run_is_shown_completely_and_sending_it_again_changes_nothing(store: Store) -> None:
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
def test_the_config_arrives_even_if_the_first_delivery_broke_off_before_it(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_an_evaluated_model_is_an_input_of_the_evaluation_and_gets_its_figures(store: Store) -> None:
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


@pytest.mark.slow
def test_models_have_role_tokenizer_chat_format_and_scale_and_are_inputs_of_the_stages_that_read_them(
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
    assert len(models) == 4  # the base model, which this store did not make, and three others
    found = models[reward_model]
    assert found.model_type == "reward"
    params = {name: found.params[name] for name in ("role", "tokenizer", "score_mean", "score_std")}
    assert params == {"role": "reward", "tokenizer": "7" * 64, "score_mean": "0.25", "score_std": "1.5"}
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
def test_the_parents_description_has_a_row_with_a_link_for_each_of_twelve_stages(store: Store) -> None:
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
def test_nan_and_infinity_arrive_once_and_block_nothing(store: Store) -> None:
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
