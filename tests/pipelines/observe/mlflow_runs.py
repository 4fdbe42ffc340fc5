"""Runs in a store that are delivered to MLflow, and queries of what MLflow has; shared by the tests of delivery."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

from cluster.commit import canonical_json
from cluster.events import Point
from pipelines.observe.mlflow_address import resolve_uri, unreachable
from pipelines.observe.mlflow_ui import ui_command
from pipelines.store.action import Action
from pipelines.store.events import RunEnded, RunStarted, StageEnded, StagePoints, StageStarted
from pipelines.store.journal import JournalWriter
from pipelines.store.store import Store

START_MS = 1_790_000_000_000


POLICY = {"role": "policy", "tokenizer": "7" * 64, "chat_format": "gptline-1", "parameters": 1_074_304}
REWARD = {"role": "reward", "tokenizer": "7" * 64, "score_mean": 0.25, "score_std": 1.5}


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


def ended(writer: JournalWriter, stage: str, made: Action | None, status: Any, decision: Any) -> None:
    given = {} if made is None else {"key": made.key, "number": made.number, "output": made.output}
    writer.write(StageEnded(stage=stage, status=status, decision=decision, reason="nothing changed", seconds=2.0, **given))


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


def a_reusing(store: Store, run: str, made: list[Action]) -> None:
    writer = begin(store, run)
    for each in made:
        ended(writer, each.stage, each, "reused", "reuse")
    writer.write(RunEnded(status="FINISHED", exit_code=0, text="done"))


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


def client(store: Store, uri: str = "sqlite") -> Any:
    from mlflow import MlflowClient

    return MlflowClient(resolve_uri(uri, store))


def children(mlflow: Any, run: str, pipeline: str = "line") -> dict[str, Any]:
    """Each stage's run; "" is the parent. Fails if a stage has two runs."""
    experiment = mlflow.get_experiment_by_name(pipeline)
    found = [
        (each.data.tags.get("gptline.stage", ""), each)
        for each in mlflow.search_runs([experiment.experiment_id], f"tags.`gptline.run` = '{run}'")
    ]
    assert len(found) == len(dict(found))
    return dict(found)


def points(mlflow: Any, run_id: str, metric: str = "train/loss") -> list[tuple[int, float, int]]:
    return sorted((each.step, each.value, each.timestamp) for each in mlflow.get_metric_history(run_id, metric))


def versions(mlflow: Any, name: str = "line") -> list[tuple[str, str]]:
    """The registered versions as (version, digest), oldest first."""
    found = mlflow.search_model_versions(f"name = '{name}'")
    return sorted((str(each.version), each.tags["gptline.digest"]) for each in found)


def newest(mlflow: Any) -> str:
    return mlflow.get_model_version_by_alias("line", "newest").tags["gptline.digest"]


def seen(store: Store, uri: str) -> list[tuple[int, float, int]]:
    mlflow = client(store, uri)
    if mlflow.get_experiment_by_name("line") is None:
        return []
    runs = children(mlflow, "r1")
    return points(mlflow, runs["pretrain"].info.run_id) if "pretrain" in runs else []


def forget(store: Store) -> None:
    """Delete every cursor, so that everything is sent again, as after a sender that died before it moved one."""
    for cursor in store.machine_file("runs").glob("*/tracking-*.json"):
        cursor.unlink()


class server:
    """A real server on the loopback interface, killed with SIGKILL at the end of the block."""

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


def wait_for(true: Any, seconds: float = 90) -> bool:
    until_s = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until_s, "waited in vain"
        time.sleep(0.1)
    return True


def is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def free_port() -> int:
    """A port outside the kernel's ephemeral range, which nothing else takes while the server imports MLflow."""
    while True:
        with contextlib.closing(socket.socket()) as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", 20_000 + secrets.randbelow(12_000)))
            return probe.getsockname()[1]
