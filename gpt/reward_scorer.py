"""A trained reward model in use: scores of responses, and the value model that PPO starts from.

Raw scores have no origin and no unit, since pairs only determine differences. Users of a reward model therefore normalise its scores by
the mean and deviation that its manifest holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from gpt.batching import padded
from gpt.model import RewardModel, load_reward_model

ROWS_PER_PASS = 16
"""Conversations that are scored together, without gradients. Fixed, so that scores do not depend on ranks or micro-batch size."""


def end_scores(model: Callable[[Tensor], Tensor], rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Raw scores (B,) in fp32, each read at the last token of its row."""
    token_ids = padded(rows, 0).to(device)  # (B, T); any id serves as padding, since no token attends to a later one
    last = torch.tensor([len(row) - 1 for row in rows], device=device)  # (B,)
    return model(token_ids).gather(1, last[:, None]).squeeze(1).float()


class RewardScorer:
    """An open reward model: `RewardScorer(folder, mean=0.3, std=1.7, device=device).scores(prompts, responses)`.

    `mean` and `std` are the manifest's score_mean and score_std.
    """

    def __init__(self, folder: Path, mean: float, std: float, device: torch.device) -> None:
        self._model = load_reward_model(folder).to(device)
        self._mean = mean
        self._std = std
        self._device = device

    @torch.no_grad()
    def scores(self, prompts: Sequence[list[int]], responses: Sequence[list[int]]) -> Tensor:
        """Normalised scores (B,), each read at its response's last token. The training items had mean 0 and deviation 1.

        Training only ever read scores at end tokens, so the score of a response that was cut off means nothing: the caller replaces it.
        """
        rows = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
        passes = [rows[first : first + ROWS_PER_PASS] for first in range(0, len(rows), ROWS_PER_PASS)]
        raw = torch.cat([end_scores(self._model, rows_of_pass, self._device) for rows_of_pass in passes])  # (B,)
        return (raw - self._mean) / self._std


def value_model(folder: Path, mean: float, std: float) -> RewardModel:
    """Load a reward model as PPO's first value model: its head is scaled so that its value at an end token is the normalised score."""
    model = load_reward_model(folder)
    with torch.no_grad():
        model.output.weight /= std
        model.output.bias.sub_(mean).div_(std)
    return model
