from __future__ import annotations

import math

import pytest
import torch

from gpt.losses import (
    chosen_logprobs,
    lm_loss,
    mean_entropy,
    ppo_policy_loss,
    reinforce_loss,
    reward_centering_loss,
    reward_pair_loss,
    reward_rating_loss,
    value_loss,
)


def test_an_even_guess_among_four_costs_ln_4_per_token():
    everything = torch.ones(2, 3, dtype=torch.bool)
    loss = lm_loss(torch.zeros(2, 3, 4), torch.ones(2, 3, dtype=torch.int64), everything, global_count=6)
    assert loss.item() == pytest.approx(math.log(4))


def test_only_tokens_that_count_are_summed():
    logits = torch.tensor([[[0.0, math.log(3)], [9.0, 0.0], [0.0, 0.0]]])
    loss_mask = torch.tensor([[True, False, True]])
    loss = lm_loss(logits, torch.tensor([[0, 1, 1]]), loss_mask, global_count=2)
    assert loss.item() == pytest.approx((math.log(4) + math.log(2)) / 2)  # shares of 1/4 and 1/2


def test_parts_of_a_batch_add_up_to_its_loss_and_its_gradient():
    logits = torch.randn(4, 5, 7, generator=torch.Generator().manual_seed(1)).requires_grad_()
    targets = torch.randint(7, (4, 5), generator=torch.Generator().manual_seed(2))
    loss_mask = torch.rand(4, 5, generator=torch.Generator().manual_seed(3)) < 0.6  # rows with unequal counts
    count = int(loss_mask.sum())
    whole = lm_loss(logits, targets, loss_mask, global_count=count)
    [gradient] = torch.autograd.grad(whole, logits)
    for size in (1, 2):
        parts = sum(
            lm_loss(logits[i : i + size], targets[i : i + size], loss_mask[i : i + size], global_count=count) for i in range(0, 4, size)
        )
        torch.testing.assert_close(parts, whole)
        torch.testing.assert_close(torch.autograd.grad(parts, logits)[0], gradient)


def test_bf16_logits_are_summed_in_fp32():
    logits = torch.zeros(1, 1, 50000, dtype=torch.bfloat16)
    loss = lm_loss(logits, torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.bool), global_count=1)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(math.log(50000), rel=1e-6)


NAN = float("nan")
EVERYTHING = torch.ones(1, 2, dtype=torch.bool)


def test_a_good_token_earns_nothing_beyond_the_clip_and_a_bad_one_is_penalised_without_limit():
    # Twice as likely as when drawn, a good token earns 1.2 rather than 2 and a bad one costs 2. Half as likely, the bad one earns 0.8.
    logprobs = torch.tensor([[2.0, 2.0, 0.5]]).log().requires_grad_()
    advantages = torch.tensor([[1.0, -1.0, -1.0]])
    loss = ppo_policy_loss(logprobs, torch.zeros(1, 3), advantages, clip_eps=0.2, keep=torch.ones(1, 3, dtype=torch.bool), global_count=1)
    assert loss.item() == pytest.approx(-1.2 + 2.0 + 0.8)
    [gradient] = torch.autograd.grad(loss, logprobs)
    assert gradient[0].tolist() == pytest.approx([0.0, 2.0, 0.0])


def test_a_ratio_is_clamped_at_e_to_the_20():
    # The good token earns 1.2, the bad one costs e^20.
    far = torch.tensor([[100.0, 100.0]])
    loss = ppo_policy_loss(far, torch.zeros(1, 2), torch.tensor([[1.0, -1.0]]), clip_eps=0.2, keep=EVERYTHING, global_count=1)
    assert loss.item() == pytest.approx(math.exp(20) - 1.2)


def test_before_the_first_update_ppo_and_reinforce_have_the_same_gradient():
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()
    drawn = torch.randint(5, (2, 3), generator=torch.Generator().manual_seed(2))
    advantages = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]])
    keep = torch.tensor([[True, True, False], [False, True, True]])
    logprobs = chosen_logprobs(logits, drawn, 0.7)
    ppo = ppo_policy_loss(logprobs, logprobs.detach(), advantages, clip_eps=0.2, keep=keep, global_count=4)
    reinforce = reinforce_loss(logprobs, advantages, keep=keep, global_count=4)
    [ppo_gradient] = torch.autograd.grad(ppo, logits, retain_graph=True)
    torch.testing.assert_close(ppo_gradient, torch.autograd.grad(reinforce, logits)[0])


