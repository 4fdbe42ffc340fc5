"""Credit computed by hand, for two responses of two tokens each."""

from __future__ import annotations

import ast
import typing
from pathlib import Path
from typing import Any

import pytest
import torch

import gpt.rl.loop
from gpt.rl.credit import CREDIT, Credit, Judged, ppo, reinforce
from gpt.settings import ALGORITHMS, RlSettings

EVERYTHING = torch.ones(2, 2, dtype=torch.bool)


def settings(**changes: Any) -> RlSettings:
    return RlSettings(steps=1, prompts_per_step=2, global_batch_size=2, max_response_tokens=2, lr=1e-3, **changes)


def judged(rewards: list[list[float]], values: list[list[float]]) -> Judged:
    rows = torch.tensor(rewards)
    return Judged(rows.sum(dim=1), rows, torch.tensor(values), EVERYTHING)


def test_reinforce_credits_each_token_with_its_discounted_return_minus_the_mean():
    # Returns with gamma 0.5: 0 + 0.5 * 4 = 2 and 4; 0 + 0.5 * 8 = 4 and 8.
    # Their mean is 4.5, their variance (6.25 + 0.25 + 0.25 + 12.25) / 4 = 19 / 4.
    credit = reinforce(settings(algorithm="reinforce", gamma=0.5), judged([[0.0, 4.0], [0.0, 8.0]], [[0.0, 0.0], [0.0, 0.0]]))
    assert credit.returns.tolist() == [[2.0, 4.0], [4.0, 8.0]]
    deviation = (19 / 4) ** 0.5
    assert credit.advantages.flatten().tolist() == pytest.approx([each / deviation for each in (-2.5, -0.5, -0.5, 3.5)])


def test_ppo_credits_each_token_with_its_advantage_and_keeps_the_returns_unwhitened():
    # delta: 0 + 0.5 - 0.25 = 0.25 and 1 - 0.5 = 0.5; with lambda 0.5 the first advantage is 0.25 + 0.5 * 0.5 = 0.5.
    # The second response is as expected: 0 + 1 - 1 = 0 and 1 - 1 = 0.
    credit = ppo(settings(gae_lambda=0.5), judged([[0.0, 1.0], [0.0, 1.0]], [[0.25, 0.5], [1.0, 1.0]]))
    assert credit.returns.tolist() == [[0.75, 1.0], [1.0, 1.0]]  # advantages 0.5, 0.5, 0, 0 plus values
    assert credit.advantages.flatten().tolist() == pytest.approx([1.0, 1.0, -1.0, -1.0])  # mean 0.25, deviation 0.25


def test_every_algorithm_of_the_settings_has_a_credit_function_and_traits():
    assert set(CREDIT) == set(ALGORITHMS) == set(typing.get_args(RlSettings.model_fields["algorithm"].annotation))


def test_the_loop_names_no_algorithm():
    strings = {node.value for node in ast.walk(ast.parse(Path(gpt.rl.loop.__file__).read_text())) if isinstance(node, ast.Constant)}
    assert not strings & set(ALGORITHMS)


def test_a_baseline_within_a_group_can_rely_on_consecutive_rows_per_prompt():
    # A leave-one-out baseline, RLOO: each response against the mean of the prompt's other ones.
    def rloo(config: RlSettings, judged: Judged) -> Credit:
        groups = judged.scores.view(-1, config.responses_per_prompt)
        baseline = (groups.sum(dim=1, keepdim=True) - groups) / (config.responses_per_prompt - 1)
        advantages = (groups - baseline).view(-1, 1) * judged.response_mask
        return Credit(advantages, advantages)

    config = settings(algorithm="reinforce").model_copy(update={"prompts_per_step": 1, "responses_per_prompt": 2})
    assert rloo(config, judged([[0.0, 1.0], [0.0, 3.0]], [[0.0, 0.0], [0.0, 0.0]])).advantages.tolist() == [[-2.0, -2.0], [2.0, 2.0]]
