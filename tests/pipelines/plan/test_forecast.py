"""How long a stage is expected to take, from made-up executions whose numbers can be checked by hand."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.checkpoint import Checkpoint
from cluster.events import Curves, Point
from pipelines.observe.plan_rows import work_to_do
from pipelines.plan import planner as planner_module
from pipelines.plan.config import load
from pipelines.plan.environment import ROOT
from pipelines.plan.graph import build
from pipelines.plan.planner import Decision, Planner
from pipelines.store.action import Action
from pipelines.store.store import Store

KINDS = """
from gpt.settings import TrainSettings
from pipelines.artifacts import Report
from pipelines.stage import StageConfig, StageContext


class TrainConfig(StageConfig, TrainSettings):
    width: int = 8


class ReadConfig(StageConfig):
    words: int = 10


def read(config: ReadConfig, stage: StageContext) -> Report:
    return stage.publish(Report)


def train(config: TrainConfig, report: Report, stage: StageContext) -> Report:
    return stage.publish(Report)
"""
TOML = """
pipeline = "line"

[stages.read]
uses = "./kinds.py:read"

[stages.train]
uses = "./kinds.py:train"
inputs = { report = "read" }
steps = 1200
global_batch_size = 1
lr = 0.1
"""


class Line:
    """A stage that reads and one that trains for 1,200 steps."""

    def __init__(self, folder: Path, store: Store) -> None:
        self.folder, self.store = folder, store
        (folder / "kinds.py").write_text(KINDS)
        (folder / "line.toml").write_text(TOML)
        draft = store.new_folder()
        (draft / "report.json").write_text("{}")
        self.output = store.publish(draft, "report", {}).digest

    def plan(self, *overrides: str, **options: Any) -> dict[str, Decision]:
        sys.modules.pop("gptline_user_kinds", None)
        graph = build(load(self.folder / "line.toml", overrides))
        return {each.stage: each for each in Planner(graph, self.store, ROOT, **options).plan()}

    def took(self, seconds: float, *overrides: str, stage: str = "train", **fields: Any) -> None:
        """Record that a stage was executed with these settings; `read` must have been executed."""
        decision = self.plan(*overrides)[stage]
        assert decision.key is not None
        made: dict[str, Any] = dict(run="r", output=self.output, output_kind="report", host="h", user="u", pid=3, started_ms=1) | fields
        made |= dict(pipeline="line", stage=stage, kind=f"./kinds.py:{stage}", leaves=decision.leaves, inputs=decision.inputs)
        action = Action(key=decision.key, seconds=seconds, **made)
        self.store.note_latest("line", stage, self.store.record(action))

    def expected_s(self, *overrides: str, **options: Any) -> float | None:
        return self.plan(*overrides, **options)["train"].expected_s


def pace(*points: tuple[int, float, int]) -> Curves:
    """Step, seconds per step, and seconds since the stage's start."""
    return {"time/step_s": [Point(step, value, 1000 * time_s) for step, value, time_s in points]}


@pytest.fixture
def line(tmp_path: Path, store: Store) -> Line:
    line = Line(tmp_path, store)
    line.took(2.0, stage="read")
    return line


def test_a_trial_of_five_steps_does_not_multiply_the_start_of_its_gang(line: Line):
    line.took(16.0, "stages.train.steps=5", curves=pace((5, 0.2, 16)))
    assert line.expected_s() == pytest.approx(15 + 1200 * 0.2)  # 16 s are 15 s of start and 5 steps of 0.2 s


def test_evaluations_and_checkpoints_between_steps_count_as_part_of_the_steps(line: Line):
    line.took(40.0, "stages.train.steps=60", curves=pace((10, 0.2, 14), (60, 0.2, 39)))
    assert line.expected_s() == pytest.approx(10 + 1200 * 0.5)  # 50 steps in 25 s, though each takes 0.2 s by itself


