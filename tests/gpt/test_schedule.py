from __future__ import annotations

import pytest

from gpt.schedule import lr_at
from gpt.settings import TrainSettings


def rates(schedule: str, steps: int, warmup_steps: int) -> list[float]:
    settings = TrainSettings(steps=steps, global_batch_size=1, lr=1.0, lr_schedule=schedule, warmup_steps=warmup_steps, final_lr_share=0.2)
    return [lr_at(step, settings) for step in range(steps)]


def test_warmup_is_linear_and_linear_decay_ends_at_its_share():
    assert rates("linear", 8, 3) == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.8, 0.6, 0.4, 0.2])


def test_cosine_decay_is_halfway_down_in_the_middle():
    # From 1 to 0.2 over four steps: 0.6 + 0.4 cos of 0, 45, 90, 135 and 180 degrees.
    assert rates("cosine", 5, 0) == pytest.approx([1.0, 0.6 + 0.4 * 0.5**0.5, 0.6, 0.6 - 0.4 * 0.5**0.5, 0.2])


def test_a_constant_schedule_stays_at_lr_after_warmup():
    assert rates("constant", 4, 1) == [0.5, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_a_single_step_and_a_schedule_of_only_warmup_work(schedule):
    assert rates(schedule, 1, 0) == [1.0]
    assert rates(schedule, 3, 2) == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert rates(schedule, 3, 3) == [0.25, 0.5, 0.75]
