"""Events are written as JSON lines and read back."""

from __future__ import annotations

import math

import pytest

from cluster.events import Point
from pipelines.store.events import Note, RunEnded, RunStarted, StageEnded, StagePoints, StageProgress, StageStarted, from_json, to_json

EVENTS = [
    RunStarted(run="r1", pipeline="line", versions={"torch": "2.13.0"}, forecast_s=12.5, time_ms=1),
    StageStarted(stage="pretrain", key="1f0c", decision="run", reason="not built here before", steps=100, time_ms=2),
    StageProgress(stage="ingest", done=3, total=12, unit="files", time_ms=3),
    StagePoints(
        stage="pretrain",
        curves={"train/loss": [Point(10, 4.5, 100), Point(20, 4.25, 200)], "time/step_s": [Point(10, 0.5, 100)]},
        time_ms=4,
    ),
    Note(stage="pretrain", text="rank 1 was killed", time_ms=5),
    StageEnded(stage="pretrain", status="done", decision="run", key="1f0c", number=1, output="ab12", seconds=1.5, time_ms=6),
    RunEnded(status="FINISHED", exit_code=0, time_ms=7),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_an_event_comes_back_from_its_line_as_it_was(event):
    assert from_json(to_json(event)) == event


def test_points_are_written_as_metric_step_value_and_time():
    line = to_json(StagePoints(stage="sft", curves={"train/loss": [Point(1, 0.5, 9)]}, time_ms=9))
    assert line == '{"type": "points", "time_ms": 9, "stage": "sft", "points": [["train/loss", 1, 0.5, 9]]}'


def test_a_nan_loss_survives():
    event = from_json(to_json(StagePoints(stage="sft", curves={"train/loss": [Point(1, math.nan, 9)]})))
    assert isinstance(event, StagePoints)
    assert math.isnan(event.curves["train/loss"][0].value)


def test_a_field_of_another_version_is_skipped_and_a_missing_or_null_one_has_its_default():
    line = '{"type": "stage_ended", "time_ms": 6, "stage": "sft", "status": "failed", "error": null, "colour": "red"}'
    assert from_json(line) == StageEnded(stage="sft", status="failed", error="", time_ms=6)


@pytest.mark.parametrize(
    "line",
    [
        '{"type": "stage_paused", "time_ms": 1, "stage": "sft"}',
        '{"type": "note", "time_ms"',
        '{"type": "stage_ended"}',
        "[1]",
        "3",
        '{"type": []}',
    ],
)
def test_a_damaged_line_or_an_unknown_type_has_no_event(line: str):
    assert from_json(line) is None
