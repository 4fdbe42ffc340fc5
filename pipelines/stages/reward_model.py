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
    """Items of several datasets count by their number; the metadata keeps the mean and deviation by which scores are normalised."""
    from gpt.reward import train

    require_role(policy, "policy", "reward_model starts from a policy")
    if not preferences and not ratings:
        raise StageFailure(
            "reward_model has neither preferences nor ratings to learn from; "
            'name one of the two, or both: inputs = { policy = "sft", preferences = "pairs" }'
        )
    pairs, rated = [each.path for each in preferences or []], [each.path for each in ratings or []]
    metadata = stage.gang(train, config, policy.path, pairs, rated, stage.seed, stage.output)
    for name, value in metadata.pop("figures").items():
        stage.figure(name, value)
    return stage.publish(Model, tokenizer=policy.metadata["tokenizer"], **metadata)
