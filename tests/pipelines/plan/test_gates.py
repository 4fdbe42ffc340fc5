"""Gates: what a closed gate blocks, what it doesn't affect, and how it is reported."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest

from pipelines.observe.page import render
from pipelines.observe.plan_rows import plan_lines
from pipelines.observe.progress import Progress
from pipelines.plan.config import ConfigError, load
from pipelines.plan.environment import ROOT
from pipelines.plan.graph import build
from pipelines.plan.planner import Planner
from pipelines.run.runner import Options, Run
from pipelines.store.events import RunEnded, StageEnded
from pipelines.store.journal import read_journal
from pipelines.store.store import Store
from tests.pipelines.run.small import NoTracker

KINDS = '''
from gpt.settings import TrainSettings
from pipelines.artifacts import Model, Report
from pipelines.stage import StageConfig, StageContext, StageFailure


class MeasureConfig(StageConfig):
    accuracy: float = 0.61
    broken: bool = False


class TrainConfig(StageConfig, TrainSettings):
    val_loss: list[float] = [3.0, 2.5]


def measure(config: MeasureConfig, stage: StageContext) -> Report:
    if config.broken:
        raise StageFailure("nothing to measure")
    stage.figure("eval/pair_accuracy", config.accuracy if config.accuracy >= 0 else float("nan"))
    stage.figure("eval/pairs", 100)
    return written(stage, config.accuracy)


def read(reports: list[Report], stage: StageContext) -> Report:
    return written(stage, [each.digest for each in reports])


def train(config: TrainConfig, report: Report | None, stage: StageContext) -> Model:
    """A policy that no gang trained."""
    for step, loss in enumerate(config.val_loss):
        stage.log(step, {"val/loss": loss})
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        (stage.output / name).write_text(str(config.lr))
    return stage.publish(Model, role="policy", tokenizer="6b1f")


def written(stage, what):
    (stage.output / "report.json").write_text(str(what))
    return stage.publish(Report)
'''
TOML = """
pipeline = "gated"

[stages.measure]
uses = "./kinds.py:measure"
gate = { figure = "eval/pair_accuracy", min = 0.65 }

[stages.read]
uses = "./kinds.py:read"
inputs = { reports = ["measure"] }

[stages.read_again]
uses = "./kinds.py:read"
inputs = { reports = ["read"] }

[stages.aside]
uses = "./kinds.py:measure"
accuracy = 0.5
"""
CLOSED = (
    "measure's gate is closed: eval/pair_accuracy is 0.61, expected at least 0.65; change its settings or its inputs, or change the gate"
)
TRAIN = '\n[stages.{}]\nuses = "./kinds.py:train"\nsteps = 2\nglobal_batch_size = 1\nlr = {}\n'


class Gated:
    """A pipeline whose first stage has a gate, run in this process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = Store(folder / "store")
        (folder / "kinds.py").write_text(KINDS)
        self.write(TOML)

    def write(self, text: str) -> None:
        (self.folder / "gated.toml").write_text(text)

    def graph(self, *overrides: str) -> Any:
        sys.modules.pop("gptline_user_kinds", None)
        sys.path[:] = [each for each in sys.path if not Path(each, "kinds.py").exists()]
        return build(load(self.folder / "gated.toml", overrides))

    def run(self, *overrides: str, **options: Any) -> tuple[int, dict[str, str]]:
        """Run the pipeline; return the exit code and the status of each stage."""
        graph = self.graph(*overrides)
        self.out = io.StringIO()
        with Progress(self.out, live=False) as progress:
            run = Run(graph, self.store, Options("gptline run gated.toml", "gptline run gated.toml", inline=True, **options), progress.show)
            code = run.execute()
        self.events = read_journal(self.store, run.run)
        return code, {event.stage: event.status for event in self.ended()}

    def plan(self, *overrides: str, **options: Any) -> dict[str, tuple[str, str]]:
        self.decisions = Planner(self.graph(*overrides), self.store, ROOT, **options).plan()
        return {each.stage: (each.action, each.reason) for each in self.decisions}

    def faults(self, gate: str) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            self.graph(f"stages.measure.gate={gate}")
        return [str(fault) for fault in caught.value.faults]

    def reason(self, stage: str) -> str:
        return next(event.reason for event in self.ended() if event.stage == stage)

    def ended(self) -> list[StageEnded]:
        return [event for event in self.events if isinstance(event, StageEnded)]

    def ending(self) -> RunEnded:
        last = self.events[-1]
        assert isinstance(last, RunEnded)
        return last

    def newest(self) -> str | None:
        return self.store.alias("gated", "newest")


