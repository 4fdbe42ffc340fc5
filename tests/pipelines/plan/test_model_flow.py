"""Models that can't work where they are named are refused while the file is read, before anything runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gpt.settings import PRESETS, GPTConfig
from pipelines.plan.config import ConfigError, load
from pipelines.plan.environment import ROOT
from pipelines.plan.graph import Graph, build
from pipelines.plan.planner import Planner
from pipelines.store.store import Store

LINE = """
pipeline = "line"

[stages.documents]
uses = "ingest"
source = "text"
unit = "line"
files = ["a.txt"]

[stages.tokenizer]
algorithm = "bpe"
vocab_size = 280
inputs = { documents = ["documents"] }

[stages.other]
uses = "tokenizer"
algorithm = "bpe"
vocab_size = 300
inputs = { documents = ["documents"] }

[stages.tokenize]
inputs = { documents = ["documents"], tokenizer = "tokenizer" }

[stages.tokenize_other]
uses = "tokenize"
inputs = { documents = ["documents"], tokenizer = "other" }

[stages.pretrain]
preset = "gpt2-nano"
steps = 2
global_batch_size = 4
lr = 1e-3
inputs = { tokens = ["tokenize"] }

[stages.pretrain_other]
uses = "pretrain"
preset = "gpt2-nano"
steps = 2
global_batch_size = 4
lr = 1e-3
inputs = { tokens = ["tokenize_other"] }

[stages.conversations]
source = "json"
files = ["talks.json"]
format = "plain"

[stages.preferences]
source = "json"
files = ["talks.json"]
format = "plain"

[stages.prompts]
source = "json"
files = ["talks.json"]
format = "plain"

[stages.sft]
steps = 2
global_batch_size = 2
lr = 1e-3
inputs = { policy = "pretrain", conversations = ["conversations"] }

[stages.judge]
uses = "reward_model"
steps = 2
global_batch_size = 2
lr = 1e-3
inputs = { policy = "sft", preferences = ["preferences"] }

[stages.rl]
steps = 2
prompts_per_step = 2
global_batch_size = 2
max_response_tokens = 6
lr = 1e-3
inputs = { policy = "sft", prompts = ["prompts"], reward_model = "judge" }

