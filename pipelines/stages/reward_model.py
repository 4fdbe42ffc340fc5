"""Reward model: a policy learns to score responses, from pairs (chosen and rejected), from ratings, or from both."""

from __future__ import annotations

from gpt.settings import RewardSettings
from pipelines.artifacts import Model, Preferences, Ratings
from pipelines.stage import Models, StageConfig, StageContext, StageFailure, require_role

MODELS = Models(needs={"policy": "policy"}, makes="reward")


class RewardModelConfig(StageConfig, RewardSettings):
    pass


def reward_model(
    config: RewardModelConfig,
    policy: Model,
    preferences: list[Preferences] | None,
    ratings: list[Ratings] | None,
    stage: StageContext,
) -> Model:
    """Train on the pairs and ratings of all datasets, each once per epoch. The metadata has what normalises scores: mean and deviation."""
    from gpt.reward import train

    require_role(policy, "policy", "reward_model starts from a policy, such as an sft stage makes")
    if not preferences and not ratings:
        raise StageFailure(
            "reward_model has neither preferences nor ratings to learn from; "
            'add one of them, or both: inputs = { policy = "sft", preferences = "pairs" }'
        )
    pairs, rated = [each.path for each in preferences or []], [each.path for each in ratings or []]
    trained = stage.gang(train, config, policy.path, pairs, rated, stage.seed, stage.output)
    for name, value in trained.figures.items():
        stage.figure(name, value)
    return stage.publish(Model, tokenizer=policy.metadata["tokenizer"], **trained.metadata)
