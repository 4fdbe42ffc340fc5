"""Credit assignment: how much better than expected each token was. One small function per algorithm.

To add an algorithm, write its function here, enter it in CREDIT, and add its name and traits to `ALGORITHMS` in `gpt/settings.py`.
The loop does not know which algorithm runs. A response's rows are grouped by prompt: rows 0 to responses_per_prompt - 1 answer the
step's first prompt, the next ones its second, and so on. That is what a baseline within a group (GRPO, RLOO) needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gpt.rl.advantages import gae, whiten
from gpt.settings import RlSettings


@dataclass(frozen=True)
class Judged:
    """The rollouts of a step, of all ranks, as a credit function sees them."""

    scores: Tensor
    """(B,), one per response: the sum of all scorers."""
    rewards: Tensor
    """(B, T): the score at the last token, less the price of diverging from the reference policy at every token."""
    values: Tensor
    """(B, T), what the value model expected before each token; zeros if the algorithm has none."""
    response_mask: Tensor
    """(B, T) True = the policy wrote this token."""


@dataclass(frozen=True)
class Credit:
    advantages: Tensor
    """(B, T), what the policy loss weighs each token's logprob by."""
    returns: Tensor
    """(B, T), what the value model learns to predict. In the unit of the rewards, never whitened."""


def ppo(config: RlSettings, judged: Judged) -> Credit:
    """The advantage over the value model's expectation, whitened. Schulman et al. 2017 (arXiv:1707.06347), eq. 11."""
    advantages = gae(judged.rewards, judged.values, judged.response_mask, gamma=config.gamma, gae_lambda=config.gae_lambda)
    return Credit(whiten(advantages, judged.response_mask), advantages + judged.values)


def reinforce(config: RlSettings, judged: Judged) -> Credit:
    """The whole return from each token on, whitened: the batch's mean is the only baseline. Williams 1992."""
    returns = gae(judged.rewards, torch.zeros_like(judged.rewards), judged.response_mask, gamma=config.gamma, gae_lambda=1.0)
    return Credit(whiten(returns, judged.response_mask), returns)


CREDIT: Mapping[str, Callable[[RlSettings, Judged], Credit]] = {"ppo": ppo, "reinforce": reinforce}
"""Each algorithm of `gpt.settings.ALGORITHMS` to its function."""
