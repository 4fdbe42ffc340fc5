"""Scoring: the contract between RL and whatever judges its responses, and the sum of several judges' scores.

A scorer is any object with the two methods of `Scorer`; `gpt/rl/scorers.py` and `gpt/rl/user_reward.py` have ours. A response's score is
the sum of what all scorers give it. If any of them cannot score it, it gets `missing_end_score`, like a response that was cut off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from gpt.engine import Rank
from gpt.settings import RlSettings

MAX_FAILURE_BYTES = 400
"""Bytes of a failure's text that are sent to the other ranks."""


@dataclass(frozen=True)
class Rollout:
    """A finished response: `Rollout({"prompt": [...], "reference": "4"}, prompt_ids=[256, 50, ...], response_ids=[52, 259], text="4")`."""

    record: Mapping[str, Any]
    """The prompt's record, as in the prompts artifact."""
    prompt_ids: list[int]
    response_ids: list[int]
    """Includes the end token."""
    text: str
    """The response as text, without the end token."""


@dataclass(frozen=True)
class Scores:
    """A scorer's result: `Scores(torch.tensor([0.5, math.nan]), failures={1: "ZeroDivisionError in score() at 'x / 0'"})`."""

    scores: Tensor
    """(B,), one per rollout; NaN if it could not be scored."""
    failures: Mapping[int, str] = field(default_factory=dict)
    """Row to the reason why it could not be scored, where the scorer knows one."""


class Scorer(Protocol):
    """A judge of responses. The stage makes it and sends it to every rank, where it is opened."""

    def open(self, device: torch.device) -> None: ...

    def scores(self, rollouts: Sequence[Rollout]) -> Scores:
        """Score at least one rollout. Only finished responses arrive here: one that was cut off gets `missing_end_score`."""
        ...


def total_scores(config: RlSettings, scorers: Sequence[Scorer], rollouts: Sequence[Rollout]) -> tuple[Tensor, list[str]]:
    """Sum the scores of all scorers (B,). Also return the reason for each rollout that got `missing_end_score` since a scorer failed."""
    total = torch.zeros(len(rollouts))
    failures: dict[int, str] = {}
    for scorer in scorers:
        result = scorer.scores(rollouts)
        scores = result.scores.detach().to("cpu", torch.float32)  # (B,)
        assert len(scores) == len(rollouts), f"{scorer} gave {len(scores)} scores for {len(rollouts)} rollouts"
        total += scores
        for row in (~total.isfinite()).nonzero().flatten().tolist():
            non_finite = f"{type(scorer).__name__} scored {rollouts[row].text!r} {scores[row].item()}"
            failures.setdefault(row, result.failures.get(row, non_finite))
    return torch.where(total.isfinite(), total, config.missing_end_score), list(failures.values())


def count_failures(rank: Rank, config: RlSettings, failures: Sequence[str], step: int) -> int:
    """Count the failures on all ranks; ValueError on every rank if they exceed `max_failed_share`."""
    n_failed = int(rank.all_sum(torch.tensor(len(failures))).item())
    n_responses = config.rollouts_per_step()
    if n_failed / n_responses > config.max_failed_share:
        # Every rank shares the text of its first failure, so that all ranks end with the same message.
        encoded = torch.zeros(rank.world_size, MAX_FAILURE_BYTES, dtype=torch.int64)
        for position, byte in enumerate("".join(failures[:1]).encode(errors="backslashreplace")[:MAX_FAILURE_BYTES]):
            encoded[rank.rank, position] = byte
        texts = [bytes(row[row > 0].tolist()).decode(errors="replace") for row in rank.all_sum(encoded)]
        raise ValueError(
            f"step {step + 1}: {n_failed} of {n_responses} responses could not be scored, which exceeds max_failed_share = "
            f"{config.max_failed_share:g}. The first failure: {next(filter(None, texts))}. Fix the scorer, or raise max_failed_share"
        )
    return n_failed
