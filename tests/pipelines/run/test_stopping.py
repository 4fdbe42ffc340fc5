"""A training stage that is stopped, and what a plan says about it afterwards."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from pipelines.cli import app
from tests.pipelines.run.small import KINDS, TOML, Small

DRILL = """

from gpt.settings import PretrainSettings


class DrillConfig(StageConfig, PretrainSettings):
    pass


def practise(rank, config):
    import os, signal, torch

    model = torch.nn.Linear(1, 1)
    rank.engine("policy", model, [{"params": list(model.parameters())}], config)
    if rank.restore() == 0:
        rank.save(3)
        os.kill(os.getpid(), signal.SIGINT)
    return None if rank.should_stop() else {"steps": 10}


def drill(config: DrillConfig, documents: Documents, stage: StageContext) -> Report:
    (stage.output / "report.json").write_text(str(stage.gang(practise, config)))
    return stage.publish(Report)
"""
DRILL_TOML = """
[stages.drill]
uses = "./kinds.py:drill"
inputs = { documents = "words" }
preset = "gpt2-nano"
steps = 10
global_batch_size = 4
lr = 1e-3
"""


@pytest.fixture
def drilled(small: Small) -> Small:
    """A pipeline whose training, inline, was stopped by Ctrl-C after it saved step 3 of 10."""
    small.write("kinds.py", KINDS + DRILL)
    small.write("small.toml", TOML + DRILL_TOML)
    code, status = small.run(until="drill")
    assert (code, status) == (130, {"words": "done", "drill": "stopped"})
    return small


def test_a_stopped_training_reports_the_step_at_which_it_was_saved(drilled: Small):
    last = drilled.ended_stage("drill")
    assert (last.reason, last.error) == ("saved at step 3", "")
    assert drilled.run(until="drill") == (0, {"words": "reused", "drill": "done"})


def test_a_stop_through_the_store_reaches_an_inline_training_and_ends_the_run(small: Small):
    runs = str(small.store.root / "runs")
    stop = f"import pathlib, time; [(run / 'stop').touch() for run in pathlib.Path({runs!r}).iterdir()]; time.sleep(0.4)"
    small.write("kinds.py", KINDS + DRILL.replace("os.kill(os.getpid(), signal.SIGINT)", stop))
    small.write("small.toml", TOML + DRILL_TOML)
    assert small.run(until="drill") == (143, {"words": "done", "drill": "stopped"})
    last = small.ended_stage("drill")
    assert last.reason == "saved at step 3"
    assert small.ending().status == "KILLED"


def test_a_plan_is_made_for_the_run_with_the_same_options(drilled: Small):
    def plan(*words: str) -> str:
        drilled.graph()  # forgets imported modules, like a new process
        arguments = ["plan", str(drilled.folder / "small.toml"), "--set", f"store.root={drilled.store.root}", *words]
        return CliRunner().invoke(app, arguments, catch_exceptions=False).output

    assert "drill   resume  resumes at step 3 of 10" in plan("--inline")
    assert (
        "drill   blocked  the checkpoint at step 3 was made with engine = torch, but this run asks for engine = deepspeed, zero_stage = 1 "
        "and can't load it; set engine = torch to resume, or rebuild the stage from step 0 (--fresh drill). "
        "Or continue with --inline\n"
    ) in plan()
    assert "drill   run    rerun requested" in plan("--fresh", "drill")
    assert "drill" not in plan("--inline", "--until", "report")
