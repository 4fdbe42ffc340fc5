"""The learning rate as a function of the step."""

from __future__ import annotations

import math

from gpt.settings import TrainSettings


def lr_at(step: int, settings: TrainSettings) -> float:
    """The learning rate of step 0 .. steps - 1: linear up to `lr` over `warmup_steps`, then down to the last step's share of it."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / (settings.warmup_steps + 1)
    decay_steps = settings.steps - 1 - settings.warmup_steps
    progress = (step - settings.warmup_steps) / decay_steps if decay_steps else 0.0
    match settings.lr_schedule:
        case "constant":
            remaining = 1.0
        case "linear":
            remaining = 1.0 - progress
        case "cosine":
            remaining = (1.0 + math.cos(math.pi * progress)) / 2
    return settings.lr * (settings.final_lr_share + (1.0 - settings.final_lr_share) * remaining)