@pytest.fixture
def gated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gated:
    monkeypatch.setattr("pipelines.run.runner.start_tracking", lambda *_: NoTracker())
    return Gated(tmp_path)


def test_a_closed_gate_blocks_the_stages_that_read_it_and_no_others(gated: Gated):
    assert gated.run() == (1, {"measure": "done", "aside": "done", "read": "blocked", "read_again": "blocked"})
    assert gated.reason("read") == CLOSED
    assert gated.reason("read_again") == "its input read can't be built"
    assert (gated.ending().status, gated.ending().exit_code) == ("FAILED", 1)
    assert gated.ending().text == f"{CLOSED}. Then resume with: gptline run gated.toml"


def test_a_figure_on_the_bound_passes_the_gate(gated: Gated):
    done = {"measure": "done", "aside": "done", "read": "done", "read_again": "done"}
    assert gated.run("stages.measure.accuracy=0.65") == (0, done)
    assert gated.plan("stages.measure.accuracy=0.65", "stages.measure.gate.max=0.65")["read"][0] == "reuse"


def test_a_closed_gate_is_reported_when_the_stage_ends_in_the_last_line_and_on_the_page(gated: Gated):
    gated.run()
    lines = gated.out.getvalue().splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("measure     made: "))
    assert lines[at - 1] == f"measure     {CLOSED}"
    assert f"read        blocked: {CLOSED}" in lines
    assert lines[-2].startswith("2 made, 2 blocked in ")
    assert lines[-1] == f"{CLOSED}. Then resume with: gptline run gated.toml"
    assert "gate is closed: eval/pair_accuracy is 0.61, expected at least 0.65" in render(gated.store, gated.store.runs()[-1])


def test_the_output_behind_a_closed_gate_is_kept_and_plan_and_run_agree(gated: Gated):
    gated.run()
    assert gated.run() == (1, {"measure": "reused", "aside": "reused", "read": "blocked", "read_again": "blocked"})
    assert gated.reason("read") == CLOSED
    made_by = f"made by run {gated.store.runs()[0]}"
    assert gated.plan() == {
        "measure": ("reuse", made_by),
        "read": ("blocked", CLOSED),
        "read_again": ("blocked", "its input read can't be built"),
        "aside": ("reuse", made_by),
    }
    lines = plan_lines(gated.decisions)
    assert lines[1].strip() == CLOSED  # under the row of `measure`
    assert lines[-1] == "nothing to run: 2 blocked"


def test_changing_a_gate_reruns_nothing_and_only_decides_what_may_be_read(gated: Gated):
    gated.run()
    overrides = ("stages.measure.gate.min=0.6",)
    assert [action for action, _ in gated.plan(*overrides).values()] == ["reuse", "run", "run", "reuse"]
    assert gated.run(*overrides) == (0, {"measure": "reused", "aside": "reused", "read": "done", "read_again": "done"})
    assert gated.run() == (1, {"measure": "reused", "aside": "reused", "read": "blocked", "read_again": "blocked"})  # closed again


