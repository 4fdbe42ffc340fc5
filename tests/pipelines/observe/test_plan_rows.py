"""plan_rows.py writes what `gptline plan` prints."""

from __future__ import annotations

from pipelines.observe.plan_rows import plan_lines
from pipelines.plan.planner import Decision


def test_a_plan_has_a_row_for_each_stage_and_a_line_that_sums_them_up() -> None:
    reused = Decision("documents", "reuse", "nothing changed", expected_s=0.0)
    changed = Decision("pretrain", "run", "lr: 0.1 -> 0.2", expected_s=90.0, notes=("made with 2 ranks, you ask for 8",))
    assert plan_lines([reused, changed, Decision("evaluate", "run", "its input pretrain runs", expected_s=5.0)]) == [
        "documents  reuse  nothing changed",
        "pretrain   run    lr: 0.1 -> 0.2",
        "                  made with 2 ranks, you ask for 8",
        "evaluate   run    its input pretrain runs",
        "",
        "2 of 3 stages to run, about 1:35",
    ]
    assert plan_lines([reused], "small: a test")[-2:] == ["", "nothing to run: every stage is reused"]
    assert plan_lines([reused, Decision("pretrain", "run", "new")], "small: a test")[-2] == "small: a test"
    assert plan_lines([reused, Decision("pretrain", "run", "new", expected_s=60)], "small: a test")[-2] == ""
    assert plan_lines([reused, Decision("pretrain", "run", "new")])[-1] == "1 of 2 stages to run, duration unknown"
    blocked = Decision("rl", "blocked", "reward_model's gate is closed")
    assert plan_lines([reused, Decision("pretrain", "run", "new", expected_s=60), blocked])[-1] == (
        "1 of 3 stages to run, about 1:00; 1 blocked"
    )
    unknown = [Decision("pretrain", "run", "new", expected_s=60), Decision("sft", "run", "new")]
    assert plan_lines(unknown)[-1] == "2 of 2 stages to run, about 1:00 plus 1 of unknown duration"
