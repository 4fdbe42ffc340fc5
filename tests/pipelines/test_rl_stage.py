"""The rl stage: its inputs, what it refuses, what it sends to the ranks, and a small run. tests/gpt/rl tests its loop."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpt.loop import Trained
from pipelines.artifacts import Model, Prompts
from pipelines.plan.config import load
from pipelines.plan.environment import ROOT
from pipelines.plan.graph import build
from pipelines.plan.kinds import Input, load_kind
from pipelines.plan.planner import Planner
from pipelines.run.runner import Options, Run
from pipelines.stage import StageFailure
from pipelines.stages.rl import RlConfig, rl
from pipelines.store.events import StageEnded
from pipelines.store.store import Store
from tests.pipelines.run.small import NoTracker

POLICY = Model(Path("policy"), "a" * 64, {"role": "policy", "tokenizer": "t" * 64})
SCORED = {"role": "reward", "tokenizer": "t" * 64, "score_mean": 0.5, "score_std": 2.0}
REWARD_MODEL = Model(Path("reward"), "b" * 64, SCORED)


def settings(**changes: Any) -> RlConfig:
    return RlConfig(**{**dict(steps=1, prompts_per_step=40, global_batch_size=40, max_response_tokens=8, lr=1e-3), **changes})


def a_score(prompt: Any, response: str, record: Any) -> float:
    return 0.0


class Bench:
    """The part of StageContext that rl uses. Its gang trains nothing."""

    seed = 7
    output = Path("output")

    def __init__(self) -> None:
        self.figures: dict[str, float] = {}
        self.arguments: tuple[Any, ...] = ()

    def function(self, reference: str) -> Callable[..., Any]:
        assert reference == "./reward.py:score"
        return a_score

    def gang(self, function: Any, *arguments: Any) -> Trained:
        self.arguments = arguments
        return Trained({"role": "policy", "chat_format": "gptline-1", "steps": 1}, {"reward/score_mean": 0.75})

    def figure(self, name: str, value: float) -> None:
        self.figures[name] = value

    def publish(self, kind: type[Model], **metadata: Any) -> Model:
        return kind(self.output, "d" * 64, metadata)


@pytest.fixture
def make_prompts(tmp_path: Path) -> Callable[..., Prompts]:
    def make(*references: str | None) -> Prompts:
        folder = tmp_path / f"prompts-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        records = [{"prompt": [{"role": "user", "content": "?"}], "reference": each, "source": "test"} for each in references]
        (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        (folder / "held_out.jsonl").write_text("")
        return Prompts(folder, "c" * 64, {"train": {"prompts": len(records)}, "held_out": {"prompts": 0}})

    return make


def run(config: RlConfig, policy: Model, prompts: list[Prompts], reward_model: Model | None = None) -> tuple[Bench, Model]:
    bench = Bench()
    return bench, rl(config, policy, prompts, reward_model, bench)  # type: ignore[arg-type]


def test_its_signature_takes_a_policy_prompts_and_optionally_a_reward_model():
    kind = load_kind("rl", Path())
    assert kind.trains()
    assert kind.inputs == {
        "policy": Input(Model, many=False, optional=False),
        "prompts": Input(Prompts, many=True, optional=False),
        "reward_model": Input(Model, many=False, optional=True),
    }


def test_the_ranks_receive_each_scorer_with_its_limits(make_prompts):
    from gpt.rl.scorers import NumberScorer, RewardModelScorer
    from gpt.rl.user_reward import FunctionScorer

    config = settings(reward="./reward.py:score", reward_timeout_s=3, verifier="number", number_marker="=", missing_end_score=-2)
    numbers, more = make_prompts("4"), make_prompts("2 + 2 = 4")
    bench, _ = run(config, POLICY, [numbers, more], REWARD_MODEL)
    *others, scorers, seed, output = bench.arguments
    assert others == [config, Path("policy"), [numbers.path, more.path]]
    assert (seed, output) == (7, Path("output"))
    assert scorers == [
        RewardModelScorer(Path("reward"), mean=0.5, std=2.0),
        # Of 40 responses a share of 0.05 may fail, which is 2.
        FunctionScorer(__file__, __name__, "a_score", max_failures=2, timeout_s=3.0, memory_gib=2.0),
        NumberScorer("="),
    ]


@pytest.mark.parametrize("changes", [{"reward": "./reward.py:score"}, {"verifier": "number"}, {}])
def test_one_scorer_of_any_kind_suffices(make_prompts, changes):
    bench, _ = run(settings(**changes), POLICY, [make_prompts("4")], None if changes else REWARD_MODEL)
    assert len(bench.arguments[3]) == 1


def test_figures_go_to_the_action_record_and_metadata_to_the_manifest(make_prompts):
    bench, model = run(settings(verifier="number"), POLICY, [make_prompts("4")])
    assert bench.figures == {"reward/score_mean": 0.75}
    assert model.metadata == {"role": "policy", "chat_format": "gptline-1", "steps": 1, "tokenizer": "t" * 64}


def test_a_stage_without_any_scorer_is_refused(make_prompts):
    with pytest.raises(StageFailure, match=r"^rl has nothing to score responses with; add at least one: .* verifier = 'number'$"):
        run(settings(), POLICY, [make_prompts("4")])


@pytest.mark.parametrize(
    ("policy", "reward_model", "words"),
    [
        (REWARD_MODEL, None, "model bbbbbbbbbbbb: expected role policy, found reward; rl trains a policy, such as an sft stage makes"),
        (
            POLICY,
            POLICY,
            "model aaaaaaaaaaaa: expected role reward, found policy; the input reward_model takes what a reward_model stage makes",
        ),
        (
            POLICY,
            Model(Path("reward"), "b" * 64, {**SCORED, "tokenizer": "u" * 64}),
            "model bbbbbbbbbbbb: expected tokenizer tttttttttttt, the one of model aaaaaaaaaaaa, found uuuuuuuuuuuu; "
            "token ids mean nothing under another tokenizer, so rebuild one of the two with the other's",
        ),
    ],
)
def test_models_of_the_wrong_role_or_tokenizer_are_refused(make_prompts, policy, reward_model, words):
    with pytest.raises(StageFailure) as caught:
        run(settings(verifier="number"), policy, [make_prompts("4")], reward_model)
    assert str(caught.value) == words


@pytest.mark.parametrize(
    ("reference", "shown"), [(None, "None"), ("four", "'four'"), ("#### four", "'#### four'"), ("2 + 2 = 4", "'2 [+] 2 = 4'")]
)
def test_a_verifier_refuses_prompts_whose_reference_has_no_number(make_prompts, reference, shown):
    prompts = [make_prompts("4", "5"), make_prompts("6", reference, "x")]
    words = f"2 of 5 training prompts have none: expected a number, or a text with one after number_marker = '####', found first {shown}$"
    with pytest.raises(StageFailure, match=words):
        run(settings(verifier="number"), POLICY, prompts)
    run(settings(reward="./reward.py:score"), POLICY, prompts)


def test_a_record_without_a_reference_counts_as_one_without_a_number(make_prompts):
    prompts = make_prompts("4")
    with open(prompts.path / "train.jsonl", "a") as lines:
        lines.write('{"prompt": [{"role": "user", "content": "?"}]}\n')
    with pytest.raises(StageFailure, match=r"1 of 2 training prompts have none: expected a number, .*, found first None"):
        run(settings(verifier="number"), POLICY, [prompts])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reward_timeout_s": 1.0}, "reward_timeout_s = 1.0 would have no effect without a reward function; remove it"),
        ({"reward_memory_gib": 1.0, "verifier": "number"}, "reward_memory_gib = 1.0 would have no effect without a reward function"),
        ({"number_marker": "=", "reward": "./reward.py:score"}, "number_marker = '=' would have no effect without a verifier"),
    ],
)
def test_a_setting_of_an_absent_scorer_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        settings(**changes)


def test_the_key_has_the_scorers_and_their_code_but_not_a_reward_functions_limits(tmp_path: Path, line: Line):
    before = line.planned()
    assert {
        "config.reward",
        "config.verifier",
        "config.number_marker",
        "code.reward:score",
        "code.gpt.rl.user_reward:FunctionScorer",
    } <= before.keys()
    assert "code.gpt.rl.reward_process:judge" in before
    assert line.planned("stages.rl.reward_timeout_s=1", "stages.rl.reward_memory_gib=9") == before


class Line:
    """A pipeline with one rl stage, whose policy has random weights."""

    TOML = """
