"""Experience: what the updates of a step learn from, and in which order they read it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpt.batching import Batch
from gpt.engine import Rank
from gpt.losses import chosen_logprobs
from gpt.random_streams import permutation, stream_seed
from gpt.settings import RlSettings


@dataclass(frozen=True)
class Experience:
    """The rollouts of a step with everything that the losses need, all (B, T)."""

    tokens: Batch
    old_logprobs: Tensor
    """Under the policy as it was when the step began."""
    advantages: Tensor
    old_values: Tensor
    """From the value model as it was when the step began; zeros without one."""
    returns: Tensor

    def part(self, rows: Sequence[int], device: torch.device) -> Experience:
        tokens = batch_of(self.tokens, rows, device)
        width = tokens.targets.shape[1]
        others = (self.old_logprobs, self.advantages, self.old_values, self.returns)
        return Experience(tokens, *(tensor[rows, :width].to(device) for tensor in others))


def batch_of(tokens: Batch, rows: Sequence[int], device: torch.device) -> Batch:
    """Select rows, and drop the padding that none of them needs."""
    width = int(tokens.loss_mask[rows].any(dim=0).nonzero().max()) + 1
    return Batch(tokens.token_ids[rows, :width], tokens.targets[rows, :width], tokens.loss_mask[rows, :width]).to(device)


def update_rows(config: RlSettings, seed: int, step: int) -> list[list[list[int]]]:
    """Which rollouts each update learns from, by epoch. Every epoch has all of them, in an order of its own."""
    n, size = config.rollouts_per_step(), config.global_batch_size
    orders = [permutation(stream_seed(seed, "update", step, epoch), n).tolist() for epoch in range(config.ppo_epochs)]
    return [[order[first : first + size] for first in range(0, n, size)] for order in orders]


@torch.no_grad()
def read_all(rank: Rank, tokens: Batch, passes: Sequence[Sequence[int]], read: Callable[[Batch], Tensor]) -> Tensor:
    """Apply `read` to every row and return its results (B, T) on every rank. `passes` are the rows that this rank reads together."""
    results = torch.zeros(tokens.targets.shape)
    for rows in passes:
        batch = batch_of(tokens, rows, rank.device)
        results[list(rows), : batch.targets.shape[1]] = read(batch).cpu()
    return rank.all_sum(results)


def logprobs_of(config: RlSettings, model: Callable[[Tensor], Tensor], batch: Batch) -> Tensor:
    """The targets' logprobs (B, T) at the temperature at which they were sampled."""
    return chosen_logprobs(model(batch.token_ids), batch.targets, config.temperature)
