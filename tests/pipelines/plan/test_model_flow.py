"""Models that can't work where they are named are refused while the file is read, before anything runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

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
    ("override", "fault"),
    [
        ("stages.sft.inputs.policy='judge'", "stages.sft.inputs.policy: 'judge' is a reward model, expected a policy"),
        ("stages.rl.inputs.policy='judge'", "stages.rl.inputs.policy: 'judge' is a reward model, expected a policy"),
        ("stages.rl.inputs.reward_model='sft'", "stages.rl.inputs.reward_model: 'sft' is a policy, expected a reward model"),
        ("stages.evaluate.inputs.reward_model='sft'", "stages.evaluate.inputs.reward_model: 'sft' is a policy, expected a reward model"),
        ("stages.evaluate.inputs.model='judge'", "stages.evaluate.inputs.model: 'judge' is a reward model, expected a policy"),
    ],
)
def test_a_model_in_another_role_is_refused(folder: Path, override: str, fault: str):
    text = LINE
    if override.startswith("stages.sft"):  # no cycle: the judge of another policy
        text = LINE.replace('inputs = { policy = "sft", preferences', 'inputs = { policy = "pretrain", preferences')
    assert faults(folder, override, text=text) == [fault]


def test_rl_needs_a_policy_with_a_chat_format(folder: Path):
    (fault,) = faults(folder, "stages.rl.inputs.policy='pretrain'")
    assert fault == (
        "stages.rl.inputs.policy: 'pretrain' has no chat format, so it can't end a turn; expected a policy that an sft stage made"
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


def publish(store: Store, **metadata: str) -> str:
    model = store.new_folder()
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        (model / name).write_text(str(metadata))
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
