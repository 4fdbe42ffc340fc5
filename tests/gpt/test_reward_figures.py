"""A reward model's items, its score scale and its figures, without training."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from gpt.reward import Pair, Rating, conversations, held_out_figures, read_items, score_scale
from gpt.tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()


def pair(prompt: str, chosen: str, rejected: str, **fields: Any) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": prompt}], "chosen": chosen, "rejected": rejected, "source": "test", **fields}


def test_the_score_scale_is_mean_and_biased_deviation_and_equal_or_non_finite_scores_are_refused():
    assert score_scale(torch.tensor([1.0, 3.0], dtype=torch.float64)) == (2.0, 1.0)
    for scores, fault in (
        ([100.0, 100.00001], "equal: over 2 training"),
        ([math.nan, 1.0], "not finite: over 2 training"),
        ([math.inf, 1.0], "not finite"),
    ):
        with pytest.raises(ValueError, match=f"the scores are {fault}"):
            score_scale(torch.tensor(scores, dtype=torch.float64))


def test_pair_accuracy_counts_a_tie_as_half_and_each_pair_kind_separately():
    kinds = ("helpful", "helpful", "harmless", None)
    items = [Pair([1], [2], kind) for kind in kinds]
    scores = torch.tensor([3.0, 0.0, 1.0, 1.0, 2.0, 5.0, 1.0, 0.0])  # 3 > 2, 0 < 5, 1 = 1, 1 > 0
    assert held_out_figures(items, scores) == {
        "eval/pair_accuracy": 2.5 / 4,
        "eval/pair_accuracy_helpful": 0.5,
        "eval/pair_accuracy_harmless": 0.5,
    }


def test_a_pair_kind_is_spelled_as_part_of_a_metric_name():
    kinds = ["Helpful & honest", "安全", 3, None]
    items, _ = read_items(TOKENIZER, [pair("q", "a", "b", kind=kind) for kind in kinds], [], 16)
    assert [item.kind for item in items] == ["helpful_honest", "other", "3", None]


def test_rating_auc_counts_the_pairs_in_which_a_good_response_scores_above_a_bad_one():
    items = [Rating([1], each) for each in (1.0, 0.5, 0.4, 0.0)]
    scores = torch.tensor([3.0, 1.0, 2.0, 1.0])  # 3 > 2, 3 > 1, 1 < 2, 1 = 1: 2.5 of 4
    assert held_out_figures(items, scores) == {"eval/rating_auc": 2.5 / 4}
    assert held_out_figures(items[:2], scores[:2]) == {}  # nothing bad to compare with


def test_the_rows_of_a_batch_are_all_chosen_then_all_rejected_then_all_rated():
    items = [Pair([1], [2]), Rating([9], 0.5), Pair([3], [4])]
    assert conversations(items) == [[1], [3], [2], [4], [9]]