def test_a_closed_gate_fails_the_run_even_if_no_stage_follows(gated: Gated):
    gated.write(TOML + 'gate = { figure = "eval/pairs", max = 99 }\n')
    code, status = gated.run("stages.measure.gate.min=0.5")
    assert (code, set(status.values())) == (1, {"done"})
    assert gated.ending().text.startswith("aside's gate is closed: eval/pairs is 100, expected at most 99; ")


@pytest.mark.parametrize(
    ("gate", "accuracy", "reason"),
    [
        ("{figure='eval/pair_accuracy', max=0.6}", 0.61, "eval/pair_accuracy is 0.61, expected at most 0.6;"),
        ("{figure='eval/pair_accuracy', min=0.7, max=0.9}", 0.61, "eval/pair_accuracy is 0.61, expected at least 0.7 and at most 0.9;"),
        ("{figure='eval/pair_accuracy', min=0}", -1, "eval/pair_accuracy is nan, expected at least 0;"),
        ("{figure='eval/pair_accuracy', max=1}", -1, "eval/pair_accuracy is nan, expected at most 1;"),
        ("{figure='eval/pair_accuracy', min=0.65}", 0.64999999, "eval/pair_accuracy is 0.64999999, expected at least 0.65;"),
        ("{figure='time/zzz', min=0}", 0.61, "it has no figure time/zzz (its figures: eval/pair_accuracy, eval/pairs); change the gate"),
        ("{figure='eval/accuracy', min=0}", 0.61, "it has no figure eval/accuracy (did you mean eval/pair_accuracy?); change the gate"),
        (
            "[{figure='eval/pair_accuracy', min=0.7}, {figure='eval/pairs', min=1}, {figure='eval/pairs', max=50}]",
            0.61,
            "eval/pair_accuracy is 0.61, expected at least 0.7, and eval/pairs is 100, expected at most 50;",
        ),
    ],
)
def test_a_closed_gate_is_reported_with_the_value_and_the_bound(gated: Gated, gate: str, accuracy: float, reason: str):
    overrides = (f"stages.measure.gate={gate}", f"stages.measure.accuracy={accuracy}")
    assert gated.run(*overrides)[0] == 1
    assert gated.reason("read").startswith(f"measure's gate is closed: {reason}")
    assert gated.plan(*overrides)["read"] == ("blocked", gated.reason("read"))  # the plan reads the same from the record


def test_a_gate_on_a_stage_without_figures_says_so(gated: Gated):
    (gated.folder / "kinds.py").write_text(KINDS.replace("stage.figure(", "print("))
    assert gated.run()[0] == 1
    assert gated.reason("read").startswith("measure's gate is closed: it has no figure eval/pair_accuracy (its figures: none);")


def test_the_last_value_of_a_curve_counts_if_there_is_no_such_figure(gated: Gated):
    gated.write('pipeline = "gated"\n' + TRAIN.format("train", 1.0) + 'gate = { figure = "val/loss", max = 2.6 }\n')
    assert gated.run()[0] == 0  # 3.0, then 2.5
    assert gated.run("stages.train.gate.max=2.4")[0] == 1
    expected = "train's gate is closed: val/loss is 2.5, expected at most 2.4; train it longer or otherwise, or change the gate. "
    assert gated.ending().text.startswith(expected)


def test_newest_never_points_to_a_model_whose_gate_is_closed(gated: Gated):
    second = TRAIN.format("second", 2.0) + 'gate = { figure = "val/loss", max = 2.4 }\n'
    gated.write('pipeline = "gated"\n' + TRAIN.format("first", 1.0) + second)
    gated.run()
    outputs = {event.stage: event.output for event in gated.ended()}
    assert gated.newest() == outputs["first"]
    gated.run()  # reused
    assert gated.newest() == outputs["first"]
    gated.run("stages.second.gate.max=2.5")
    assert gated.newest() == outputs["second"]
    gated.run()  # the gate of the model that it pointed to is closed now
    assert gated.newest() == outputs["first"]


