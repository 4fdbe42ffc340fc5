"""RL: a policy learns from what its own responses are worth to a reward model, a reward function or a verifier."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from gpt.settings import Operational, RlSettings, UserFunction, check_effect
from pipelines.artifacts import Model, Prompts
from pipelines.stage import Models, StageConfig, StageContext, StageFailure, require_role

MODELS = Models(needs={"policy": "policy", "reward_model": "reward"}, needs_chat=("policy",), makes="policy", makes_chat=True)


class RlConfig(StageConfig, RlSettings):
    reward: UserFunction | None = None
    """A function of your own, "./reward.py:score": what `score(prompt, response, record)` returns is added to the other scores."""
    reward_timeout_s: Operational[float] = Field(default=5.0, gt=0)
    """Longest time for one call of it."""
    reward_memory_gib: Operational[float] = Field(default=2.0, gt=0)
    """Of the process that it runs in, one beside each rank."""
    verifier: Literal["number"] | None = None
    """"number": a response whose number is the reference's is scored 1, another one 0."""
    number_marker: str = Field(default="####", min_length=1)
    """The number is what follows this for the last time."""

    @model_validator(mode="after")
    def _judges_are_there(self) -> RlConfig:
        if self.reward is None:
            check_effect(self, ("reward_timeout_s", "reward_memory_gib"), "without a reward function")
        if self.verifier is None:
            check_effect(self, ("number_marker",), "without a verifier")
        return self


def rl(config: RlConfig, policy: Model, prompts: list[Prompts], reward_model: Model | None, stage: StageContext) -> Model:
    """Scores of a reward model, a reward function and a verifier are added up; there must be one of them at least."""
    from gpt.rl import RewardModelScorer, Scorer, train
    from gpt.scorers import FunctionScorer, NumberScorer

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
            "rl has nothing that says what a response is worth; name one or several: inputs = { ..., reward_model = 'reward_model' }, "
            "reward = './reward.py:score' or verifier = 'number'"
        )
    metadata = stage.gang(train, config, policy.path, [each.path for each in prompts], scorers, stage.seed, stage.output)
    for name, value in metadata.pop("figures").items():
        stage.figure(name, value)
    return stage.publish(Model, tokenizer=policy.metadata["tokenizer"], **metadata)


def _check_models(policy: Model, reward_model: Model | None) -> None:
    require_role(policy, "policy", "what learns in rl is a policy, such as an sft stage makes")
    if reward_model is None:
        return
    require_role(reward_model, "reward", "rl wants a reward model as reward_model, such as a reward_model stage makes")
    if reward_model.metadata["tokenizer"] != policy.metadata["tokenizer"]:
        raise StageFailure(
            f"reward model {reward_model.digest[:12]} has tokenizer {reward_model.metadata['tokenizer'][:12]}, policy {policy.digest[:12]} "
            f"has {policy.metadata['tokenizer'][:12]}; the reward model reads the policy's own tokens: train one from this policy"
        )


def _check_references(prompts: list[Prompts], marker: str) -> None:
    from gpt.scorers import reference_number

    references = [record.get("reference") for each in prompts for record in each.records("train")]
    without = [reference for reference in references if reference_number(reference, marker) is None]
    if without:
        raise StageFailure(
            f"verifier = 'number' needs a number in every reference: {len(without)} of {len(references)} training prompts have none, "
            f"the first {without[0]!r}; wanted a number, or a text with one behind number_marker = {marker!r}"
        )
