"""The learning rate as a function of the step, and the end of a training that it was too high for."""

from __future__ import annotations

import math

from gpt.settings import TrainSettings


def lr_at(step: int, settings: TrainSettings) -> float:
    """Of step 0 .. steps - 1: a straight line up to `lr`, reached after `warmup_steps`, then down to the last step's share of it."""
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


def check_grad_norm(grad_norm: float, step: int, settings: TrainSettings) -> None:
    """ValueError when training has diverged; call it after each `engine.step`, before a checkpoint of that step (1 .. steps) is saved.

    The norm is that of all ranks' gradients, so all ranks end at the same step. fp16 is passed over: it finds its loss scale by steps
    whose gradients overflow, and takes none of them.
    """
    if settings.precision != "fp16" and not math.isfinite(grad_norm):
        raise ValueError(
            f"the gradient norm of step {step} is {grad_norm}, so the training has diverged and can't go on. Take a lower lr (it is "
            f"{settings.lr:g}), more warmup_steps ({settings.warmup_steps}) or a lower max_grad_norm ({settings.max_grad_norm:g}), and "
            f"look for odd data; the newest checkpoint is from before this step, and stays"
        )
