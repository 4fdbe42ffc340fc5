"""A run as a job of a cluster that was there before it: submitted, followed, stopped, killed, and gone on with by submitting it again."""

from __future__ import annotations

import os
import re
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pipelines.store.events import RunEnded, StagePoints
from pipelines.store.lease import Watch

pytestmark = pytest.mark.slow

TOKEN = "0123456789abcdef" * 4


@pytest.fixture(scope="module")
def cluster(ray_head: Callable[..., Any], free_ports: Callable[[int], list[int]]) -> Iterator[str]:
    """The address of a head with a job server, for those who know its token."""
    port, dashboard, agent, client = free_ports(4)
    folder = Path(tempfile.mkdtemp(prefix="ray"))  # short, since Ray's sockets lie in it; its own, since other heads may run here
    words = [f"--port={port}", f"--temp-dir={folder}", "--include-dashboard=true", "--dashboard-host=127.0.0.1"]
    words += [f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"]
    try:
        with ray_head(folder / "log", {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}, *words):
            yield f"http://127.0.0.1:{dashboard}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def token(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pytest.MonkeyPatch]:
    """Programs know the cluster's token, from a file, and would go astray if they heeded RAY_ADDRESS."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("home")
        (home / "token").write_text(f"{TOKEN}\n")
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
            patch.delenv(name, raising=False)
        patch.setenv("HOME", str(home))
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(home / "token"))
        patch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
        yield patch


@dataclass
class Story:
    """Three submissions of one file: stopped at step 7, its driver killed at step 12, and brought to its end."""

    program: Any
    runs: list[str] = field(default_factory=list)
    said: dict[str, str] = field(default_factory=dict)


@pytest.fixture(scope="module")
def story(small: Any, new_program: Any, wait_for: Any, gone: Any, cluster: str, token: object, tmp_path_factory: Any) -> Story:
    program, marks = new_program(like=small), tmp_path_factory.mktemp("marks")
    told = Story(program)
    flags = ["--address", cluster, "--set", "stages.pretrain.engine=torch", "--set", f"stages.pretrain.marks={marks}"]

    def submit(*more: str) -> str:
        said = program.run("submit", "small.toml", *flags, *more)
        told.runs.append(program.last_run())
        return said

    told.said["submit"] = submit("--set", "stages.pretrain.fault=rank 0: pause at 7")
    kept = {name: (program.folder / name).read_text() for name in ("small.toml", "faulty.py")}
    for name in kept:
        (program.folder / name).write_text("an edit while the job waits for its turn\n")
    wait_for((marks / "pause-0-7").exists, "step 7")
    # what a rank says goes through its stage's process to the driver, and reaches the journal after the rank's own mark
    wait_for(lambda: any(isinstance(event, StagePoints) for event in program.events()), "word of a step")
    told.said["status"] = program.run("status")
    told.said["stop"] = program.run("stop")
    for name, text in kept.items():
        (program.folder / name).write_text(text)

    submit("--set", "stages.pretrain.fault=rank 0: wait at 12")
    wait_for((marks / "wait-0-12").exists, "step 12")
    driver = Watch(program.store, f"run-{told.runs[1]}").holder()
    assert driver is not None
    os.kill(driver.pid, signal.SIGKILL)
    wait_for(lambda: gone(driver.pid), "the driver's end")
    told.said["killed"] = program.run("status", told.runs[1])

    submit()
    told.said["logs"] = program.run("logs", told.runs[2], "-f")
    told.said["done"] = program.run("status", told.runs[2])
    return told


def test_submit_returns_at_once_and_says_how_to_follow(story: Story, cluster: str) -> None:
    (run, *_) = story.runs
    assert story.said["submit"].splitlines() == [
        f"submitted to {cluster}: {run}",
        f"  gptline status {run}",
        f"  gptline logs {run} -f",
        f"  gptline stop {run}",
    ]


def test_status_names_the_stage_under_way_and_how_far_it_is(story: Story, cluster: str) -> None:
    line = story.said["status"].splitlines()[-1]
    assert re.match(rf"{story.runs[0]}  RUNNING +pretrain at step [1-7] of 30, since 2\S+ \S+, its job at {cluster} is RUNNING$", line)


def test_stop_in_the_middle_of_training_saves_the_step(story: Story) -> None:
    asked, stopping, ended = story.said["stop"].splitlines()
    assert asked == f"run {story.runs[0]}"
    assert stopping == f"{story.runs[0]}: asked to stop; training stages finish their step and save a checkpoint"
    assert ended.startswith(f"{story.runs[0]} ended: KILLED, 3 reused, 1 stopped in ")
    assert "resume with: gptline submit small.toml " in ended
    last = story.program.events(story.runs[0])[-1]
    assert isinstance(last, RunEnded)
    assert last.exit_code == 143
    assert story.program.ended(story.runs[0])["pretrain"].reason == "saved at step 8"


def test_an_edit_after_submit_changes_nothing(story: Story, read_json: Callable[[Path], Any]) -> None:
    folder = story.program.store.root / "runs" / story.runs[0]
    begun, sent = read_json(folder / "run.json"), read_json(folder / "job.json")
    assert begun["snapshot"] == sent["snapshot"]
    assert begun["git"] == sent["options"]["git"]
    assert story.program.status(story.runs[0]) == {
        "documents": "reused",
        "tokenizer": "reused",
        "tokenize": "reused",
        "pretrain": "stopped",
    }


def test_a_driver_that_was_killed_is_said_to_be_gone(story: Story) -> None:
    assert re.match(rf"{story.runs[1]}  KILLED +3 reused, 1 killed.*, its driver is gone", story.said["killed"])


def test_submitting_again_resumes_and_the_log_is_followed_to_the_end(story: Story) -> None:
    assert "pretrain    resume: resumes at step 10 of 30" in story.said["logs"]
    assert re.search(r"^3 reused, 1 made in \d", story.said["logs"], re.MULTILINE)
    assert re.match(rf"{story.runs[2]}  FINISHED +3 reused, 1 made in \S+, ended 2", story.said["done"])


def test_what_a_job_made_a_local_plan_reuses(story: Story) -> None:
    plan = story.program.plan("small.toml", "--set", "stages.pretrain.engine=torch")
    assert {word for word, _ in plan.values()} == {"reuse"}
    assert plan["pretrain"][1] == f"made by run {story.runs[2]}"
    assert story.program.store.verify(story.program.outputs(story.runs[2])["pretrain"]) == []


@pytest.mark.parametrize(
    ("given", "wanted"),
    [("another", "rejects this token; correct it in RAY_AUTH_TOKEN"), ("", "requires a token and none was found")],
)
def test_a_token_that_is_wrong_or_missing_is_told_and_nothing_is_sent(
    story: Story, cluster: str, token: pytest.MonkeyPatch, given: str, wanted: str
) -> None:
    with token.context() as patch:
        patch.delenv("RAY_AUTH_TOKEN_PATH")
        patch.setenv("RAY_AUTH_TOKEN", given)
        said = story.program.run("submit", "small.toml", "--address", cluster, code=3)
    assert f"the cluster at {cluster} {wanted}" in said
    assert story.program.store.runs() == sorted([story.program.store.runs()[0], *story.runs])


def test_where_nothing_listens_nothing_is_written(story: Story) -> None:
    runs = story.program.store.runs()
    said = story.program.run("submit", "small.toml", "--address", "http://127.0.0.1:1", code=3)
    assert "nothing listens at http://127.0.0.1:1 (connection refused)" in said
    assert story.program.store.runs() == runs


def test_a_job_that_dies_before_its_driver_speaks_shows_what_it_printed(story: Story, cluster: str) -> None:
    more = ["--set", "stages.pretrain.resources.ranks=4", "--fresh", "pretrain"]
    said = story.program.run("submit", "small.toml", "--address", cluster, *more)
    (run,) = re.findall(r"status (\S+)", said)
    followed = story.program.run("logs", run, "-f")
    assert f"its job at {cluster} is FAILED, exit code 2" in followed
    assert "stages.pretrain.resources: pretrain asks for 4 ranks" in followed
    assert re.match(rf"{run}  FAILED +its job at {cluster} is FAILED, exit code 2", story.program.run("status", run))