[stages.evaluate]
inputs = { model = "rl", baseline = "pretrain", reward_model = "judge", documents = ["documents"] }
"""
TALK = {"prompt": "a?", "response": "a", "chosen": "a", "rejected": "b"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_text("some text\n" * 20)
    (tmp_path / "talks.json").write_text(json.dumps([TALK]))
    return tmp_path


def graph(folder: Path, *overrides: str, use: dict[str, str] | None = None, text: str = LINE) -> Graph:
    (folder / "line.toml").write_text(text)
    return build(load(folder / "line.toml", overrides), use or {})


def faults(folder: Path, *overrides: str, text: str = LINE) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        graph(folder, *overrides, text=text)
    return [str(fault) for fault in caught.value.faults]


def test_a_pipeline_whose_models_fit_is_accepted(folder: Path):
    assert graph(folder).last() == ["pretrain_other", "evaluate"]


@pytest.mark.parametrize(
    ("where", "found", "fault"),
    [
        ("sft.inputs.policy", "judge", "'judge' is a reward model, expected a policy, such as 'pretrain_other'"),
        ("rl.inputs.policy", "judge", "'judge' is a reward model, expected a policy, such as 'sft'"),
        ("rl.inputs.reward_model", "sft", "'sft' is a policy, expected a reward model, such as 'judge'"),
        ("evaluate.inputs.reward_model", "sft", "'sft' is a policy, expected a reward model, such as 'judge'"),
        ("evaluate.inputs.model", "judge", "'judge' is a reward model, expected a policy, such as 'rl'"),
    ],
)
def test_a_model_in_another_role_is_refused(folder: Path, where: str, found: str, fault: str):
    text = LINE
    if where.startswith("sft"):  # no cycle: the judge of another policy
        text = LINE.replace('inputs = { policy = "sft", preferences', 'inputs = { policy = "pretrain", preferences')
    assert faults(folder, f"stages.{where}='{found}'", text=text) == [f"stages.{where}: {fault}"]


def test_rl_needs_a_policy_with_a_chat_format(folder: Path):
    (fault,) = faults(folder, "stages.rl.inputs.policy='pretrain'")
    assert fault == (
        "stages.rl.inputs.policy: 'pretrain' has no chat format, so it can't end a turn; "
        "expected a policy that an sft stage made, such as 'sft'"
    )


@pytest.mark.parametrize(
    ("override", "where", "found", "first"),
    [
        ("stages.pretrain.inputs.tokens=['tokenize', 'tokenize_other']", "pretrain.inputs.tokens", "'tokenize_other'", "'tokenize'"),
        ("stages.pretrain.inputs.model='pretrain_other'", "pretrain.inputs.model", "'pretrain_other'", "'tokenize'"),
        ("stages.evaluate.inputs.baseline='pretrain_other'", "evaluate.inputs.baseline", "'pretrain_other'", "'rl'"),
        ("stages.sft.inputs.policy='pretrain_other'", "evaluate.inputs.baseline", "'pretrain'", "'rl'"),
    ],
)
def test_models_and_tokens_of_two_tokenizers_cannot_be_combined(folder: Path, override: str, where: str, found: str, first: str):
    (fault,) = [each for each in faults(folder, override) if where in each]
    assert fault.startswith(f"stages.{where}: {found} has the tokenizer of stage ")
    assert f"but {first} has the tokenizer of stage " in fault
    assert fault.endswith(f"; expected one tokenizer for all inputs of {where.partition('.')[0]}")


def test_two_stages_that_make_the_same_tokenizer_can_be_combined(folder: Path):
    same = LINE.replace("vocab_size = 300", "vocab_size = 280").replace('tokens = ["tokenize"]', 'tokens = ["tokenize", "tokenize_other"]')
    assert graph(folder, text=same).stages["pretrain"].inputs["tokens"] == ["tokenize", "tokenize_other"]


def test_byte_tokenizers_are_the_same_whatever_they_read(folder: Path):
    text = LINE.replace('"bpe"\nvocab_size = 280', '"bytes"').replace('"bpe"\nvocab_size = 300', '"bytes"')
    more = '\n[stages.more]\nuses = "ingest"\nsource = "text"\nunit = "paragraph"\nfiles = ["a.txt"]\n'
    text = text.replace('[stages.other]\nuses = "tokenizer"\nalgorithm = "bytes"\ninputs = { documents = ["documents"]', "[stages.other]\n"
                        'uses = "tokenizer"\nalgorithm = "bytes"\ninputs = { documents = ["more"]')  # fmt: skip
    assert '"more"' in text
    graph(folder, "stages.pretrain.inputs.tokens=['tokenize', 'tokenize_other']", text=text + more)


def publish(store: Store, config: str = "", **metadata: str) -> str:
    model = store.new_folder()
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        (model / name).write_text(config or str(metadata))
    return store.publish(model, "model", metadata).digest


@pytest.mark.parametrize(
    ("metadata", "fault"),
    [
        ({"role": "reward", "tokenizer": "1" * 64}, "is a reward model, expected a policy"),
        ({"role": "policy", "tokenizer": "1" * 64}, "has no chat format, so it can't end a turn"),
        (
            {"role": "policy", "tokenizer": "1" * 64, "chat_format": "gptline-1"},
            "has tokenizer 2{12}, but .* has tokenizer 1{12}; expected one tokenizer for",
        ),
    ],
)
def test_models_of_the_store_are_checked_when_the_plan_is_made(folder: Path, metadata: dict[str, str], fault: str):
    store = Store(folder / "store")
    judge = publish(store, role="reward", tokenizer="2" * 64)
    policy = publish(store, **metadata)
    loaded = graph(
        folder, f"stages.rl.inputs.policy='sha256:{policy}'", f"stages.rl.inputs.reward_model='sha256:{judge}'", "stages.rl.engine='torch'"
    )
    with pytest.raises(ConfigError, match=fault):
        Planner(loaded, store, ROOT)


def test_a_model_given_in_a_stages_place_is_checked_too(folder: Path):
    store = Store(folder / "store")
    judge = publish(store, role="reward", tokenizer="2" * 64)
    with pytest.raises(ConfigError, match="'sft' is a reward model, expected a policy"):
        Planner(graph(folder, use={"sft": f"sha256:{judge}"}), store, ROOT, given={"sft": f"sha256:{judge}"})


def test_the_output_of_a_users_own_kind_is_checked_by_the_stage_that_reads_it(folder: Path):
    (folder / "mine.py").write_text(
        "from pipelines.artifacts import Model\nfrom pipelines.stage import StageContext\n\n\n"
        "def merge(models: list[Model], stage: StageContext) -> Model: ...\n"
    )
    merged = '\n[stages.merged]\nuses = "./mine.py:merge"\ninputs = { models = ["pretrain", "pretrain_other", "judge"] }\n'
    graph(folder, "stages.rl.inputs.policy='merged'", "stages.evaluate.inputs.reward_model='merged'", text=LINE + merged)


EXPORT = '\n[stages.export]\ninputs = { model = "rl" }\n'
FURTHER = """
[stages.further]
uses = "pretrain"
preset = "gpt2-nano"
dropout = 0.2
steps = 2
global_batch_size = 4
lr = 1e-3
inputs = { tokens = ["tokenize"], model = "pretrain" }
"""


def test_an_export_of_gpt_2s_architecture_is_accepted_after_rl(folder: Path):
    assert "export" in graph(folder, text=LINE + EXPORT).last()


@pytest.mark.parametrize(
    ("override", "source", "found"),
    [
        ("preset='llama-nano'", "stages.pretrain (preset = 'llama-nano')", "positions = 'learned', found 'rope'; expected norm = "),
        ("preset='transformer-nano'", "stages.pretrain (preset = 'transformer-nano')", "positions = 'learned', found 'sinusoidal'"),
        ("n_kv_head=1", "stages.pretrain (preset = 'gpt2-nano')", "n_kv_head = 2, found 1"),
    ],
)
def test_an_export_that_would_fail_after_all_training_is_refused_in_the_file(folder: Path, override: str, source: str, found: str):
    with pytest.raises(ConfigError) as caught:
        graph(folder, f"stages.pretrain.{override}", text=LINE + EXPORT)
    (fault,) = caught.value.faults
    line = (LINE + EXPORT).split("\n").index('inputs = { model = "rl" }') + 1
    assert fault.located().startswith(
        f"line.toml, line {line}: stages.export.inputs.model: 'rl' has the shape of {source}; "
        f"only gpt2-* presets can be exported to transformers: expected {found}"
    )
    assert fault.what.endswith("; use a model of such a preset, or drop the export: --set stages.export=false")
    graph(folder, f"stages.pretrain.{override}", "stages.export=false", text=LINE + EXPORT)


def test_a_reward_model_is_not_exported(folder: Path):
    (fault,) = faults(folder, "stages.export.inputs.model='judge'", text=LINE + EXPORT)
    assert fault == "stages.export.inputs.model: 'judge' is a reward model, expected a policy, such as 'rl'"


def test_a_model_is_trained_further_in_its_own_shape_only(folder: Path):
    assert "further" in graph(folder, text=LINE + FURTHER).stages  # its dropout may differ
    (fault,) = faults(folder, "stages.further.preset='llama-nano'", "stages.further.n_kv_head=2", text=LINE + FURTHER)
    assert fault.startswith(
        "stages.further.inputs.model: 'pretrain' has the shape of stages.pretrain (preset = 'gpt2-nano'): "
        "expected n_kv_head = 2, found None; expected positions = 'rope', found 'learned'; "
    )
    assert fault.endswith("; set the same shape here, or start without a model")


def test_a_model_of_the_store_that_can_not_be_exported_is_refused_when_the_plan_is_made(folder: Path):
    store = Store(folder / "store")
    config = GPTConfig(**PRESETS["llama-nano"].model_dump(), vocab_size=300).model_dump_json()
    model = publish(store, config, role="policy", tokenizer="1" * 64)
    loaded = graph(folder, f"stages.export.inputs.model='sha256:{model}'", text=LINE + EXPORT)
    with pytest.raises(ConfigError, match=rf"has the shape of artifact {model[:12]}; only gpt2-\* presets can be exported"):
        Planner(loaded, store, ROOT)