STOPPED = """    if config.lr == 3.0:
        import os, signal

        os.kill(os.getpid(), signal.SIGINT)
    if config.lr == 4.0:
        raise StageFailure("no such lr")
    for step, loss"""


@pytest.mark.parametrize(
    ("code", "changes", "options"),
    [
        (130, ("stages.first.lr=3.0",), {}),
        (1, ("stages.first.lr=5.0", "stages.second.lr=4.0"), {}),
        (1, ("stages.first.lr=5.0", "stages.second.lr=6.0", "stages.second.val_loss=[3.0, 9.0]"), {}),
        (0, ("stages.first.lr=5.0",), {"until": "first"}),
    ],
)
def test_newest_stays_on_the_finished_model_if_a_run_does_not_complete(
    gated: Gated, code: int, changes: tuple[str, ...], options: dict[str, str]
):
    (gated.folder / "kinds.py").write_text(KINDS.replace("    for step, loss", STOPPED))
    second = TRAIN.format("second", 2.0) + 'gate = { figure = "val/loss", max = 2.6 }\n'
    gated.write('pipeline = "gated"\n' + TRAIN.format("first", 1.0) + second)
    gated.run(until="first")
    base = gated.newest()
    gated.run()
    finished = gated.newest()
    assert None not in (base, finished)
    assert base != finished
    assert gated.run(*changes, **options)[0] == code
    assert gated.newest() == finished


def test_an_artifact_from_use_needs_no_figures(gated: Gated):
    gated.run()
    given = f"run:{gated.store.runs()[0]}/measure"
    assert gated.run(use={"measure": given}) == (0, {"measure": "reused", "aside": "reused", "read": "done", "read_again": "done"})


def test_a_failed_stage_is_reported_beside_a_closed_gate(gated: Gated):
    assert gated.run("stages.aside.broken=true") == (1, {"measure": "done", "aside": "failed", "read": "blocked", "read_again": "blocked"})
    last = "aside failed; the other results are kept. Fix the cause, then resume with: gptline run gated.toml"
    assert gated.ending().text == f"{CLOSED}. {last}"


def test_a_gate_is_in_the_runs_config_but_not_in_the_key(gated: Gated):
    gated.run()
    (action,) = [each for each in gated.store.all_actions() if each.stage == "measure"]
    assert {name for name in action.leaves if not name.startswith("code.")} == {"kind", "seed", "config.accuracy", "config.broken"}
    record = gated.store.backend.get(f"runs/{gated.store.runs()[0]}/run.json")
    assert b'"gate": [{"figure": "eval/pair_accuracy", "min": 0.65' in (record or b"")


@pytest.mark.parametrize(
    ("gate", "fault"),
    [
        ("{figure='eval/x'}", "stages.measure.gate: has no bound; expected min, max or both"),
        ("{figure='eval/x', min=2, max=1}", "stages.measure.gate: min = 2 is more than max = 1; no value would pass"),
        ("{figure='eval/x', mini=2}", "stages.measure.gate.mini: unknown key; did you mean 'min'?"),
        ("{figure='Accuracy (%)', min=2}", "stages.measure.gate.figure: metric name 'Accuracy (%)': expected area/name_unit in lower case"),
        ("{min=2}", "stages.measure.gate.figure: is missing"),
        ("{figure='eval/x', min='high'}", "stages.measure.gate.min: expected a number, found 'high'"),
        ("{figure='eval/x', min=nan}", "stages.measure.gate.min: expected a finite number, found nan"),
        ("0.65", "stages.measure.gate: expected a table, found 0.65"),
        ("[{figure='eval/x', min=1}, {figure='eval/y'}]", "stages.measure.gate.1: has no bound; expected min, max or both"),
    ],
)
def test_a_gate_that_cannot_be_read_is_a_fault_of_the_file(gated: Gated, gate: str, fault: str):
    (found,) = gated.faults(gate)
    assert found.startswith(fault)
