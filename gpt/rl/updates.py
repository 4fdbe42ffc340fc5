"""The losses of one micro-batch of an update, for the policy and for the value model, and the metrics that come with them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gpt.engine import Engine
from gpt.losses import chosen_logprobs, mean_entropy, ppo_policy_loss, reinforce_loss, value_loss
from gpt.rl.experience import Experience
from gpt.rl.figures import ratio_metrics
from gpt.settings import RlSettings


def policy_step_loss(
    config: RlSettings, engine: Engine, part: Experience, *, is_first: bool, global_count: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """The policy's loss () on this part of an update of `global_count` tokens, less the entropy bonus, and its metrics.

    `is_first` says that this is the first update of its step.
    """
    keep = part.tokens.loss_mask  # (B, T)
    logits = engine(part.tokens.token_ids)  # (B, T, V)
    logprobs = chosen_logprobs(logits, part.tokens.targets, config.temperature)  # (B, T)
    if config.traits().clipped:
        loss = ppo_policy_loss(logprobs, part.old_logprobs, part.advantages, clip_eps=config.clip_eps, keep=keep, global_count=global_count)
    else:
        loss = reinforce_loss(logprobs, part.advantages, keep=keep, global_count=global_count)
    entropy_logits = logits if config.entropy_coef else logits.detach()
    entropy = mean_entropy(entropy_logits, config.temperature, keep=keep, global_count=global_count)
    loss = loss - config.entropy_coef * entropy
    metrics = {"train/loss": loss.detach(), "train/entropy": entropy.detach()}
    return loss, metrics | ratio_metrics(logprobs, part.old_logprobs, is_first, config.clip_eps, keep=keep, global_count=global_count)


def value_step_loss(config: RlSettings, engine: Engine, part: Experience, *, global_count: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The value model's loss () on this part of an update of `global_count` tokens, and its metrics."""
    values = engine(part.tokens.token_ids).float()  # (B, T)
    loss = value_loss(
        values,
        part.old_values,
        part.returns,
        value_clip_eps=config.value_clip_eps,
        keep=part.tokens.loss_mask,
        global_count=global_count,
    )
    return loss, {"train/value_loss": loss.detach()}


def add_to(totals: dict[str, Tensor], more: Mapping[str, Tensor]) -> None:
    for name, value in more.items():
        totals[name] = totals[name] + value if name in totals else value


def mean_over_updates(metrics: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Average each metric of the first update over the updates that have it."""
    return {name: torch.stack([of_update[name] for of_update in metrics if name in of_update]).mean() for name in metrics[0]}
