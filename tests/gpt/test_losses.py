from __future__ import annotations

import math

import pytest
import torch

from gpt.losses import lm_loss


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
    loss_mask = torch.rand(4, 5, generator=torch.Generator().manual_seed(3)) < 0.6  # rows of unequal weight
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
