"""Exact resume on the real machinery: whatever is killed, the same command goes on, and the model is the undisturbed one, bit by bit.

One story for each number of ranks: six runs of one command, of which all but the last are ended from outside, each in another way.
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
GOES_ON_AT = {"Ctrl-C": 4, "SIGTERM": 7, "second Ctrl-C": 10, "driver killed": 15, "group killed": 20}
"""The step at which the next run goes on: a stop saves the step that it finds, else there is a checkpoint every five steps."""


@dataclass
class Story:
    """The six runs, oldest first, beside an undisturbed one. The fifth waits for the fourth and takes over when its driver is killed."""

    last: int
    """The rank that most happens to."""
    program: Any
    undisturbed: Any
    runs: list[str]
    said: list[str]
    pids: list[int]
    """The driver's process ids, in the same order."""


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
    asked = ("run", "small.toml", *(word for setting in settings for word in ("--set", f"stages.pretrain.{setting}")))
    told = Story(last, program, request.getfixturevalue(f"{request.param}_undisturbed"), [], [], [])
    workers: list[int] = []

    def reaches(fault: str, process: Any) -> Any:
        wait_for(lambda: (marks / fault).exists() and ranks_of(program), f"{fault} and the ranks' names", process)
        told.runs.append(program.last_run())
        told.pids.append(process.pid)
        tasks = [int(folder.name.split("-")[-2]) for folder in (program.store.root / "tmp").iterdir()]
        workers[:] = ranks_of(program) + tasks
        return process

    def ends(process: Any, code: int) -> tuple[str, ...]:
        """The command that goes on."""
        told.said.append(program.finish(process, code))
        wait_for(lambda: all(gone(pid) for pid in workers), f"the end of the workers of run {len(told.runs)}")
        printed = re.findall(r"resume with: gptline (.*)", told.said[-1])
        return tuple(shlex.split(printed[0])) if printed else asked

    process = reaches("pause-0-3", program.start(*asked))
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    goes_on = ends(process, 130)

    process = reaches("pause-0-6", program.start(*goes_on))
    process.terminate()
    goes_on = ends(process, 143)

    process = reaches(f"wait-{last}-12", program.start(*goes_on))
    os.killpg(process.pid, signal.SIGINT)
    wait_for((marks / f"asked-{last}-12").exists, "the stop's reaching a step that never ends", process)
    os.killpg(process.pid, signal.SIGINT)
    goes_on = ends(process, 130)

    process = reaches(f"wait-{last}-17", program.start(*goes_on))
    second = program.start(*asked)
    wait_for(lambda: program.waits_for(told.runs[-1]), "the second run's waiting", second)
    process.kill()
    ends(process, -signal.SIGKILL)

    reaches("wait-0-21", second)
    os.killpg(second.pid, signal.SIGKILL)
    ends(second, -signal.SIGKILL)

    told.said.append(program.run(*asked))
    told.runs.append(program.last_run())
    return told


def ranks_of(program: Any) -> list[int]:
    """Process ids of the newest gang of the newest run."""
    gangs = [note for note in program.notes() if "(pid " in note]
    return [int(pid) for pid in re.findall(r"\(pid (\d+),", gangs[-1])] if gangs else []


@pytest.mark.parametrize("end", ["Ctrl-C", "SIGTERM", "second Ctrl-C"])
def test_who_is_asked_to_stop_says_how_to_go_on_and_shows_no_traceback(story, end):
    number = list(GOES_ON_AT).index(end)
    assert story.program.status(story.runs[number])["pretrain"] == "stopped"
    assert "Traceback" not in story.said[number]
    assert "interrupted; resume with: gptline run small.toml --set" in story.said[number]


@pytest.mark.parametrize("end", GOES_ON_AT)
def test_no_end_loses_more_than_the_steps_since_the_last_checkpoint_and_a_stop_loses_none(story, end):
    following = story.runs[list(GOES_ON_AT).index(end) + 1]
    started = [event for event in story.program.events(following) if isinstance(event, StageStarted)]
    (event,) = [event for event in started if event.stage == "pretrain"]
    assert (event.decision, event.reason) == ("resume", f"resumes at step {GOES_ON_AT[end]} of 30")


def test_a_second_run_waits_for_the_first_and_takes_over_when_its_driver_is_killed(story):
    first, second = (list(GOES_ON_AT).index("driver killed") + more for more in (0, 1))
    waits = rf"waiting for \S+ on \S+, process {story.pids[first]}, run {story.runs[first]}, which is building it"
    assert [note for note in story.program.notes(story.runs[second]) if re.fullmatch(waits, note)]


def test_a_killed_rank_is_named_and_the_gang_goes_on_within_the_run(story):
    pattern = rf"rank {story.last} \(pid \d+, node \S+\) was killed by SIGKILL at step 2[567]; start 2 of 3 resumes at step 25"
    assert re.search(pattern, story.said[-1])
    assert story.program.action("pretrain").restarts == 1
    assert story.program.action("pretrain").resumed_from_step == 25


def test_the_resumed_model_is_the_undisturbed_one_bit_by_bit(story):
    assert story.program.outputs()["pretrain"] == story.undisturbed.outputs()["pretrain"]
    assert story.undisturbed.action("pretrain").restarts == 0


def test_the_recorded_curves_are_whole_without_doubles_and_equal_in_every_bit(story):
    curves, undisturbed = (program.action("pretrain").curves for program in (story.program, story.undisturbed))
    assert [step for step, _, _ in curves["train/loss"]] == list(range(1, STEPS + 1))
    assert [step for step, _, _ in curves["val/loss"]] == [10, 20, 30]
    for name in ("train/loss", "train/grad_norm", "train/lr", "val/loss"):
        assert [value.hex() for _, value, _ in curves[name]] == [value.hex() for _, value, _ in undisturbed[name]]


def test_checkpoints_and_leftovers_are_gone_once_the_model_is_published(story):
    root = story.program.store.root
    assert not list((root / "work").glob("*"))
    assert not list((root / "tmp").glob("*"))
