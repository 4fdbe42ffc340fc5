"""The losses, as maths on tensors: sums over the tokens that count, divided once by their global number."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def lm_loss(logits: Tensor, targets: Tensor, loss_mask: Tensor, *, global_count: int) -> Tensor:
    """Next-token cross-entropy in nats: logits (B, T, V), targets (B, T), loss_mask (B, T) True = counts -> ().

    `global_count` is the number of counting tokens in the whole optimizer step, so the parts of a batch add up to its loss.
    """
    token_loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view_as(targets)  # (B, T)
    return torch.where(loss_mask, token_loss, 0.0).sum() / global_count