def test_reinforce_by_hand():
    # -(-1 * 2 + -3 * -1) / 2 = -0.5
    logprobs, advantages = torch.tensor([[-1.0, -3.0]]), torch.tensor([[2.0, -1.0]])
    assert reinforce_loss(logprobs, advantages, keep=EVERYTHING, global_count=2).item() == -0.5


def test_a_value_beyond_the_clip_pays_the_larger_error():
    # At 0.5 the clipped value 0.2 is farther from 1: 0.8^2 / 2, without a gradient. At -0.5 the loss is 1.5^2 / 2, with a gradient.
    values = torch.tensor([[0.5, -0.5]]).requires_grad_()
    loss = value_loss(values, torch.zeros(1, 2), torch.ones(1, 2), value_clip_eps=0.2, keep=EVERYTHING, global_count=1)
    assert loss.item() == pytest.approx(0.32 + 1.125)
    assert torch.autograd.grad(loss, values)[0][0].tolist() == pytest.approx([0.0, -1.5])


def test_a_value_within_the_clip_pays_half_its_squared_error():
    values = torch.tensor([[0.1, 0.1]]).requires_grad_()
    loss = value_loss(values, torch.zeros(1, 2), torch.ones(1, 2), value_clip_eps=0.2, keep=EVERYTHING, global_count=2)
    assert loss.item() == pytest.approx(0.405)
    assert torch.autograd.grad(loss, values)[0][0].tolist() == pytest.approx([-0.45, -0.45])


def test_logprobs_use_the_sampling_temperature_and_do_not_change_the_logits():
    # Logits ln 1 and ln 4: at temperature 2 the shares are 1 : 2.
    logits = torch.tensor([[[0.0, math.log(4)]]])
    before = logits.clone()
    assert chosen_logprobs(logits, torch.tensor([[1]]), 2.0).item() == pytest.approx(math.log(2 / 3))
    assert torch.equal(logits, before)
    in_bf16 = chosen_logprobs(torch.zeros(1, 1, 50000, dtype=torch.bfloat16), torch.tensor([[7]]), 1.0)
    assert in_bf16.dtype == torch.float32
    assert in_bf16.item() == pytest.approx(-math.log(50000), rel=1e-6)


def test_the_entropy_of_four_equal_tokens_is_ln_4_and_of_a_certain_one_0():
    logits = torch.tensor([[[0.0, 0.0, 0.0, 0.0], [99.0, 0.0, 0.0, 0.0], [0.0, 99.0, 0.0, 0.0]]])
    keep = torch.tensor([[True, True, False]])
    assert mean_entropy(logits, 1.0, keep=keep, global_count=2).item() == pytest.approx(math.log(4) / 2)


def test_a_higher_temperature_means_more_entropy():
    logits = torch.tensor([[[0.0, math.log(4)]]])  # at temperature 2: 1/3 and 2/3
    entropy = mean_entropy(logits, 2.0, keep=torch.ones(1, 1, dtype=torch.bool), global_count=1)
    assert entropy.item() == pytest.approx(math.log(3) - 2 / 3 * math.log(2))


