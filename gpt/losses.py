"""The losses, as maths on tensors: sums over the tokens that count, divided once by their global count."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def lm_loss(logits: Tensor, targets: Tensor, loss_mask: Tensor, *, global_count: int) -> Tensor:
    """Next-token cross-entropy in nats: logits (B, T, V), targets (B, T), loss_mask (B, T) True = counts -> ().

    `global_count` is the number of counting tokens in the whole optimizer step, so that the parts of a batch add up to its loss.
    """
    token_loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view_as(targets)  # (B, T)
    return torch.where(loss_mask, token_loss, 0.0).sum() / global_count


def reward_pair_loss(chosen_scores: Tensor, rejected_scores: Tensor, *, global_count: int) -> Tensor:
    """Bradley-Terry: -log sigma(chosen - rejected), scores (B,) of the same pairs -> (). Ouyang et al. 2022 (arXiv:2203.02155), eq. 1."""
    return -F.logsigmoid(chosen_scores - rejected_scores).sum() / global_count


def reward_centering_loss(chosen_scores: Tensor, rejected_scores: Tensor, *, global_count: int) -> Tensor:
    """(chosen + rejected)^2, scores (B,) of the same pairs -> (). Pairs do not determine a prompt's mean score; this pulls it to 0.

    Eisenstein et al. 2023 (arXiv:2312.09244), section 2.
    """
    return (chosen_scores + rejected_scores).square().sum() / global_count


def reward_rating_loss(scores: Tensor, ratings: Tensor, *, global_count: int) -> Tensor:
    """Logistic loss of scores (B,), read as log odds, against ratings (B,) from 0 to 1: cross-entropy of two soft classes -> ()."""
    return F.binary_cross_entropy_with_logits(scores, ratings, reduction="sum") / global_count


def chosen_logprobs(logits: Tensor, token_ids: Tensor, temperature: float) -> Tensor:
    """The logprob of each token drawn at this temperature: logits (B, T, V) that predict token_ids (B, T) -> nats (B, T) in fp32."""
    logprobs = (logits.float() / temperature).log_softmax(dim=-1)  # (B, T, V)
    return logprobs.gather(-1, token_ids[..., None]).squeeze(-1)


def mean_entropy(logits: Tensor, temperature: float, *, keep: Tensor, global_count: int) -> Tensor:
    """Entropy in nats per token at this temperature: logits (B, T, V), keep (B, T) True = counts -> ()."""
    logprobs = (logits[keep].float() / temperature).log_softmax(dim=-1)  # (tokens that count, V)
    return -(logprobs.exp() * logprobs).sum() / global_count


def ppo_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, clip_eps: float, keep: Tensor, global_count: int
) -> Tensor:
    """-min(ratio * A, clip(ratio, 1 - eps, 1 + eps) * A), all (B, T) -> (). Schulman et al. 2017 (arXiv:1707.06347), eq. 7."""
    ratio = probability_ratio(logprobs, old_logprobs, keep)  # (B, T)
    advantages = torch.where(keep, advantages, 0.0)
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_eps, 1 + clip_eps) * advantages).sum() / global_count


def probability_ratio(logprobs: Tensor, old_logprobs: Tensor, keep: Tensor) -> Tensor:
    """How many times likelier each token has become since it was drawn, all (B, T); 1 where `keep` is False."""
    # Masked before exp, because the gradient of where() around it would be 0 * NaN. Clamped, because e^90 is infinite in fp32.
    return torch.where(keep, logprobs - old_logprobs, 0.0).clamp(-20.0, 20.0).exp()


def reinforce_loss(logprobs: Tensor, advantages: Tensor, *, keep: Tensor, global_count: int) -> Tensor:
    """-log p * A, all (B, T) -> (). Williams 1992, "Simple statistical gradient-following algorithms", eq. 11."""
    return -(torch.where(keep, logprobs, 0.0) * torch.where(keep, advantages, 0.0)).sum() / global_count


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, value_clip_eps: float, keep: Tensor, global_count: int) -> Tensor:
    """Half the squared error of the value, or of the value clipped to within eps of the old one, whichever is larger; all (B, T) -> ().

    OpenAI's baselines; "The 37 implementation details of PPO" (Huang et al. 2022), detail 9.
    """
    clipped = torch.maximum(torch.minimum(values, old_values + value_clip_eps), old_values - value_clip_eps)
    errors = torch.where(keep, values - returns, 0.0)
    clipped_errors = torch.where(keep, clipped - returns, 0.0)
    return 0.5 * torch.maximum(errors.square(), clipped_errors.square()).sum() / global_count