def test_the_nearest_execution_counts_and_not_the_newest(line: Line):
    line.took(47.0, "stages.train.lr=0.2", started_ms=1, curves=pace((10, 0.03, 11), (1200, 0.03, 46)))
    line.took(16.0, "stages.train.lr=0.2", "stages.train.steps=5", started_ms=2, curves=pace((5, 3.0, 16)))
    line.took(900.0, "stages.train.lr=0.2", "stages.train.width=64", started_ms=3)
    assert line.expected_s() == pytest.approx(47.0)


def test_the_same_work_is_expected_to_take_as_long_as_it_took(line: Line):
    line.took(47.0, started_ms=1)
    line.took(30.0, "stages.train.lr=0.2", started_ms=2)
    assert line.expected_s(fresh=["train"]) == 47.0


def test_a_resumed_stage_is_expected_to_run_only_the_steps_that_are_left(line: Line, monkeypatch: pytest.MonkeyPatch):
    line.took(250.0, "stages.train.lr=0.2", curves=pace((10, 0.2, 12), (1200, 0.2, 250)))
    found = Checkpoint(Path("step-00001000"), 1000, {"identity": {}})
    monkeypatch.setattr(Checkpoint, "fits", lambda self, identity: None)
    monkeypatch.setattr(planner_module, "newest_checkpoint", lambda folders, verify: (found, []))
    plan = line.plan()
    assert (plan["train"].action, plan["train"].reason) == ("resume", "resumes at step 1000 of 1200")
    assert plan["train"].expected_s == pytest.approx(10 + 200 * 0.2)
    assert work_to_do(list(plan.values())) == "1 of 2 stages to run, about 0:50"


def test_an_execution_that_was_resumed_took_its_time_for_the_steps_after_that(line: Line):
    before = ((400, 0.2, 5), (800, 0.2, 9))  # logged by the execution that was stopped
    line.took(90.0, "stages.train.lr=0.2", resumed_from_step=800, curves=pace(*before, (810, 0.2, 12), (1200, 0.2, 90)))
    assert line.expected_s() == pytest.approx(10 + 1200 * 0.2)  # 390 steps in 78 s, so 400 steps in 80 s


def test_an_execution_that_repeated_steps_after_a_loss_is_a_bad_example(line: Line):
    line.took(100.0, "stages.train.lr=0.2", started_ms=1)
    line.took(400.0, "stages.train.lr=0.3", started_ms=2, restarts=1, resumed_from_step=1000)
    assert line.expected_s() == 100.0


def test_without_a_logged_pace_the_whole_time_is_scaled(line: Line):
    line.took(60.0, "stages.train.steps=600")
    assert line.expected_s() == 120.0


def test_a_stage_whose_input_will_be_rebuilt_is_compared_by_its_settings(line: Line):
    line.took(47.0, started_ms=1)
    line.took(500.0, "stages.train.width=64", started_ms=2)
    plan = line.plan("stages.read.words=20")
    assert plan["train"].reason == "its input read will be rebuilt"
    assert (plan["read"].expected_s, plan["train"].expected_s) == (2.0, 47.0)


def test_what_was_never_executed_has_no_forecast(tmp_path: Path, store: Store):
    plan = Line(tmp_path, store).plan()
    assert [each.expected_s for each in plan.values()] == [None, None]


def test_a_plan_reads_at_most_twenty_executions_of_a_stage(line: Line):
    for number in range(25):
        line.took(100.0 + number, f"stages.train.lr=0.{number + 100}", started_ms=number)
    assert [each.seconds for each in line.store.index.newest("line", "train", 20)] == [124.0 - number for number in range(20)]


def test_executions_from_before_the_index_had_stages_are_found_by_the_newest_one(line: Line):
    line.took(47.0, "stages.train.lr=0.2")
    for name in line.store.backend.list("index/stage/"):
        line.store.backend.delete(name)
    assert line.expected_s() == 47.0
