"""From scores to advantages: the price of divergence, the reward of each token, and what a token was worth beyond expectation.

Everything is (B, T) over whole conversations, prompt and padding included; `response_mask` says which tokens the policy wrote. What
lies outside it is never read, so not even a NaN there does harm. Schulman et al. 2016 (arXiv:1506.02438), 2017 (arXiv:1707.06347).
"""

from __future__ import annotations

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0
"""Beyond e^20 a ratio says nothing but "far away", and it would overflow soon."""


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log(p/q) of each token (B, T), drawn from p: its mean is KL(p, q); single ones may be negative. Its place is in a reward.

    Schulman 2020, "Approximating KL divergence" (joschu.net/blog/kl-approx.html).
    """
    return logprobs - ref_logprobs


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """q/p - 1 - log(q/p) of each token (B, T), drawn from p: the same mean as k1's, but never negative and of less variance."""
    log_ratio = (ref_logprobs - logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return log_ratio.exp() - 1 - log_ratio


def token_rewards(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor | None, response_mask: Tensor, *, kl_coef: float) -> Tensor:
    """-kl_coef * k1 on every token of a response, and its score (B,) on the last one alone: (B, T), 0 outside the mask.

    Without a reference policy there is the score alone. Ziegler et al. 2019 (arXiv:1909.08593), eq. 2; Ouyang et al. 2022, eq. 2.
    """
    assert bool(response_mask.any(dim=1).all()), "a response has at least one token"
    rewards = torch.zeros_like(logprobs)  # (B, T)
    if ref_logprobs is not None:
        rewards = torch.where(response_mask, -kl_coef * kl_k1(logprobs, ref_logprobs), rewards)
    places = torch.arange(response_mask.shape[1], device=response_mask.device)  # (T,)
    last = torch.where(response_mask, places, -1).argmax(dim=1, keepdim=True)  # (B, 1)
    return rewards.scatter_add(1, last, scores[:, None].to(rewards.dtype))


def gae(rewards: Tensor, values: Tensor, response_mask: Tensor, *, gamma: float, gae_lambda: float) -> Tensor:
    """A_t = sum_l (gamma*lambda)^l * delta_{t+l}, and delta_t = r_t + gamma*V_{t+1} - V_t. Schulman et al. 2016, eq. 16.

    `values[:, t]` was read before token t was written; after the last one there is nothing to expect. Tokens outside the mask
    are stepped over: they change nobody's advantage.
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
    """Mean 0 and deviation 1 over the values where `keep` is True, the others 0; of equal values nothing is left.

    The caller gives the whole global batch: a part has another mean. The variance is the biased one, as OpenAI's.
    """
    # In fp64 the mean of equal fp32 values is that value, and no rounding is blown up into advantages of +-1.
    chosen = values[keep].double()
    mean = chosen.mean()
    deviation = (chosen - mean).square().mean().sqrt()
    if deviation <= torch.finfo(values.dtype).eps * mean.abs():
        return torch.zeros_like(values)
    return torch.where(keep, (values.double() - mean) / deviation, 0.0).to(values.dtype)
