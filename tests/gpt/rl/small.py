"""Small settings and scorers for tests of RL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gpt.rl.scoring import Rollout, Scores
from gpt.settings import RlSettings
from gpt.tokenizer import byte_tokenizer

END = 259
TOKENIZER = byte_tokenizer()


def settings(**changes: Any) -> RlSettings:
    base = dict(steps=2, prompts_per_step=4, responses_per_prompt=2, global_batch_size=4, max_response_tokens=8, lr=1e-2, log_every=1)
    return RlSettings(**{**base, "weight_decay": 0.0, "lr_schedule": "constant", **changes})


def one_update(**changes: Any) -> RlSettings:
    return settings(steps=1, global_batch_size=8, **changes)


class ShareOfA:
    """Scores a response by its share of the letter a."""

    def __init__(self) -> None:
        self.seen: list[Rollout] = []

    def open(self, device: torch.device) -> None:
        self.seen.clear()

    def scores(self, rollouts: Sequence[Rollout]) -> Scores:
        self.seen += rollouts
        return Scores(torch.tensor([rollout.text.count("a") / max(1, len(rollout.text)) for rollout in rollouts]))


class Always:
    """Gives every response the same score, except the first ones, for which it gives a reason each."""

    def __init__(self, score: float, *failures: str) -> None:
        self.found = score, failures

    def open(self, device: torch.device) -> None: ...

    def scores(self, rollouts: Sequence[Rollout]) -> Scores:
        score, failures = self.found
        scores = torch.full((len(rollouts),), score)
        scores[: len(failures)] = torch.nan
        return Scores(scores, dict(enumerate(failures)))
