from __future__ import annotations

from gpt.rl.scorers import NumberScorer
from gpt.rl.scoring import Rollout


def rollouts(*texts: str, reference: str = "4") -> list[Rollout]:
    return [Rollout({"prompt": [], "reference": reference}, [1], [2], text) for text in texts]


def test_the_verifier_scores_1_for_the_right_number_and_0_otherwise():
    found = NumberScorer("####").scores(
        rollouts("#### 1,234", "#### 1234.0", "#### 1234.01", "#### -1234", "1234", "#### 1234 #### 5", reference="a\n#### 1234")
    )
    assert found.scores.tolist() == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert list(found.failures.values()) == []


def test_the_marker_is_matched_literally():
    found = NumberScorer(".*").scores(rollouts("#### 4", ".* 4"))
    assert found.scores.tolist() == [0.0, 1.0]