def test_parts_of_a_batch_add_up_to_every_rl_loss_and_masked_values_may_be_nan():
    draw = torch.Generator().manual_seed(1)
    keep = torch.rand(4, 5, generator=draw) < 0.6  # rows with unequal counts
    logits = torch.randn(4, 5, 7, generator=draw).masked_fill(~keep[..., None], NAN).requires_grad_()
    values = torch.randn(4, 5, generator=draw).masked_fill(~keep, NAN).requires_grad_()
    old_logprobs, advantages, old_values, returns = torch.randn(4, 4, 5, generator=draw).masked_fill(~keep, NAN).unbind()
    drawn = torch.zeros(4, 5, dtype=torch.int64)
    count = int(keep.sum())

    def loss(i: int, j: int) -> torch.Tensor:
        counts = dict(keep=keep[i:j], global_count=count)
        logprobs = chosen_logprobs(logits[i:j], drawn[i:j], 0.7)
        return (
            ppo_policy_loss(logprobs, old_logprobs[i:j], advantages[i:j], clip_eps=0.2, **counts)
            + reinforce_loss(logprobs, advantages[i:j], **counts)
            + value_loss(values[i:j], old_values[i:j], returns[i:j], value_clip_eps=0.2, **counts)
            - mean_entropy(logits[i:j], 0.7, **counts)
        )

    whole = loss(0, 4)
    gradients = torch.autograd.grad(whole, [logits, values])
    assert whole.isfinite()
    assert gradients[1].isfinite().all()
    assert gradients[0][keep].isfinite().all()
    for size in (1, 2):
        parts = sum(loss(i, i + size) for i in range(0, 4, size))
        torch.testing.assert_close(parts, whole)
        for part, gradient in zip(torch.autograd.grad(parts, [logits, values]), gradients, strict=True):
            torch.testing.assert_close(part, gradient, equal_nan=True)


def test_a_pair_of_equal_scores_costs_ln_2_and_a_better_chosen_response_costs_less():
    loss = reward_pair_loss(torch.tensor([0.7, math.log(3)]), torch.tensor([0.7, 0.0]), global_count=1)
    assert loss.item() == pytest.approx(math.log(2) - math.log(3 / 4))  # odds of 3 to 1 are a share of 3/4


def test_a_pair_loss_depends_only_on_the_difference():
    scores = torch.tensor([[0.5, -1.0], [0.25, 2.0]], requires_grad=True)  # sums with 3 are exact
    losses = [reward_pair_loss(*(scores + shift), global_count=2) for shift in (0.0, 3.0)]
    one, other = (torch.autograd.grad(loss, scores)[0] for loss in losses)
    assert torch.equal(one, other)
    assert torch.equal(one[0], -one[1])  # so moving both scores alike has no gradient


def test_a_pair_with_a_huge_wrong_difference_costs_that_difference_and_not_infinity():
    scores = torch.tensor([-1000.0], requires_grad=True)
    loss = reward_pair_loss(scores, torch.tensor([1000.0]), global_count=1)
    assert loss.item() == 2000.0
    assert torch.autograd.grad(loss, scores)[0].item() == -1.0


def test_a_rating_is_a_soft_target():
    # Odds of 3 to 1 are a share of 3/4.
    scores = torch.tensor([math.log(3)] * 3)
    loss = reward_rating_loss(scores, torch.tensor([1.0, 0.0, 0.5]), global_count=3)
    assert loss.item() == pytest.approx((-math.log(3 / 4) - math.log(1 / 4) - 0.5 * math.log(3 / 4) - 0.5 * math.log(1 / 4)) / 3)


def test_a_score_at_its_ratings_log_odds_has_no_gradient():
    scores = torch.tensor([math.log(3), 0.0], requires_grad=True)
    [gradient] = torch.autograd.grad(reward_rating_loss(scores, torch.tensor([0.75, 0.5]), global_count=2), scores)
    assert gradient.tolist() == pytest.approx([0.0, 0.0], abs=1e-7)


@pytest.mark.parametrize("loss", [reward_pair_loss, reward_rating_loss])
def test_parts_of_a_batch_of_scores_add_up_to_its_loss(loss):
    first, second = torch.rand(2, 5, generator=torch.Generator().manual_seed(1))
    whole = loss(first, second, global_count=5)
    parts = [loss(first[rows], second[rows], global_count=5) for rows in (slice(0, 2), slice(2, 2), slice(2, 5))]
    assert parts[1].item() == 0.0  # a part may be empty, since a micro-batch need not have both pairs and ratings
    torch.testing.assert_close(sum(parts), whole)


def test_centering_leaves_a_pair_of_opposite_scores_unchanged():
    chosen, rejected = torch.tensor([2.0, 2.0]), torch.tensor([-2.0, 1.0])
    assert reward_centering_loss(chosen, rejected, global_count=2).item() == pytest.approx((0.0 + 9.0) / 2)
