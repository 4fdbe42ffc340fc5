"""Our own scorers: a reward model, and a verifier of numbers. `gpt/rl/user_reward.py` has the one for a user's own function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gpt.numbers import has_number, reference_number
from gpt.reward_scorer import RewardScorer
from gpt.rl.scoring import Rollout, Scores


@dataclass
class RewardModelScorer:
    """A reward model as a Scorer. The value model starts from the first of these. `mean` and `std` are from its manifest."""

    folder: Path
    mean: float
    std: float

    def open(self, device: torch.device) -> None:
        self._opened = RewardScorer(self.folder, self.mean, self.std, device)

    def scores(self, rollouts: Sequence[Rollout]) -> Scores:
        return Scores(self._opened.scores([each.prompt_ids for each in rollouts], [each.response_ids for each in rollouts]))


@dataclass(frozen=True)
class NumberScorer:
    """Scores 1 if the number after the response's last marker equals the reference's, else 0: `NumberScorer("####")`, as in GSM8K.

    Cobbe et al. 2021 (arXiv:2110.14168).
    """

    marker: str

    def open(self, device: torch.device) -> None: ...

    def scores(self, rollouts: Sequence[Rollout]) -> Scores:
        return Scores(torch.tensor([float(self._is_right(rollout)) for rollout in rollouts]))

    def _is_right(self, rollout: Rollout) -> bool:
        number = reference_number(rollout.record.get("reference"), self.marker)
        assert number is not None, f"the record {rollout.record} has no number; the stage should have refused it"
        return has_number(rollout.text, number, self.marker)
