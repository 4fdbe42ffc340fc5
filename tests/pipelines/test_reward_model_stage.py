"""The reward_model stage: its inputs, what it refuses, and where its results go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gpt.loop import Trained
from pipelines.artifacts import Model, Preferences, Ratings
from pipelines.plan.kinds import Input, load_kind
from pipelines.stage import StageFailure
from pipelines.stages.reward_model import RewardModelConfig, reward_model

CONFIG = RewardModelConfig(steps=1, global_batch_size=2, lr=1e-3)
POLICY = Model(Path("policy"), "a" * 64, {"role": "policy", "tokenizer": "t" * 64})
PAIRS = Preferences(Path("pairs"), "b" * 64)
RATED = Ratings(Path("rated"), "c" * 64)


class Bench:
    """The part of StageContext that reward_model uses. Its gang trains nothing."""

    seed = 7
    output = Path("output")

    def __init__(self) -> None:
        self.figures: dict[str, float] = {}
        self.arguments: tuple[Any, ...] = ()

    def gang(self, function: Any, *arguments: Any) -> Trained:
        self.arguments = arguments
        return Trained({"role": "reward", "score_mean": 0.5, "score_std": 2.0}, {"eval/pair_accuracy": 0.75})

    def figure(self, name: str, value: float) -> None:
        self.figures[name] = value

    def publish(self, kind: type[Model], **metadata: Any) -> Model:
        return kind(self.output, "d" * 64, metadata)


def run(policy: Model, preferences: list[Preferences] | None, ratings: list[Ratings] | None) -> tuple[Bench, Model]:
    bench = Bench()
    return bench, reward_model(CONFIG, policy, preferences, ratings, bench)  # type: ignore[arg-type]


def test_figures_go_to_the_action_record_and_metadata_to_the_manifest():
    bench, model = run(POLICY, [PAIRS], [RATED])
    assert bench.figures == {"eval/pair_accuracy": 0.75}
    assert model.metadata == {"role": "reward", "tokenizer": "t" * 64, "score_mean": 0.5, "score_std": 2.0}
    assert bench.arguments == (CONFIG, Path("policy"), [Path("pairs")], [Path("rated")], 7, Path("output"))


@pytest.mark.parametrize("absent", [None, []])
def test_either_pairs_or_ratings_suffice_and_neither_is_refused(absent: Any):
    assert run(POLICY, [PAIRS], absent)[0].arguments[2:4] == ([Path("pairs")], [])
    assert run(POLICY, absent, [RATED])[0].arguments[2:4] == ([], [Path("rated")])
    with pytest.raises(StageFailure, match="neither preferences nor ratings to learn from; add one of them, or both"):
        run(POLICY, absent, absent)


def test_training_from_a_reward_model_is_refused():
    with pytest.raises(StageFailure, match="model eeeeeeeeeeee: expected role policy, found reward; reward_model starts from a policy"):
        run(Model(Path("model"), "e" * 64, {"role": "reward", "tokenizer": "t" * 64}), [PAIRS], None)


def test_its_signature_takes_a_policy_and_optional_preferences_and_ratings():
    kind = load_kind("reward_model", Path())
    assert kind.trains()
    assert kind.inputs == {
        "policy": Input(Model, many=False, optional=False),
        "preferences": Input(Preferences, many=True, optional=True),
        "ratings": Input(Ratings, many=True, optional=True),
    }
