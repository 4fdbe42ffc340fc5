from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from gpt.rl.scorers import NumberScorer
from gpt.rl.scoring import Rollout, Scores, count_failures, total_scores
from gpt.settings import RlSettings


def rollouts(*texts: str) -> list[Rollout]:
    return [Rollout({"prompt": [], "reference": "4"}, [1], [2], text) for text in texts]


class AsFloat:
    """Scores a response by the number that it spells."""

    def open(self, device: torch.device) -> None: ...

    def scores(self, rollouts: Sequence[Rollout]) -> Scores:
        scores, failures = torch.full((len(rollouts),), math.nan, dtype=torch.float64), {}
        for row, rollout in enumerate(rollouts):
            try:
                scores[row] = float(rollout.text)
            except ValueError:
                failures[row] = f"{rollout.text!r} is not a number"
        return Scores(scores, failures)


class HalfBlind:
    """Scores everything 1 except "blind", which it cannot score."""

    def open(self, device: torch.device) -> None: ...

    def scores(self, rollouts: Sequence[Rollout]) -> Scores:
        return Scores(torch.tensor([math.nan if rollout.text == "blind" else 1.0 for rollout in rollouts]))


def test_a_score_beyond_fp32_is_a_failure():
    config = RlSettings(steps=1, prompts_per_step=2, global_batch_size=2, max_response_tokens=1, lr=1e-3)
    scores, failures = total_scores(config, [AsFloat(), NumberScorer("#")], rollouts("0.5", "1e300"))
    assert scores.tolist() == [0.5, config.missing_end_score]
    assert failures == ["AsFloat scored '1e300' inf"]


def test_a_rollout_that_one_of_two_scorers_cannot_score_gets_missing_end_score_and_counts_once():
    # The other scorer's 1 does not count then, in either order. On the third rollout both fail.
    config = RlSettings(steps=1, prompts_per_step=3, global_batch_size=3, max_response_tokens=1, lr=1e-3, missing_end_score=-2.0)
    for scorers in ([AsFloat(), HalfBlind()], [HalfBlind(), AsFloat()]):
        scores, failures = total_scores(config, scorers, rollouts("0.5", "x", "blind"))
        assert scores.tolist() == [1.5, -2.0, -2.0]
        assert len(failures) == 2
    assert failures[0] == "HalfBlind scored 'blind' nan"
    assert failures[1] == "'x' is not a number"


def test_a_failure_with_a_lone_surrogate_in_its_text_is_reported(make_rank):
    config = RlSettings(steps=1, prompts_per_step=2, global_batch_size=2, max_response_tokens=1, lr=1e-3, max_failed_share=0)
    with pytest.raises(ValueError, match=r"step 3: 1 of 2 responses .* The first failure: score\(\) on 'a\\ud800'\. Fix the scorer"):
        count_failures(make_rank(), config, ["score() on 'a\ud800'"], step=2)
