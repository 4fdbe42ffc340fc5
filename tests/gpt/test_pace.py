from __future__ import annotations

from gpt.pace import Pace


def test_tokens_and_seconds_are_those_of_all_steps_since_the_last_log():
    pace = Pace()
    pace.add(tokens=10, seconds=1.0)
    pace.add(tokens=30, seconds=3.0)
    assert pace.metrics() == {"train/tokens_per_s": 10.0, "time/step_s": 2.0}  # 40 tokens in 4 seconds, 2 steps
    pace.add(tokens=7, seconds=0.5)
    assert pace.metrics() == {"train/tokens_per_s": 14.0, "time/step_s": 0.5}
