"""Exact resume of an assistant's stages: ranks are killed in SFT, the reward model and RL, yet each model equals the undisturbed one.

Two programs run the same stages, both without a reachable MLflow. In the second one a rank is killed five times.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import pytest

pytestmark = pytest.mark.slow

RECORDS = """
[stages.conversations]
source = "json"
files = ["sums.jsonl"]
format = "plain"
hold_out = { share = 0.2, by = "prompt" }

[stages.preferences]
source = "json"
files = ["sums.jsonl"]
format = "plain"
hold_out = { share = 0.2, by = "prompt" }

[stages.prompts]
source = "json"
files = ["sums.jsonl"]
format = "plain"
"""
TRAINED = """
[stages.sft]
uses = "./faulty.py:sft"
inputs = { policy = "pretrain", conversations = "conversations" }
engine = "torch"
dropout = 0.1
steps = 5
global_batch_size = 4
lr = 3e-2
log_every = 1
eval_every = 2
checkpoint_every = 2

[stages.sft.resources]
ranks = 2

[stages.reward_model]
uses = "./faulty.py:reward_model"
inputs = { policy = "sft", preferences = "preferences" }
engine = "torch"
dropout = 0.1
steps = 5
global_batch_size = 4
lr = 1e-3
log_every = 1
eval_every = 2
checkpoint_every = 2

[stages.reward_model.resources]
ranks = 2

[stages.rl]
uses = "./faulty.py:rl"
inputs = { policy = "sft", prompts = "prompts", reward_model = "reward_model" }
steps = 4
prompts_per_step = 4
global_batch_size = 2
max_response_tokens = 6
ppo_epochs = 2
lr = 1e-3
value_warmup_steps = 1
log_every = 1
checkpoint_every = 2
max_restarts = 3

[stages.rl.resources]
ranks = 2
"""
FAULTS = {
    "sft": "rank 1: die at 3",
    "reward_model": "rank 0: die at 3 in reward",
    # after a rollout, before its updates; between the updates of policy and value model; after the last step
    "rl": "rank 1: die at 1 in rollout; rank 1: die at 3 in value; rank 0: die at 4 in checkpoint",
}
STEPS = {"sft": 5, "reward_model": 5, "rl": 4}
RESUMED = {"sft": [2], "reward_model": [2], "rl": [0, 2, 2]}
"""The step at which each start after the first resumes: a checkpoint is saved every two steps, but in RL not after the last one."""
CURVES = {
    "sft": ("train/loss", "train/grad_norm", "val/loss"),
    "reward_model": ("train/loss", "train/grad_norm", "val/loss"),
    "rl": ("train/value_loss", "train/value_grad_norm", "reward/score_mean", "rollout/kl_k1_nats_per_response", "train/entropy"),
}


@dataclass
class Story:
    program: Any
    undisturbed: Any
    printed: str


@pytest.fixture(scope="module")
def story(small, new_program, tmp_path_factory) -> Story:
    undisturbed = new_program(like=small)
    toml = (undisturbed.folder / "small.toml").read_text().replace("steps = 30", "steps = 5")
    (undisturbed.folder / "records.toml").write_text(toml + RECORDS)
    (undisturbed.folder / "assistant.toml").write_text(toml + RECORDS + TRAINED)
    rows = ({"prompt": f"{n}+1?", "response": f"{n + 1}", "chosen": f"{n + 1}", "rejected": f"{n}"} for n in range(40))
    (undisturbed.folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    undisturbed.run("run", "records.toml", "--inline")
    program, marks = new_program(like=undisturbed), tmp_path_factory.mktemp("marks")
    undisturbed.run("run", "assistant.toml")
    settings = [f"stages.{stage}.{each}" for stage, fault in FAULTS.items() for each in (f"fault={fault}", f"marks={marks}")]
    output = program.run("run", "assistant.toml", *(word for setting in settings for word in ("--set", setting)))
    assert len(list(marks.iterdir())) == 5
    return Story(program, undisturbed, output)


@pytest.mark.parametrize("stage", FAULTS)
def test_each_start_after_a_kill_resumes_from_the_newest_checkpoint(story, stage):
    found = re.findall(rf"{stage} .*killed by SIGKILL at step \d+; start \d of \d (.*)", story.printed)
    expected = [f"resumes at step {step}" if step else "begins at step 0, since there is no checkpoint yet" for step in RESUMED[stage]]
    assert (found, story.program.action(stage).restarts) == (expected, len(expected))
    assert story.undisturbed.action(stage).restarts == 0


@pytest.mark.parametrize("stage", FAULTS)
def test_model_figures_and_curves_equal_the_undisturbed_ones_bit_for_bit(story, stage):
    assert story.program.outputs()[stage] == story.undisturbed.outputs()[stage]
    assert story.program.action(stage).figures == story.undisturbed.action(stage).figures
    curves, undisturbed = (program.action(stage).curves for program in (story.program, story.undisturbed))
    assert set(curves) == set(undisturbed)
    for name in CURVES[stage]:
        assert [(step, value.hex()) for step, value, _ in curves[name]] == [(step, value.hex()) for step, value, _ in undisturbed[name]]


def test_an_mlflow_that_was_unreachable_gets_each_point_once_however_often_its_step_was_executed(story):
    assert story.printed.count("can't be reached (connection refused): what happens is kept in the run's journal") == 1
    story.program.run("sync", "--tracking", "sqlite")  # instead of the unreachable one

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{story.program.store.root}/mlflow.db")
    experiment = client.get_experiment_by_name("small")
    tag = f"tags.`gptline.run` = '{story.program.last_run()}'"
    runs = {
        run.data.tags["gptline.stage"]: run
        for run in client.search_runs([experiment.experiment_id], tag)
        if run.data.tags.get("gptline.stage") in STEPS
    }
    for stage, steps in STEPS.items():
        assert runs[stage].info.status == "FINISHED"
        for name in CURVES[stage]:
            if name != "val/loss":
                steps_logged = [point.step for point in client.get_metric_history(runs[stage].info.run_id, name)]
                first = 2 if name == "train/entropy" else 1  # in the first step only the value model learns
                assert steps_logged == list(range(first, steps + 1))
