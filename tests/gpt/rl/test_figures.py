from __future__ import annotations

import pytest
import torch

from gpt.batching import Batch
from gpt.rl.figures import describe, explained_variance
from gpt.rl.rollouts import Rollouts


def test_the_metrics_of_a_step_computed_by_hand():
    # Two responses of 1 and 3 tokens. The first's token has k1 = ln 2 and k3 = 1/2 - 1 + ln 2, the others 0.
    written = torch.tensor([[True, False, False], [True, True, True]])
    nothing = torch.zeros(2, 3)
    tokens = Batch(nothing.long(), nothing.long(), written)
    rollouts = Rollouts(tokens, nothing - 0.5, scores=torch.tensor([1.0, 2.0]), stopped=torch.tensor([True, False]), n_failed=1)
    old_logprobs = torch.tensor([[2.0, 9.0, 9.0], [1.0, 1.0, 1.0]]).log()
    rewards = torch.tensor([[0.9, 0.0, 0.0], [0.0, 0.0, 2.0]])
    described = describe(rollouts, rewards, old_logprobs, nothing)
    assert described == pytest.approx(
        {
            "reward/score_mean": 1.5,
            "reward/score_std": 0.5,
            "reward/total_mean": 1.45,
            "rollout/response_tokens": 2.0,
            "rollout/truncated_share": 0.5,
            "rollout/failed_share": 0.5,
            "rollout/logprob_mismatch": (0.6931472 + 4 * 0.5) / 4,
            "rollout/kl_k1_nats_per_response": 0.6931472 / 2,
            "rollout/kl_k3_nats_per_token": (0.6931472 - 0.5) / 4,
        }
    )


def test_the_explained_share_of_the_returns_variance():
    returns = torch.tensor([1.0, 2.0, 3.0])
    assert explained_variance(returns + 5.0, returns) == 1.0
    assert explained_variance(torch.zeros(3), returns) == 0.0
    assert explained_variance(returns / 2, returns) == pytest.approx(0.75)  # a quarter of the variance is left
    assert explained_variance(returns, torch.ones(3)) == 0.0
