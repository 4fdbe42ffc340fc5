"""Exact resume with Ray and DeepSpeed: whatever is killed, the same command resumes, and the model equals the undisturbed one bit for bit.

For each number of ranks, one command is run six times; all runs but the last are ended from outside, each in a different way.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
from dataclasses import dataclass
from typing import Any

import pytest

from pipelines.store.events import StageStarted

pytestmark = pytest.mark.slow

STEPS = 30
FAULTS = "rank 0: pause at 3; rank 0: pause at 6; rank {0}: wait at 12; rank {0}: wait at 17; rank 0: wait at 21; rank {0}: die at 27"
RESUMES_AT = {"Ctrl-C": 4, "SIGTERM": 7, "second Ctrl-C": 10, "driver killed": 15, "group killed": 20}
"""The step at which the next run resumes: a stop saves the current step, otherwise a checkpoint is saved every five steps."""


@dataclass
class Story:
    """The six runs, oldest first, and an undisturbed one. The fifth waits for the fourth and takes over when its driver is killed."""

    last: int
    """The highest rank, to which most of the faults happen."""
    program: Any
    undisturbed: Any
    runs: list[str]
    printed: list[str]
    pids: list[int]
    """Process ids of the runs' drivers, in the same order."""


@pytest.fixture(scope="module")
def two_ranks_undisturbed(small, new_program) -> Any:
    program = new_program(like=small)
    program.run("run", "small.toml", "--set", "stages.pretrain.resources.ranks=2")
    return program


@pytest.fixture(scope="module", params=["one_rank", "two_ranks"])
def story(request, small, new_program, wait_for, gone, tmp_path_factory) -> Story:
    last = ["one_rank", "two_ranks"].index(request.param)
    program, marks = new_program(like=small), tmp_path_factory.mktemp("marks")
    settings = (f"resources.ranks={last + 1}", f"fault={FAULTS.format(last)}", f"marks={marks}")
    command = ("run", "small.toml", *(word for setting in settings for word in ("--set", f"stages.pretrain.{setting}")))
    story = Story(last, program, request.getfixturevalue(f"{request.param}_undisturbed"), [], [], [])
    workers: list[int] = []

    def reaches(fault: str, process: Any) -> Any:
        wait_for(lambda: (marks / fault).exists() and ranks_of(program), f"{fault} and the ranks' process ids", process)
        story.runs.append(program.last_run())
        story.pids.append(process.pid)
        tasks = [int(folder.name.split("-")[-2]) for folder in (program.store.root / "tmp").iterdir()]
        workers[:] = ranks_of(program) + tasks
        return process

    def ends(process: Any, code: int) -> tuple[str, ...]:
        """Wait for the end; return the command that resumes."""
        story.printed.append(program.finish(process, code))
        wait_for(lambda: all(gone(pid) for pid in workers), f"the workers of run {len(story.runs)} to end")
        printed = re.findall(r"resume with: gptline (.*)", story.printed[-1])
        return tuple(shlex.split(printed[0])) if printed else command

    process = reaches("pause-0-3", program.start(*command))
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it
    resume = ends(process, 130)

    process = reaches("pause-0-6", program.start(*resume))
    process.terminate()
    resume = ends(process, 143)

    process = reaches(f"wait-{last}-12", program.start(*resume))
    os.killpg(process.pid, signal.SIGINT)
    wait_for((marks / f"asked-{last}-12").exists, "the stop request to reach a step that never ends", process)
    os.killpg(process.pid, signal.SIGINT)
    resume = ends(process, 130)

    process = reaches(f"wait-{last}-17", program.start(*resume))
    second = program.start(*command)
    wait_for(lambda: program.waits_for(story.runs[-1]), "the second run to wait", second)
    process.kill()
    ends(process, -signal.SIGKILL)

    reaches("wait-0-21", second)
    os.killpg(second.pid, signal.SIGKILL)
    ends(second, -signal.SIGKILL)

    story.printed.append(program.run(*command))
    story.runs.append(program.last_run())
    return story


def ranks_of(program: Any) -> list[int]:
    """Process ids of the newest gang of the newest run."""
    gangs = [note for note in program.notes() if "(pid " in note]
    return [int(pid) for pid in re.findall(r"\(pid (\d+),", gangs[-1])] if gangs else []


@pytest.mark.parametrize("end", ["Ctrl-C", "SIGTERM", "second Ctrl-C"])
def test_a_run_that_is_asked_to_stop_says_how_to_resume_and_shows_no_traceback(story, end):
    number = list(RESUMES_AT).index(end)
    assert story.program.status(story.runs[number])["pretrain"] == "stopped"
    assert "Traceback" not in story.printed[number]
    assert "interrupted; resume with: gptline run small.toml --set" in story.printed[number]


@pytest.mark.parametrize("end", RESUMES_AT)
def test_a_kill_loses_only_the_steps_since_the_last_checkpoint_and_a_stop_loses_none(story, end):
    following = story.runs[list(RESUMES_AT).index(end) + 1]
    started = [event for event in story.program.events(following) if isinstance(event, StageStarted)]
    (event,) = [event for event in started if event.stage == "pretrain"]
    assert (event.decision, event.reason) == ("resume", f"resumes at step {RESUMES_AT[end]} of 30")


def test_a_second_run_waits_for_the_first_and_takes_over_when_its_driver_is_killed(story):
    first, second = (list(RESUMES_AT).index("driver killed") + more for more in (0, 1))
    waits = rf"waiting for \S+ on \S+, process {story.pids[first]}, run {story.runs[first]}, which is building it"
    assert [note for note in story.program.notes(story.runs[second]) if re.fullmatch(waits, note)]


def test_a_killed_rank_is_named_and_the_gang_restarts_within_the_run(story):
    pattern = rf"rank {story.last} \(pid \d+, node \S+\) was killed by SIGKILL at step 2[567]; start 2 of 3 resumes at step 25"
    assert re.search(pattern, story.printed[-1])
    assert story.program.action("pretrain").restarts == 1
    assert story.program.action("pretrain").resumed_from_step == 25


def test_the_resumed_model_equals_the_undisturbed_one_bit_for_bit(story):
    assert story.program.outputs()["pretrain"] == story.undisturbed.outputs()["pretrain"]
    assert story.undisturbed.action("pretrain").restarts == 0


def test_the_recorded_curves_have_each_point_once_and_equal_the_undisturbed_ones_bit_for_bit(story):
    curves, undisturbed = (program.action("pretrain").curves for program in (story.program, story.undisturbed))
    assert [step for step, _, _ in curves["train/loss"]] == list(range(1, STEPS + 1))
    assert [step for step, _, _ in curves["val/loss"]] == [10, 20, 30]
    for name in ("train/loss", "train/grad_norm", "train/lr", "val/loss"):
        assert [value.hex() for _, value, _ in curves[name]] == [value.hex() for _, value, _ in undisturbed[name]]


def test_checkpoints_and_leftovers_are_gone_once_the_model_is_published(story):
    root = story.program.store.root
    assert not list((root / "work").glob("*"))
    assert not list((root / "tmp").glob("*"))