pipeline = "small"

[stages.rl]
inputs = {{ policy = "sha256:{policy}", prompts = "sha256:{prompts}" }}
reward = "./reward.py:score"
steps = 12
prompts_per_step = 16
responses_per_prompt = 4
global_batch_size = 64
max_response_tokens = 6
lr = 2e-2
lr_schedule = "constant"
log_every = 1
"""
    REWARD = "def score(prompt, response, record):\n    print(response)\n    return len(prompt) + (record['reference'] == '4') - 1\n"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = Store(folder / "store")

    def write(self, prompts: Path, reward: str = REWARD) -> None:
        import torch

        from gpt.model import GPT, save_model
        from gpt.settings import PRESETS, GPTConfig
        from gpt.tokenizer import byte_tokenizer

        shape = GPTConfig(**PRESETS["gpt2-nano"].model_dump(), vocab_size=byte_tokenizer().vocab_size)
        model = self.store.new_folder()
        save_model(model, shape, dict(GPT(shape, torch.Generator().manual_seed(1)).named_parameters()))
        byte_tokenizer().save(model / "tokenizer.json")
        policy = self.store.publish(model, "model", {"role": "policy", "tokenizer": "t" * 64, "chat_format": "gptline-1"})
        frozen = self.store.publish(prompts, "prompts", {"train": {"prompts": 2}, "held_out": {"prompts": 0}})
        (self.folder / "reward.py").write_text(reward)
        (self.folder / "small.toml").write_text(self.TOML.format(policy=policy.digest, prompts=frozen.digest))

    def graph(self, *overrides: str) -> Any:
        sys.modules.pop("gptline_user_reward", None)  # as in a new process
        return build(load(self.folder / "small.toml", overrides))

    def planned(self, *overrides: str) -> dict[str, Any]:
        (stage,) = Planner(self.graph(*overrides), self.store, ROOT).plan()
        return stage.leaves

    def run(self, *overrides: str) -> tuple[int, list[Any]]:
        events: list[Any] = []
        return Run(self.graph(*overrides), self.store, Options("test", "test", inline=True), events.append).execute(), events


@pytest.fixture
def line(tmp_path: Path, make_prompts: Callable[..., Prompts], monkeypatch: pytest.MonkeyPatch) -> Line:
    monkeypatch.setattr("pipelines.run.runner.start_tracking", lambda *_: NoTracker())
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # Python would not notice the second of two edits within a second
    line = Line(tmp_path)
    line.write(make_prompts("4", "4").path)
    return line


def test_a_policy_with_random_weights_learns_to_end_its_responses_because_only_those_are_rewarded(line: Line):
    # A response that ends within 6 tokens scores 1 (one message, the right reference), and one that is cut off -1. At first an end token
    # is one of 262, so hardly any response ends.
    assert line.run()[0] == 0
    (action,) = line.store.all_actions()
    score = {step: value for step, value, _ in action.curves["reward/score_mean"]}
    assert score[1] < -0.8
    assert score[12] > 0.5
    assert action.figures["reward/score_mean"] == score[12]
    assert all(math.isfinite(value) for curve in action.curves.values() for _, value, _ in curve)
    assert {value for _, value, _ in action.curves["rollout/failed_share"]} == {0.0}
    made = line.store.artifact(action.output, Model)
    assert made.metadata["role"] == "policy"
    assert made.metadata["tokenizer"] == "t" * 64
    assert made.metadata["rollouts"] == 12 * 64
    assert {path.name for path in made.path.iterdir()} >= set(Model.files)


def test_a_reward_function_that_fails_too_often_ends_the_stage_and_its_error_and_line_are_named(line: Line):
    (line.folder / "reward.py").write_text("def score(prompt, response, record):\n    return 1 / 0\n")
    code, events = line.run("stages.rl.max_failed_share=0", "stages.rl.max_response_tokens=20")
    assert code == 1
    (error,) = [event.error for event in events if isinstance(event, StageEnded) and event.error]
    assert "responses could not be scored, which exceeds max_failed_share = 0" in error
    assert "score() of reward.py on " in error
    assert "ZeroDivisionError: division by zero (reward.py, line 2)" in error
