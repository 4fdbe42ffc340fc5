"""The parts that credit is computed from: estimates of the KL divergence, rewards per token, GAE and whitening.

Everything is (B, T) over whole conversations, prompt and padding included; `response_mask` marks the tokens that the policy wrote. Values
outside it are never used, so not even a NaN there does harm. Schulman et al. 2016 (arXiv:1506.02438), 2017 (arXiv:1707.06347).
"""

from __future__ import annotations

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0
"""Beyond e^20 a ratio only says "far away", and it would soon overflow."""


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Estimate KL(p, q) by log(p/q) of each token (B, T) drawn from p. Single values may be negative. This one belongs in a reward.

    Schulman 2020, "Approximating KL divergence" (joschu.net/blog/kl-approx.html).
    """
    return logprobs - ref_logprobs


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Estimate KL(p, q) by q/p - 1 - log(q/p) of each token (B, T) drawn from p: k1's mean, never negative, with less variance."""
    log_ratio = (ref_logprobs - logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return log_ratio.exp() - 1 - log_ratio


def token_rewards(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor | None, response_mask: Tensor, *, kl_coef: float) -> Tensor:
    """Charge -kl_coef * k1 on every token of a response and add its score (B,) on the last one: (B, T), 0 outside the mask.

    Without a reference policy there is only the score. Ziegler et al. 2019 (arXiv:1909.08593), eq. 2; Ouyang et al. 2022, eq. 2.
    """
    assert bool(response_mask.any(dim=1).all()), "a response has at least one token"
    rewards = torch.zeros_like(logprobs)  # (B, T)
    if ref_logprobs is not None:
        rewards = torch.where(response_mask, -kl_coef * kl_k1(logprobs, ref_logprobs), rewards)
    positions = torch.arange(response_mask.shape[1], device=response_mask.device)  # (T,)
    last = torch.where(response_mask, positions, -1).argmax(dim=1, keepdim=True)  # (B, 1)
    return rewards.scatter_add(1, last, scores[:, None].to(rewards.dtype))


def gae(rewards: Tensor, values: Tensor, response_mask: Tensor, *, gamma: float, gae_lambda: float) -> Tensor:
    """A_t = sum_l (gamma*lambda)^l * delta_{t+l}, with delta_t = r_t + gamma*V_{t+1} - V_t. Schulman et al. 2016, eq. 16.

    `values[:, t]` was read before token t was written; the value after the last token is 0. Tokens outside the mask are stepped over:
    they affect no advantage.
    """
    advantages = torch.zeros_like(rewards)  # (B, T)
    future = torch.zeros_like(rewards[:, 0])  # (B,)
    next_value = torch.zeros_like(future)
    for t in reversed(range(rewards.shape[1])):
        keep = response_mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        future = torch.where(keep, delta + gamma * gae_lambda * future, future)
        next_value = torch.where(keep, values[:, t], next_value)
        advantages[:, t] = torch.where(keep, future, 0.0)
    return advantages


def whiten(values: Tensor, keep: Tensor) -> Tensor:
    """Scale the values where `keep` is True to mean 0 and deviation 1; the others become 0, and so do all if they are equal.

    The caller passes the whole global batch: a part of it has another mean. The variance is the biased one, as in OpenAI's baselines.
    """
    # In fp64 the mean of equal fp32 values is that value, so rounding is not blown up into advantages of +-1.
    chosen = values[keep].double()
    mean = chosen.mean()
    deviation = (chosen - mean).square().mean().sqrt()
    if deviation <= torch.finfo(values.dtype).eps * mean.abs():
        return torch.zeros_like(values)
    return torch.where(keep, (values.double() - mean) / deviation, 0.0).to(values.dtype)
