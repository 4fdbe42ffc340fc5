"""Progress adds up the journal's events: plain lines in a pipe, rows on a terminal, a table in the end."""

from __future__ import annotations

import io
import subprocess
import sys
from typing import Any

from cluster.events import Point
from pipelines.observe.plan_rows import plan_lines
from pipelines.observe.progress import Progress
from pipelines.observe.view import StageView, seconds_left
from pipelines.plan.planner import Decision
from pipelines.store.events import Announcement, Note, RunEnded, RunStarted, StageEnded, StagePlanned, StagePoints, StageStarted


def started(stage: str, **fields: Any) -> StageStarted:
    return StageStarted(**({"time_ms": 0, "stage": stage, "key": "k", "decision": "run", "reason": "lr: 0.1 -> 0.2"} | fields))


def ended(stage: str, **fields: Any) -> StageEnded:
    given = {"time_ms": 5000, "status": "done", "decision": "run", "key": "k", "number": 1, "output": "ab" * 32, "seconds": 2.5}
    return StageEnded(**({"stage": stage} | given | fields))


def points(stage: str, step: int, time_ms: int, **values: float) -> StagePoints:
    """One point of each curve; `train_loss` stands for train/loss."""
    return StagePoints(stage=stage, curves={name.replace("_", "/", 1): [Point(step, value, time_ms)] for name, value in values.items()})


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_a_pipe_gets_a_line_at_the_start_and_one_at_the_end_of_a_stage() -> None:
    out = io.StringIO()
    progress = Progress(out, clock=Clock())
    progress.show(StagePlanned(stage="documents", decision="run", reason="new"))
    progress.show(started("documents"))
    progress.show(ended("documents"))
    progress.show(ended("tokenizer", status="reused", decision="reuse", reason="nothing changed", seconds=0))
    progress.close()
    assert out.getvalue().splitlines() == [
        "documents   run: lr: 0.1 -> 0.2",
        "documents   made: 2.5 s  abababababab",
        "tokenizer   reuse: abababababab  nothing changed",
    ]


def test_a_stage_that_was_stopped_says_where_it_goes_on() -> None:
    out = io.StringIO()
    progress = Progress(out, clock=Clock())
    progress.show(started("pretrain", steps=100))
    progress.show(ended("pretrain", status="stopped", reason="saved at step 70", output=""))
    assert out.getvalue().splitlines()[-1] == "pretrain    stopped: saved at step 70"


def test_training_speaks_at_most_every_ten_seconds() -> None:
    out, clock = io.StringIO(), Clock()
    progress = Progress(out, clock=clock)
    progress.show(started("pretrain", steps=800))
    for step in range(1, 801):  # ten steps a second: 80 s, a tenth of it every 8 s
        clock.now_s = step / 10
        progress.show(points("pretrain", step, step * 100, train_loss=8.0 - step / 200, train_tokens_per_s=41_200.0))
    lines = out.getvalue().splitlines()
    assert len(lines) == 1 + 8
    assert lines[2] == "pretrain    step 200/800  loss 7.000  tokens/s 41,200  left 1:00"


def test_reinforcement_learning_tells_its_score_and_not_its_loss() -> None:
    out, clock = io.StringIO(), Clock()
    progress = Progress(out, clock=clock)
    progress.show(started("rl", steps=24))
    clock.now_s = 60
    values = {"train_loss": -0.0, "reward_score_mean": 0.54, "rollout_kl_k1_nats_per_response": 0.031, "rollout_tokens_per_s": 2190.0}
    progress.show(points("rl", 12, 60_000, **values))
    assert out.getvalue().splitlines()[-1] == "rl          step 12/24  score 0.540  KL 0.03  tokens/s 2,190"


def test_a_slow_stage_speaks_once_a_minute_even_before_a_tenth_is_done() -> None:
    out, clock = io.StringIO(), Clock()
    progress = Progress(out, clock=clock)
    progress.show(started("pretrain", steps=100_000))
    for step in range(1, 121):
        clock.now_s = float(step)
        progress.show(points("pretrain", step, step * 1000, train_loss=1.0))
    assert len(out.getvalue().splitlines()) == 1 + 2


def test_time_left_is_read_off_the_steps_and_not_off_the_gangs_start() -> None:
    stage = StageView("pretrain", steps=100, started_ms=0, curves={"train/loss": [Point(10, 1.0, 50_000), Point(20, 1.0, 60_000)]})
    assert seconds_left(stage, now_ms=60_000) == 80.0  # one second a step, 80 to go


def test_after_a_resume_the_points_of_the_earlier_attempt_say_nothing_about_the_time_left() -> None:
    day_ms = 86_400_000
    restored = [Point(10, 1.0, 1_000), Point(20, 1.0, 11_000)]
    stage = StageView("pretrain", steps=100, started_ms=day_ms, curves={"train/loss": [*restored]})
    assert seconds_left(stage, now_ms=day_ms + 5_000) is None
    stage.curves["train/loss"] += [Point(30, 1.0, day_ms + 10_000)]
    assert seconds_left(stage, now_ms=day_ms + 10_000) is None  # one point has no pace
    stage.curves["train/loss"] += [Point(40, 1.0, day_ms + 20_000)]
    assert seconds_left(stage, now_ms=day_ms + 20_000) == 60.0  # one second a step, 60 to go


def test_no_control_character_of_a_message_reaches_a_pipe_or_a_terminal() -> None:
    for live in (False, True):
        out = io.StringIO()
        progress = Progress(out, live=live)
        progress.show(Note(stage="pretrain", text="rank 1 \x1b[2J died\r\n"))
        progress.close()
        assert "rank 1  [2J died" in out.getvalue()
        assert "\x1b[2J" not in out.getvalue()


def test_a_sentence_for_people_is_a_line_of_its_own() -> None:
    out = io.StringIO()
    with Progress(out) as progress:
        progress.show(Announcement("MLflow not reachable"))
    assert out.getvalue() == "MLflow not reachable\n"


def test_a_terminal_has_a_row_for_each_stage() -> None:
    out = io.StringIO()
    progress = Progress(out, live=True, clock=Clock())
    progress.show(StagePlanned(stage="pretrain", decision="run", reason="new"))
    progress.show(started("evaluate"))
    progress.close()
    assert "pretrain  run  new" in out.getvalue()
    assert "evaluate  run  0:00" in out.getvalue()


def test_a_plan_is_a_line_for_each_stage_and_what_it_comes_to() -> None:
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


def test_the_last_words_of_a_run_are_said_when_the_progress_closes() -> None:
    out = io.StringIO()
    with Progress(out) as progress:
        progress.show(RunStarted(time_ms=0, pipeline="line"))
        progress.show(ended("documents"))
        progress.show(RunEnded(time_ms=2000, status="FAILED", text="pretrain failed"))
    assert out.getvalue().splitlines()[-2:] == ["1 made in 0:02", "pretrain failed"]


def test_rich_is_imported_only_for_a_terminal() -> None:
    code = "import io, sys; from pipelines.observe.progress import Progress; Progress(io.StringIO()); assert 'rich' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
