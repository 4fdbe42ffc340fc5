"""The reward_model stage: what it takes, what it refuses, and what goes where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines.artifacts import Model, Preferences, Ratings
from pipelines.plan.kinds import Input, load_kind
from pipelines.stage import StageFailure
from pipelines.stages.reward_model import RewardModelConfig, reward_model

CONFIG = RewardModelConfig(steps=1, global_batch_size=2, lr=1e-3)
POLICY = Model(Path("policy"), "a" * 64, {"role": "policy", "tokenizer": "t" * 64})
PAIRS = Preferences(Path("pairs"), "b" * 64)
RATED = Ratings(Path("rated"), "c" * 64)


class Bench:
    """As much of a StageContext as reward_model asks for; its gang trains nothing."""

    seed = 7
    output = Path("output")

    def __init__(self) -> None:
        self.figures: dict[str, float] = {}
        self.given: tuple[Any, ...] = ()

    def gang(self, function: Any, *arguments: Any) -> dict[str, Any]:
        self.given = arguments
        return {"role": "reward", "score_mean": 0.5, "score_std": 2.0, "figures": {"eval/pair_accuracy": 0.75}}

    def figure(self, name: str, value: float) -> None:
        self.figures[name] = value

    def publish(self, kind: type[Model], **metadata: Any) -> Model:
        return kind(self.output, "d" * 64, metadata)


def run(policy: Model, preferences: list[Preferences] | None, ratings: list[Ratings] | None) -> tuple[Bench, Model]:
    bench = Bench()
    return bench, reward_model(CONFIG, policy, preferences, ratings, bench)  # type: ignore[arg-type]


def test_figures_go_to_the_action_and_the_rest_to_the_manifest():
    bench, model = run(POLICY, [PAIRS], [RATED])
    assert bench.figures == {"eval/pair_accuracy": 0.75}
    assert model.metadata == {"role": "reward", "tokenizer": "t" * 64, "score_mean": 0.5, "score_std": 2.0}
    assert bench.given == (CONFIG, Path("policy"), [Path("pairs")], [Path("rated")], 7, Path("output"))


@pytest.mark.parametrize("absent", [None, []])
def test_pairs_or_ratings_alone_will_do_and_neither_will_not(absent: Any):
    assert run(POLICY, [PAIRS], absent)[0].given[2:4] == ([Path("pairs")], [])
    assert run(POLICY, absent, [RATED])[0].given[2:4] == ([], [Path("rated")])
    with pytest.raises(StageFailure, match="neither preferences nor ratings to learn from; name one of the two, or both"):
        run(POLICY, absent, absent)


def test_a_reward_model_is_no_policy_to_start_from():
    with pytest.raises(StageFailure, match="model eeeeeeeeeeee has the role reward; reward_model starts from a policy"):
        run(Model(Path("model"), "e" * 64, {"role": "reward", "tokenizer": "t" * 64}), [PAIRS], None)


def test_its_signature_takes_either_kind_of_records_or_none():
    kind = load_kind("reward_model", Path())
    assert kind.trains()
    assert kind.inputs == {
        "policy": Input(Model, many=False, optional=False),
        "preferences": Input(Preferences, many=True, optional=True),
        "ratings": Input(Ratings, many=True, optional=True),
    }
