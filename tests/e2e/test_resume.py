"""Exact resume on the real machinery: whatever is killed, the same command goes on, and the model is the undisturbed one, bit by bit."""

from __future__ import annotations

import os
import re
import shlex
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

STEPS = 30


@dataclass
class Story:
    """Runs of one command, each but the last one ended from outside, beside an undisturbed one."""

    program: Any
    undisturbed: Any
    said: list[str]
    runs: list[str]


def workers_of(program: Any) -> list[int]:
    """Process ids of the newest run's gang, and of the stage's task, whose unfinished folder carries its id."""
    notes = [event["text"] for event in program.events() if event["type"] == "note" and "(pid " in event["text"]]
    ranks = [int(pid) for pid in re.findall(r"\(pid (\d+),", notes[-1])]
    return ranks + [int(folder.name.split("-")[-2]) for folder in (program.store.root / "tmp").iterdir()]


def command(fault: str, marks: Path, *more: str) -> tuple[str, ...]:
    return ("run", "small.toml", "--set", f"stages.pretrain.fault={fault}", "--set", f"stages.pretrain.marks={marks}", *more)


@pytest.fixture(scope="module")
def two_ranks(small, new_program, wait_for, gone, tmp_path_factory) -> Story:
    """Ctrl-C at step 7, the driver killed at 12, rank 1 killed at 22."""
    more = ("--set", "stages.pretrain.resources.ranks=2")
    program, marks = new_program(like=small), tmp_path_factory.mktemp("marks")
    asked = command("rank 0: pause at 7; rank 1: wait at 12; rank 1: die at 22", marks, *more)
    said, runs = [], []

    process = program.start(*asked)
    wait_for((marks / "pause-0-7").exists, "step 7", process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    said.append(program.finish(process, code=130))
    runs.append(program.last_run())

    (printed,) = re.findall(r"go on with: gptline (.*)", said[0])
    process = program.start(*shlex.split(printed))
    wait_for((marks / "wait-1-12").exists, "step 12", process)
    workers = workers_of(program)
    process.kill()
    said.append(program.finish(process, code=-signal.SIGKILL))
    wait_for(lambda: all(gone(pid) for pid in workers), "the end of the workers after their driver's")
    runs.append(program.last_run())

    said.append(program.run(*asked))
    runs.append(program.last_run())
    undisturbed = new_program(like=small)
    undisturbed.run("run", "small.toml", *more)
    return Story(program, undisturbed, said, runs)


@pytest.fixture(scope="module")
def one_rank(small, new_program, one_rank_undisturbed, wait_for, gone, tmp_path_factory) -> Story:
    """The whole process group killed at step 12, the rank at 22."""
    program, marks = new_program(like=small), tmp_path_factory.mktemp("marks")
    asked = command("rank 0: wait at 12; rank 0: die at 22", marks)
    process = program.start(*asked)
    wait_for((marks / "wait-0-12").exists, "step 12", process)
    workers = workers_of(program)
    os.killpg(process.pid, signal.SIGKILL)
    said = [program.finish(process, code=-signal.SIGKILL)]
    wait_for(lambda: all(gone(pid) for pid in workers), "the end of the workers after their group's")
    runs = [program.last_run()]
    said.append(program.run(*asked))
    runs.append(program.last_run())
    return Story(program, one_rank_undisturbed, said, runs)


def test_ctrl_c_finishes_the_step_saves_it_and_prints_the_command_that_goes_on(two_ranks):
    assert two_ranks.program.status(two_ranks.runs[0])["pretrain"] == "stopped"
    assert "Traceback" not in two_ranks.said[0]
    assert "interrupted" in two_ranks.said[0]
    assert decision(two_ranks, 1) == ("resume", "goes on at step 8 of 30")


def test_a_driver_that_is_killed_loses_no_more_than_the_steps_since_the_last_checkpoint(two_ranks):
    assert decision(two_ranks, 2) == ("resume", "goes on at step 10 of 30")


def test_a_group_that_is_killed_loses_no_more_than_the_steps_since_the_last_checkpoint(one_rank):
    assert decision(one_rank, 1) == ("resume", "goes on at step 10 of 30")


@pytest.mark.parametrize("story", ["two_ranks", "one_rank"])
def test_a_killed_rank_is_named_and_the_gang_goes_on_within_the_run(story, request):
    told = request.getfixturevalue(story)
    rank = 1 if story == "two_ranks" else 0
    pattern = rf"rank {rank} \(pid \d+, node \S+\) killed by SIGKILL at step 2[012]; start 2 of 3 resumes at step 20"
    assert re.search(pattern, told.said[-1])
    assert told.program.action("pretrain").restarts == 1
    assert told.program.action("pretrain").resumed_from_step == 20


@pytest.mark.parametrize("story", ["two_ranks", "one_rank"])
def test_the_resumed_model_is_the_undisturbed_one_bit_by_bit(story, request):
    told = request.getfixturevalue(story)
    assert told.program.outputs()["pretrain"] == told.undisturbed.outputs()["pretrain"]
    assert told.undisturbed.action("pretrain").restarts == 0


@pytest.mark.parametrize("story", ["two_ranks", "one_rank"])
def test_the_recorded_curves_are_whole_without_doubles_and_equal_in_every_bit(story, request):
    told = request.getfixturevalue(story)
    curves, undisturbed = (program.action("pretrain").curves for program in (told.program, told.undisturbed))
    assert [step for step, _, _ in curves["train/loss"]] == list(range(1, STEPS + 1))
    assert [step for step, _, _ in curves["val/loss"]] == [10, 20, 30]
    for name in ("train/loss", "train/grad_norm", "train/lr", "val/loss"):
        assert [value.hex() for _, value, _ in curves[name]] == [value.hex() for _, value, _ in undisturbed[name]]


@pytest.mark.parametrize("story", ["two_ranks", "one_rank"])
def test_checkpoints_and_leftovers_are_gone_once_the_model_is_published(story, request):
    told = request.getfixturevalue(story)
    root = told.program.store.root
    assert not list((root / "work").glob("*"))
    assert not list((root / "tmp").glob("*"))


def decision(story: Story, run: int) -> tuple[str, str]:
    """What the n-th run decided about pretraining, and why."""
    events = story.program.events(story.runs[run])
    (event,) = [event for event in events if event["type"] == "stage_started" and event["stage"] == "pretrain"]
    return event["decision"], event["reason"]
