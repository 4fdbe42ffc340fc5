"""RL: a policy learns from the scores that a reward model, a reward function or a verifier gives its own responses."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from gpt.settings import Operational, RlSettings, UserFunction, check_effect
from pipelines.artifacts import Model, Prompts
from pipelines.stage import Models, StageConfig, StageContext, StageFailure, require_role, require_same_tokenizer

MODELS = Models(needs={"policy": "policy", "reward_model": "reward"}, needs_chat=("policy",), makes="policy", makes_chat=True)


class RlConfig(StageConfig, RlSettings):
    reward: UserFunction | None = None
    """Your own function, "./reward.py:score". What `score(prompt, response, record)` returns is added to the other scores."""
    reward_timeout_s: Operational[float] = Field(default=5.0, gt=0)
    """Most seconds for one call of the reward function."""
    reward_memory_gib: Operational[float] = Field(default=2.0, gt=0)
    """Memory limit of the process in which the reward function runs, one beside each rank."""
    verifier: Literal["number"] | None = None
    """"number": scores a response 1 if its number equals the reference's, else 0."""
    number_marker: str = Field(default="####", min_length=1)
    """The number is the one that follows the last occurrence of this text."""

    @model_validator(mode="after")
    def _settings_have_scorers(self) -> RlConfig:
        if self.reward is None:
            check_effect(self, ("reward_timeout_s", "reward_memory_gib"), "without a reward function")
        if self.verifier is None:
            check_effect(self, ("number_marker",), "without a verifier")
        return self


def rl(config: RlConfig, policy: Model, prompts: list[Prompts], reward_model: Model | None, stage: StageContext) -> Model:
    """Add up the scores of a reward model, a reward function and a verifier; at least one of them is required."""
    from gpt.rl.loop import train
    from gpt.rl.scorers import NumberScorer, RewardModelScorer
    from gpt.rl.scoring import Scorer
    from gpt.rl.user_reward import FunctionScorer

    _check_models(policy, reward_model)
    scorers: list[Scorer] = []
    if reward_model:
        scorers.append(RewardModelScorer(reward_model.path, reward_model.metadata["score_mean"], reward_model.metadata["score_std"]))
    if config.reward:
        scorers.append(
            FunctionScorer.of(
                stage.function(config.reward),
                max_failures=math.ceil(config.max_failed_share * config.rollouts_per_step()),
                timeout_s=config.reward_timeout_s,
                memory_gib=config.reward_memory_gib,
            )
        )
    if config.verifier:
        _check_references(prompts, config.number_marker)
        scorers.append(NumberScorer(config.number_marker))
    if not scorers:
        raise StageFailure(
            "rl has nothing to score responses with; add at least one: inputs = { ..., reward_model = 'reward_model' }, "
            "reward = './reward.py:score' or verifier = 'number'"
        )
    trained = stage.gang(train, config, policy.path, [each.path for each in prompts], scorers, stage.seed, stage.output)
    for name, value in trained.figures.items():
        stage.figure(name, value)
    return stage.publish(Model, tokenizer=policy.metadata["tokenizer"], **trained.metadata)


def _check_models(policy: Model, reward_model: Model | None) -> None:
    require_role(policy, "policy", "rl trains a policy, such as an sft stage makes")
    if reward_model is not None:
        require_role(reward_model, "reward", "the input reward_model takes what a reward_model stage makes")
        require_same_tokenizer(policy, reward_model)


def _check_references(prompts: list[Prompts], marker: str) -> None:
    from gpt.numbers import reference_number

    references = [record.get("reference") for each in prompts for record in each.records("train")]
    without = [reference for reference in references if reference_number(reference, marker) is None]
    if without:
        raise StageFailure(
            f"verifier = 'number' needs a number in every reference, and {len(without)} of {len(references)} training prompts have none: "
            f"expected a number, or a text with one after number_marker = {marker!r}, found first {without[0]!r}"
        )
