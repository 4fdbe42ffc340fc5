"""Which model a reference names, and which models are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.artifacts import Model
from pipelines.serve.policy import find_chat_policy, find_policy
from pipelines.stage import StageFailure
from pipelines.store.store import Action, Store

from .conftest import MOON, after_the_last, flip_a_byte, publish, random_model


def record(store: Store, model: Model, pipeline: str, stage: str, started_ms: int) -> None:
    here = {"run": "r", "started_ms": started_ms, "seconds": 1.0, "host": "h", "user": "u", "pid": 1}
    what = {"key": f"{pipeline}-{stage}", "pipeline": pipeline, "stage": stage, "kind": stage, "leaves": {}, "inputs": {}}
    store.record(Action(**what, **here, output=model.digest, output_kind="model"))


def test_without_a_reference_it_is_the_newest_model_with_a_chat_format_that_an_alias_names(store: Store):
    older, newer, newest_of_all = (publish(store, after_the_last(MOON, seq_len)) for seq_len in (8, 9, 10))
    base = publish(store, random_model(), chat_format=None)
    record(store, newer, "second", "sft", 2_000)
    record(store, older, "first", "rl", 1_000)
    record(store, newest_of_all, "third", "sft", 4_000)  # nothing points to it
    record(store, base, "fourth", "pretrain", 3_000)
    for pipeline, model in (("first", older), ("second", newer), ("fourth", base)):
        store.set_alias(pipeline, "newest", model.digest)
    chosen, name = find_chat_policy(store, None)
    assert chosen == newer
    assert name == f"second, sft: model {newer.digest[:12]}, 300 steps"
    assert find_chat_policy(store, "model:first@newest")[1] == f"first, rl: model {older.digest[:12]}, 300 steps"


def test_if_no_model_has_a_chat_format_the_message_names_the_stages_that_give_one(store: Store):
    store.set_alias("line", "newest", publish(store, random_model(), chat_format=None).digest)
    with pytest.raises(StageFailure, match=r"no model in the store .* was trained to answer in turns, as sft and rl stages do"):
        find_chat_policy(store, None)


def test_if_no_pipelines_newest_model_has_a_chat_format_the_message_names_the_last_one_that_has(store: Store):
    base = publish(store, random_model(), chat_format=None)
    for seq_len, started_ms in ((8, 1_000), (9, 2_000)):
        last = publish(store, after_the_last(MOON, seq_len))
        record(store, last, "line", "sft", started_ms)
    record(store, base, "line", "pretrain", 3_000)
    record(store, publish(store, random_model(), role="reward"), "line", "reward_model", 4_000)
    store.set_alias("line", "newest", base.digest)
    named = rf"no pipeline's newest model .* answer in turns; `gptline chat sha256:{last.digest[:12]}` talks to .* \(line, sft\)"
    with pytest.raises(StageFailure, match=named):
        find_chat_policy(store, None)


@pytest.mark.parametrize(
    ("metadata", "harm", "fault"),
    [
        (
            {"chat_format": None},
            None,
            " continues text and has no chat format: .* `gptline sample sha256:{digest}` continues a text with it",
        ),
        ({"chat_format": "gptline-2"}, None, ": expected the chat format gptline-1, found gptline-2"),
        ({"role": "reward"}, None, ": expected a policy, which writes text, found a model with the role reward"),
        ({}, flip_a_byte, " is damaged: model.safetensors has sha256 "),
    ],
)
def test_a_model_that_cannot_chat_is_refused(store: Store, metadata: dict[str, Any], harm: Callable[[Model], None] | None, fault: str):
    model = publish(store, random_model(), **metadata)
    if harm:
        harm(model)
    with pytest.raises(StageFailure, match=f"model {model.digest[:12]}" + fault.format(digest=model.digest[:12])):
        find_chat_policy(store, f"sha256:{model.digest[:12]}")


def test_an_artifact_that_is_not_a_model_is_refused(store: Store):
    folder = store.new_folder()
    (folder / "train.jsonl").write_text("{}")
    documents = store.publish(folder, "documents", {}).digest
    with pytest.raises(StageFailure, match=f"artifact {documents[:12]}: expected a model, found documents"):
        find_policy(store, documents)


@pytest.mark.parametrize(
    ("harm", "found"),
    [
        (flip_a_byte, "model.safetensors has sha256 "),
        (lambda model: weights(model).write_bytes(weights(model).read_bytes()[:-100]), "model.safetensors has "),
        (lambda model: weights(model).unlink(), "model.safetensors is missing"),
    ],
)
def test_damaged_weights_write_nothing(store: Store, harm: Callable[[Model], object], found: str):
    model = publish(store, random_model())
    harm(model)
    with pytest.raises(StageFailure, match=f"model {model.digest[:12]} is damaged: {found}"):
        find_policy(store, model.digest)


def weights(model: Model) -> Path:
    return model.path / "model.safetensors"
