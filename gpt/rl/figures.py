"""What is measured in a step of RL: its rollouts, how far its updates moved the policy, and how well the value model predicted."""

from __future__ import annotations

import torch
from torch import Tensor

from gpt.losses import probability_ratio
from gpt.rl.advantages import kl_k1, kl_k3
from gpt.rl.rollouts import Rollouts

FIGURES = ("reward/score_mean", "rollout/kl_k1_nats_per_response", "rollout/truncated_share")
"""Metrics whose last values are figures of the stage."""


def describe(rollouts: Rollouts, rewards: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor | None) -> dict[str, float]:
    """Metrics of a step's rollouts; `rewards` and the logprobs are (B, T)."""
    written = rollouts.tokens.loss_mask
    n_responses, n_tokens = len(written), int(written.sum())
    metrics = {
        "reward/score_mean": rollouts.scores.mean().item(),
        "reward/score_std": rollouts.scores.std(correction=0).item(),
        "reward/total_mean": rewards.sum().item() / n_responses,
        "rollout/response_tokens": n_tokens / n_responses,
        "rollout/truncated_share": 1 - rollouts.stopped.float().mean().item(),
        "rollout/failed_share": rollouts.n_failed / n_responses,
        "rollout/logprob_mismatch": (old_logprobs - rollouts.sampler_logprobs)[written].abs().mean().item(),
    }
    if ref_logprobs is not None:
        old, ref = old_logprobs[written], ref_logprobs[written]
        metrics["rollout/kl_k1_nats_per_response"] = kl_k1(old, ref).sum().item() / n_responses
        metrics["rollout/kl_k3_nats_per_token"] = kl_k3(old, ref).mean().item()
    return metrics


@torch.no_grad()
def ratio_metrics(
    logprobs: Tensor, old_logprobs: Tensor, is_first: bool, clip_eps: float, *, keep: Tensor, global_count: int
) -> dict[str, Tensor]:
    """How far the policy has moved since the step began, as means over tokens: this micro-batch's part of them.

    The first update is also reported by itself: there the distance should be 0, while later updates are meant to move.
    """
    distance = (probability_ratio(logprobs, old_logprobs, keep) - 1).abs()  # (B, T)
    moved = torch.where(keep, kl_k3(old_logprobs, logprobs), 0.0)  # (B, T) the old policy sampled the tokens
    metrics = {"train/clip_fraction": (distance > clip_eps).sum() / global_count, "train/approx_kl": moved.sum() / global_count}
    return metrics | {"train/ratio_first": distance.sum() / global_count} if is_first else metrics


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns), both (N,): 1 = predicted exactly, 0 = no better than a constant. 0 if returns are equal."""
    variance = returns.var(correction=0)
    return float(1 - (returns - values).var(correction=0) / variance) if variance > 0 else 0.0
