"""What all training loops share: how they start, how a step ends, and what they return.

There is no trainer class. Each loop is open in its own file (`pretrain`, `sft`, `reward`, `rl.loop`) and calls these functions by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gpt.batching import micro_batch_rows
from gpt.engine import Engine, Rank
from gpt.model import GPT, parameter_groups
from gpt.settings import TrainSettings


@dataclass(frozen=True)
class Trained:
    """The result of a finished loop: `Trained({"role": "policy", "steps": 40}, figures={"reward/score_mean": 0.8})`.

    A loop that was stopped before its last step returns None instead.
    """

    metadata: Mapping[str, Any]
    """What the model's manifest says about it. It is part of the artifact's digest, so it holds no clocks, paths or host names."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """Numbers for the action record, the tables and the gates."""


def new_engine(rank: Rank, name: str, model: GPT, config: TrainSettings) -> Engine:
    """Make the engine that trains this model, with weight decay on its matrices only."""
    model.activation_checkpointing = config.activation_checkpointing
    return rank.engine(name, model, parameter_groups(model, config.weight_decay), config)


def own_rows(rank: Rank, config: TrainSettings) -> list[range]:
    """The rows of each global batch that this rank computes, one range per micro-step."""
    accumulation_steps = config.gradient_accumulation_steps(rank.world_size)
    return micro_batch_rows(rank.rank, rank.world_size, config.global_batch_size, accumulation_steps)


def check_grad_norm(grad_norm: float, step: int, config: TrainSettings) -> None:
    """Raise ValueError if training has diverged. Call it after each `engine.step`, before a checkpoint of that step (1 .. steps) is saved.

    The norm covers the gradients of all ranks, so all ranks raise at the same step. fp16 is exempt: its loss scaler skips steps whose
    gradients overflow, which is how it finds its scale.
    """
    if config.precision != "fp16" and not math.isfinite(grad_norm):
        raise ValueError(
            f"the gradient norm of step {step} is {grad_norm}: training has diverged and cannot continue. Lower lr (now {config.lr:g}) or "
            f"max_grad_norm (now {config.max_grad_norm:g}), raise warmup_steps (now {config.warmup_steps}), and check the data for "
            "outliers; the newest checkpoint predates this step and is kept"
        )


def log_is_due(config: TrainSettings, finished: int) -> bool:
    """Whether metrics are logged after this many finished steps; those of the last step always are."""
    return finished % config.log_every == 0 or finished == config.steps


def save_or_stop(rank: Rank, config: TrainSettings, finished: int, *, save_last: bool = True) -> bool:
    """End a step: save a checkpoint if one is due, and return True if the loop was asked to stop before its last step.

    `save_last` says whether to save after the last step too, for a loop that still has an evaluation to run.
    """
    is_last = finished == config.steps
    stopping = not is_last and rank.should_stop()
    if stopping or (save_last if is_last else finished % config.checkpoint_every == 0):
        save_checkpoint(rank, config, finished)
    return stopping


def save_checkpoint(rank: Rank, config: TrainSettings, finished: int) -> None:
    with rank.section("checkpoint", config.step_deadline_s):
        rank.save(finished)
