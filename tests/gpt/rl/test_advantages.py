from __future__ import annotations

import math

import pytest
import torch

from gpt.losses import reinforce_loss
from gpt.rl.advantages import gae, kl_k1, kl_k3, token_rewards, whiten

NAN = float("nan")


def mask(*rows: str) -> torch.Tensor:
    """`mask("..xx")`: x = the policy wrote it."""
    return torch.tensor([[place == "x" for place in row] for row in rows])


def gae_by_definition(r: list[float], v: list[float], gamma: float, lam: float) -> list[float]:
    v = [*v, 0.0]
    delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(len(r))]
    return [sum((gamma * lam) ** k * d for k, d in enumerate(delta[t:])) for t in range(len(r))]


def test_advantages_by_hand_up_to_the_end_of_a_response():
    # delta: the last is 1 - 0.5 = 0.5, since nothing follows it; before it 0 + 0.5 * 0.5 - 0.25 = 0; the first 0 + 0.5 * 0.25 - 1 = -0.875.
    # A: 0.5; 0 + 0.5 * 0.5 * 0.5 = 0.125; -0.875 + 0.25 * 0.125 = -0.84375.
    advantages = gae(torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[1.0, 0.25, 0.5]]), mask("xxx"), gamma=0.5, gae_lambda=0.5)
    assert advantages.tolist() == [[-0.84375, 0.125, 0.5]]


def test_gae_equals_its_definition():
    r, v = [0.1, -0.2, 0.0, 1.0], [0.2, 0.5, 0.9, -0.3]
    fast = gae(torch.tensor([r]), torch.tensor([v]), mask("xxxx"), gamma=0.9, gae_lambda=0.8)[0]
    assert fast.tolist() == pytest.approx(gae_by_definition(r, v, 0.9, 0.8))


def test_with_lambda_1_an_advantage_is_the_discounted_return_minus_the_value():
    # 1 + 0.5 * 2 + 0.25 * 4 = 3, minus the value 10, is -7.
    advantages = gae(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[10.0, 20.0, 30.0]]), mask("xxx"), gamma=0.5, gae_lambda=1.0)
    assert advantages.tolist() == [[-7.0, -16.0, -26.0]]


def test_tokens_that_the_policy_did_not_write_affect_no_advantage_wherever_they_are():
    r, v = [0.1, -0.2, 1.0], [0.2, 0.5, 0.9]
    plain = gae(torch.tensor([r]), torch.tensor([v]), mask("xxx"), gamma=0.9, gae_lambda=0.8)[0]
    for pattern in ("..xxx", "xxx..", "x.xx", "xx..x", ".x..x.x."):
        written = mask(pattern)
        rewards, values = torch.full(written.shape, NAN), torch.full(written.shape, NAN)
        rewards[written], values[written] = torch.tensor(r), torch.tensor(v)
        advantages = gae(rewards, values, written, gamma=0.9, gae_lambda=0.8)
        assert torch.equal(advantages[written], plain), pattern
        assert advantages[~written].abs().sum() == 0.0


def test_whitening_by_hand_with_the_biased_variance():
    # 1, 2, 3, 6: mean 3, variance (4 + 1 + 0 + 9) / 4 = 3.5. The unbiased one would be 14 / 3.
    values, keep = torch.tensor([[1.0, NAN, 2.0], [3.0, 6.0, 99.0]]), mask("x.x", "xx.")
    deviation = math.sqrt(3.5)
    white = whiten(values, keep)
    assert white[0].tolist() == pytest.approx([-2 / deviation, 0.0, -1 / deviation])
    assert white[1].tolist() == pytest.approx([0.0, 3 / deviation, 0.0])


@pytest.mark.parametrize("value", [0.0, 0.1, -3.3, 1e6])
def test_whitening_turns_equal_values_into_zeros(value):
    # In fp32 the mean of a thousand values of 0.1 is not 0.1, and the difference divided by its own deviation would be 1.
    assert whiten(torch.full((100, 10), value), torch.ones(100, 10, dtype=torch.bool)).abs().max() == 0.0


def test_values_that_differ_only_by_rounding_count_as_equal():
    value = torch.tensor(0.1)
    nearly = torch.stack([value, torch.nextafter(value, torch.tensor(1.0))])[None]
    assert whiten(nearly, mask("xx")).abs().max() == 0.0
    assert whiten(torch.tensor([[0.1, 0.1001]]), mask("xx"))[0].tolist() == pytest.approx([-1.0, 1.0], rel=1e-4)


def test_a_score_is_added_only_at_a_responses_last_token():
    rewards = token_rewards(torch.tensor([5.0, 7.0, 0.0]), torch.zeros(3, 4), None, mask(".xx.", "x...", ".x.x"), kl_coef=0.1)
    assert rewards.tolist() == [[0.0, 0.0, 5.0, 0.0], [7.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]


def test_each_token_is_charged_for_its_own_divergence():
    # k1 is -1 - -3 = 2 and -2 - -1 = -1. At 0.1 per nat that gives -0.2 and +0.1, and the score 1 is added to the last.
    logprobs, ref_logprobs = torch.tensor([[NAN, -1.0, -2.0]]), torch.tensor([[0.0, -3.0, -1.0]])
    rewards = token_rewards(torch.tensor([1.0]), logprobs, ref_logprobs, mask(".xx"), kl_coef=0.1)
    assert rewards[0].tolist() == pytest.approx([0.0, -0.2, 1.1])


def test_the_mean_of_both_estimators_is_the_divergence_and_k3_is_never_negative():
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.1, 0.2, 0.7])
    exact = 0.5 * math.log(5) + 0.25 * math.log(1.25) + 0.25 * math.log(0.25 / 0.7)
    for estimator in (kl_k1, kl_k3):
        assert (p * estimator(p.log(), q.log())).sum().item() == pytest.approx(exact)
    assert kl_k1(p.log(), q.log()).min() < 0
    assert kl_k3(p.log(), q.log()).min() > 0
    assert kl_k3(p.log(), p.log()).tolist() == [0.0, 0.0, 0.0]


def test_the_estimate_of_an_extremely_unlikely_token_is_finite():
    assert kl_k3(torch.tensor([-200.0]), torch.tensor([0.0])).item() == pytest.approx(math.exp(20) - 21)


def test_k1_in_the_reward_descends_the_exact_divergence():
    # Four draws that are exactly the distribution (1/2, 1/4, 1/4): their mean is the expectation.
    logits = torch.tensor([0.5, 0.25, 0.25]).log().requires_grad_()
    reference = torch.tensor([0.1, 0.2, 0.7]).log()
    logprobs = logits.log_softmax(-1)
    [exact] = torch.autograd.grad((logprobs.exp() * (logprobs - reference)).sum(), logits, retain_graph=True)
    drawn = torch.tensor([[0], [0], [1], [2]])
    keep = torch.ones(4, 1, dtype=torch.bool)
    rewards = token_rewards(torch.zeros(4), logprobs.detach()[drawn], reference[drawn], keep, kl_coef=0.3)
    advantages = gae(rewards, torch.zeros(4, 1), keep, gamma=1.0, gae_lambda=1.0)
    [estimated] = torch.autograd.grad(reinforce_loss(logprobs[drawn], advantages, keep=keep, global_count=4), logits)
    torch.testing.assert_close(estimated, 0.3 * exact)
