"""view.py: what a journal's events add up to."""

from __future__ import annotations

from cluster.events import Point
from pipelines.observe.view import RunView, StageView, seconds_left, share_done
from pipelines.store.events import RunEnded, RunStarted, StagePoints, StageProgress, StageStarted


def test_the_time_left_follows_from_the_pace_of_steps_without_the_gangs_start() -> None:
    stage = StageView("pretrain", steps=100, started_ms=0, curves={"train/loss": [Point(10, 1.0, 50_000), Point(20, 1.0, 60_000)]})
    assert seconds_left(stage, now_ms=60_000) == 80.0  # one second a step, 80 to go


def test_after_a_resume_points_of_the_earlier_attempt_do_not_count_for_the_time_left() -> None:
    day_ms = 86_400_000
    restored = [Point(10, 1.0, 1_000), Point(20, 1.0, 11_000)]
    stage = StageView("pretrain", steps=100, started_ms=day_ms, curves={"train/loss": [*restored]})
    assert seconds_left(stage, now_ms=day_ms + 5_000) is None
    stage.curves["train/loss"] += [Point(30, 1.0, day_ms + 10_000)]
    assert seconds_left(stage, now_ms=day_ms + 10_000) is None  # one point gives no pace
    stage.curves["train/loss"] += [Point(40, 1.0, day_ms + 20_000)]
    assert seconds_left(stage, now_ms=day_ms + 20_000) == 60.0  # one second a step, 60 to go


def test_a_machine_whose_clock_is_ahead_does_not_lengthen_the_time_left() -> None:
    stage = StageView("pretrain", steps=100, started_ms=0, curves={"train/loss": [Point(10, 1.0, 50_000), Point(20, 1.0, 60_000)]})
    assert seconds_left(stage, now_ms=30_000) == 80.0  # the newest point is 30 s in the future


def test_a_run_that_ended_before_it_started_by_another_machines_clock_has_no_duration() -> None:
    view = RunView("r1")
    view.add(RunStarted(time_ms=7_200_000, pipeline="line"))
    assert view.seconds() is None
    view.add(RunEnded(time_ms=0, status="KILLED"))
    assert view.seconds() is None
    view.add(RunEnded(time_ms=7_202_500, status="KILLED"))
    assert view.seconds() == 2.5


def test_the_time_left_of_a_stage_that_does_one_thing_after_the_other_is_that_of_what_it_does_now() -> None:
    view = RunView("r1")
    view.add(StageStarted(time_ms=0, stage="evaluate", decision="run"))
    view.add(StageProgress(time_ms=10_000, stage="evaluate", done=25, total=100, unit="tokens scored"))
    assert seconds_left(view.stage("evaluate"), now_ms=10_000) == 30.0
    view.add(StageProgress(time_ms=40_000, stage="evaluate", done=100, total=100, unit="tokens scored"))
    assert seconds_left(view.stage("evaluate"), now_ms=40_000) is None
    view.add(StageProgress(time_ms=41_000, stage="evaluate", done=1, total=5, unit="documents compressed"))
    assert seconds_left(view.stage("evaluate"), now_ms=41_000) == 4.0  # one second each, however long scoring took
    view.add(StageProgress(time_ms=45_000, stage="evaluate", done=5, total=5, unit="documents compressed"))
    view.add(StageProgress(time_ms=47_000, stage="evaluate", done=1, total=5, unit="documents compressed"))
    assert seconds_left(view.stage("evaluate"), now_ms=47_000) == 8.0  # once more


def test_encoding_before_the_first_step_is_shown_until_then_and_is_no_share_of_the_training() -> None:
    view = RunView("r1")
    view.add(StageStarted(time_ms=0, stage="sft", decision="run", steps=100))
    view.add(StageProgress(time_ms=1_000, stage="sft", done=52_000, total=52_000, unit="conversations encoded"))
    stage = view.stage("sft")
    assert (stage.done, stage.unit, share_done(stage)) == (52_000, "conversations encoded", None)
    view.add(StagePoints(time_ms=2_000, stage="sft", curves={"train/loss": [Point(10, 1.0, 2_000)]}))
    assert (stage.total, share_done(stage)) == (None, 0.1)
