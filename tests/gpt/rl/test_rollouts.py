"""Rollouts, as one step of training sees them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small import END, TOKENIZER, Always, ShareOfA, one_update, settings

from gpt.chat import encode_prompt
from gpt.model import GPT
from gpt.rl.loop import train
from gpt.sampling import sample


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("at_once", [1, 3])
def test_the_number_of_responses_sampled_at_once_changes_none_of_them(at_once, make_rank, policy, prompts, monkeypatch, tmp_path):
    def responses(name: str) -> list[list[int]]:
        scorer = ShareOfA()
        train(make_rank(name), one_update(), policy, [prompts], [scorer], 1, tmp_path / name)
        return [rollout.response_ids for rollout in scorer.seen]

    whole = responses("whole")
    sizes: list[int] = []

    def recording(model: GPT, prompts: Sequence[Sequence[int]], **limits: Any) -> Any:
        sizes.append(len(prompts))
        return sample(model, prompts, **limits)

    monkeypatch.setattr("gpt.rl.rollouts.sample", recording)
    monkeypatch.setattr("gpt.rl.rollouts.SAMPLED_AT_ONCE", at_once)
    assert responses("slices") == whole
    assert sizes == {1: [1] * 8, 3: [3, 3, 2]}[at_once]


def test_a_scorer_gets_only_finished_responses_with_their_prompts_record(make_rank, policy, prompts, tmp_path):
    scorer = ShareOfA()
    rank = make_rank()
    config = one_update(max_response_tokens=4)
    train(rank, config, policy, [prompts], [scorer], 1, tmp_path / "model")
    truncated = rank.curve("rollout/truncated_share")[1]
    assert 0 < truncated == 1 - len(scorer.seen) / 8
    for rollout in scorer.seen:
        assert rollout.response_ids == [*rollout.text.encode(), END]
        assert rollout.prompt_ids == encode_prompt(TOKENIZER, rollout.record["prompt"])
    shares = [rollout.text.count("a") / max(1, len(rollout.text)) for rollout in scorer.seen]
    assert rank.curve("reward/score_mean")[1] == pytest.approx((sum(shares) - 8 * truncated) / 8)  # -1 for each one that was cut off


def test_scores_of_several_scorers_are_added(make_rank, policy, prompts, tmp_path):
    rank = make_rank()
    train(rank, one_update(missing_end_score=0.75), policy, [prompts], [Always(0.5), Always(0.25)], 1, tmp_path / "model")
    assert rank.curve("reward/score_mean")[1] == 0.75
    assert rank.curve("reward/score_std")[1] == 0.0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("max_response_tokens", [1, 8])
def test_equal_scores_are_reported_and_change_no_weight(max_response_tokens, precision, make_rank, policy, prompts, tmp_path):
    config = one_update(algorithm="reinforce", max_response_tokens=max_response_tokens, missing_end_score=0.3, precision=precision)
    rank = make_rank()
    train(rank, config, policy, [prompts], [Always(0.3)], 1, tmp_path / "model")
    [warning] = rank.warnings
    expected = {
        1: "all 8 responses of step 1 were cut off at max_response_tokens = 1, ",
        8: "all 8 responses of step 1 got the same score, 0.3, so there is nothing to learn from them. ",
    }
    assert warning.startswith(expected[max_response_tokens])
    for name, tensor in weights(policy).items():
        assert torch.equal(weights(tmp_path / "model")[name], tensor), name


def test_steps_with_only_truncated_responses_are_reported_once_and_the_run_continues(make_rank, policy, prompts, tmp_path):
    rank, scorer = make_rank(), ShareOfA()
    config = settings(max_response_tokens=1, missing_end_score=-2.0)
    trained = train(rank, config, policy, [prompts], [scorer], 1, tmp_path / "model")
    assert len(rank.warnings) == 1
    assert rank.curve("rollout/truncated_share") == {1: 1.0, 2: 1.0}
    assert rank.curve("reward/score_mean") == {1: -2.0, 2: -2.0}
    assert rank.curve("rollout/response_tokens") == {1: 1.0, 2: 1.0}
    assert trained.figures["rollout/truncated_share"] == 1.0
    assert scorer.seen == []


def test_a_score_of_nan_is_a_failure_and_gets_missing_end_score(make_rank, policy, prompts, tmp_path):
    rank = make_rank()
    config = one_update(missing_end_score=-3.0, max_failed_share=1.0)
    train(rank, config, policy, [prompts], [Always(float("nan"))], 1, tmp_path / "model")
    assert rank.curve("reward/score_mean") == {1: -3.0}
    assert rank.curve("rollout/failed_share")[1] == 1 - rank.curve("rollout/truncated_share")[1] > 0


def test_a_response_that_several_scorers_fail_on_counts_as_one_failure(make_rank, policy, prompts, tmp_path):
    # Both fail on every response, yet no more failures are counted than there are responses.
    rank = make_rank()
    config = one_update(missing_end_score=-3.0, max_failed_share=1.0)
    train(rank, config, policy, [prompts], [Always(float("nan")), Always(float("nan"))], 1, tmp_path / "model")
    assert rank.curve("reward/score_mean") == {1: -3.0}
    assert rank.curve("rollout/failed_share")[1] == 1 - rank.curve("rollout/truncated_share")[1] > 0


def test_more_failures_than_the_allowed_share_fail_the_step_with_the_first_reason(make_rank, policy, prompts, tmp_path):
    scorers = [Always(0.0, "score() raised ZeroDivisionError", "another")]
    rank = make_rank()
    train(rank, one_update(max_failed_share=0.25), policy, [prompts], scorers, 1, tmp_path / "model")
    assert rank.curve("rollout/failed_share") == {1: 0.25}
    with pytest.raises(ValueError, match=r"step 1: 2 of 8 responses .* = 0\.2\. The first failure: score\(\) raised ZeroDivisionError\."):
        train(make_rank("strict"), one_update(max_failed_share=0.2), policy, [prompts], scorers, 1, tmp_path / "strict")


def test_a_reward_model_with_non_finite_scores_fails_with_the_response_and_score(make_rank, policy, prompts, reward_model, tmp_path):
    broken = replace(reward_model, mean=float("inf"))
    with pytest.raises(ValueError, match=r"RewardModelScorer scored '.*' -inf"):
        train(make_rank(), settings(algorithm="reinforce", global_batch_size=8), policy, [prompts], [broken], 1, tmp_path / "model")


def test_prompts_that_leave_no_room_for_a_response_are_left_out_and_counted(make_rank, policy, make_prompts, tmp_path):
    # Of seq_len 32, the prompt's three special tokens and 24 response tokens leave 5.
    folder = make_prompts("x" * 5, "x" * 6, "y", "y" * 100)
    scorer = ShareOfA()
    rank = make_rank()
    trained = train(rank, one_update(max_response_tokens=24), policy, [folder], [scorer], 1, tmp_path / "model")
    assert trained.metadata["prompts"] == {"train": 2, "too_long": 2}
    assert rank.warnings[0].startswith("2 of 4 prompts are left out: they leave no room for max_response_tokens = ")
    assert {len(rollout.prompt_ids) for rollout in scorer.seen} == {8, 4}
    assert rank.shown == [(done, 4, "prompts encoded") for done in (1, 2, 3, 4)]


def test_prompts_of_which_none_fits_are_refused(make_rank, policy, make_prompts, tmp_path):
    with pytest.raises(ValueError, match=r"none of 1 leaves room for max_response_tokens = 8 within the models' seq_len = 32"):
        train(make_rank(), settings(), policy, [make_prompts("x" * 22)], [ShareOfA()], 1, tmp_path / "model")
