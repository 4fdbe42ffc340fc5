"""A run as a job on an existing cluster: submitted, followed, stopped, killed, and resumed by submitting it again."""

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
    """The address of a head node whose job server requires a token."""
    port, dashboard, agent, client = free_ports(4)
    folder = Path(tempfile.mkdtemp(prefix="ray"))  # short, for Ray's sockets; separate, since other heads may run here
    words = [f"--port={port}", f"--temp-dir={folder}", "--include-dashboard=true", "--dashboard-host=127.0.0.1"]
    words += [f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"]
    try:
        with ray_head(folder / "log", {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}, *words):
            yield f"http://127.0.0.1:{dashboard}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def token(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pytest.MonkeyPatch]:
    """Give programs the cluster's token in a file, and a RAY_ADDRESS that leads nowhere, which they should ignore."""
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
    """Three submissions of one file: one stopped at step 7, one whose driver is killed at step 12, and one that finishes."""

    program: Any
    runs: list[str] = field(default_factory=list)
    printed: dict[str, str] = field(default_factory=dict)


@pytest.fixture(scope="module")
def story(small: Any, new_program: Any, wait_for: Any, gone: Any, cluster: str, token: object, tmp_path_factory: Any) -> Story:
    program, marks = new_program(like=small), tmp_path_factory.mktemp("marks")
    story = Story(program)
    flags = ["--address", cluster, "--set", "stages.pretrain.engine=torch", "--set", f"stages.pretrain.marks={marks}"]

    def submit(*more: str) -> str:
        output = program.run("submit", "small.toml", *flags, *more)
        story.runs.append(program.last_run())
        return output

    story.printed["submit"] = submit("--set", "stages.pretrain.fault=rank 0: pause at 7")
    kept = {name: (program.folder / name).read_text() for name in ("small.toml", "faulty.py")}
    for name in kept:
        (program.folder / name).write_text("an edit while the job waits to start\n")
    wait_for((marks / "pause-0-7").exists, "step 7")
    # a rank's points go through its stage's process and the driver, so they reach the journal after the rank's mark appears
    wait_for(lambda: any(isinstance(event, StagePoints) for event in program.events()), "points of a step")
    story.printed["status"] = program.run("status")
    story.printed["stop"] = program.run("stop")
    for name, text in kept.items():
        (program.folder / name).write_text(text)

    submit("--set", "stages.pretrain.fault=rank 0: wait at 12")
    wait_for((marks / "wait-0-12").exists, "step 12")
    driver = Watch(program.store, f"run-{story.runs[1]}").holder()
    assert driver is not None
    os.kill(driver.pid, signal.SIGKILL)
    wait_for(lambda: gone(driver.pid), "the driver to end")
    story.printed["killed"] = program.run("status", story.runs[1])

    submit()
    story.printed["logs"] = program.run("logs", story.runs[2], "-f")
    story.printed["done"] = program.run("status", story.runs[2])
    return story


def test_submit_returns_at_once_and_says_how_to_follow(story: Story, cluster: str) -> None:
    (run, *_) = story.runs
    assert story.printed["submit"].splitlines() == [
        f"submitted to {cluster}: {run}",
        f"  gptline status {run}",
        f"  gptline logs {run} -f",
        f"  gptline stop {run}",
    ]


def test_status_names_the_running_stage_and_its_step(story: Story, cluster: str) -> None:
    line = story.printed["status"].splitlines()[-1]
    assert re.match(rf"{story.runs[0]}  RUNNING +pretrain at step [1-7] of 30, since 2\S+ \S+, its job at {cluster} is RUNNING$", line)


def test_stop_in_the_middle_of_training_saves_the_step(story: Story) -> None:
    named, stopping, ended = story.printed["stop"].splitlines()
    assert named == f"run {story.runs[0]}"
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


def test_status_reports_a_killed_driver_as_gone(story: Story) -> None:
    assert re.match(rf"{story.runs[1]}  KILLED +3 reused, 1 killed.*, its driver is gone", story.printed["killed"])


def test_submitting_again_resumes_and_the_log_is_followed_to_the_end(story: Story) -> None:
    assert "pretrain    resume: resumes at step 10 of 30" in story.printed["logs"]
    assert re.search(r"^3 reused, 1 made in \d", story.printed["logs"], re.MULTILINE)
    assert re.match(rf"{story.runs[2]}  FINISHED +3 reused, 1 made in \S+, ended 2", story.printed["done"])


def test_a_local_plan_reuses_what_a_job_built(story: Story) -> None:
    plan = story.program.plan("small.toml", "--set", "stages.pretrain.engine=torch")
    assert {decision for decision, _ in plan.values()} == {"reuse"}
    assert plan["pretrain"][1] == f"made by run {story.runs[2]}"
    assert story.program.store.verify(story.program.outputs(story.runs[2])["pretrain"]) == []


@pytest.mark.parametrize(
    ("given", "expected"),
    [("another", "rejects this token; correct it in RAY_AUTH_TOKEN"), ("", "requires a token and none was found")],
)
def test_a_wrong_or_missing_token_is_reported_and_nothing_is_sent(
    story: Story, cluster: str, token: pytest.MonkeyPatch, given: str, expected: str
) -> None:
    with token.context() as patch:
        patch.delenv("RAY_AUTH_TOKEN_PATH")
        patch.setenv("RAY_AUTH_TOKEN", given)
        output = story.program.run("submit", "small.toml", "--address", cluster, code=3)
    assert f"the cluster at {cluster} {expected}" in output
    assert story.program.store.runs() == sorted([story.program.store.runs()[0], *story.runs])


def test_an_address_where_nothing_listens_is_refused_and_nothing_is_written(story: Story) -> None:
    runs = story.program.store.runs()
    output = story.program.run("submit", "small.toml", "--address", "http://127.0.0.1:1", code=3)
    assert "nothing listens at http://127.0.0.1:1 (connection refused)" in output
    assert story.program.store.runs() == runs


def test_the_log_of_a_job_that_fails_before_its_driver_starts_is_what_it_printed(story: Story, cluster: str) -> None:
    more = ["--set", "stages.pretrain.resources.ranks=4", "--fresh", "pretrain"]
    output = story.program.run("submit", "small.toml", "--address", cluster, *more)
    (run,) = re.findall(r"status (\S+)", output)
    followed = story.program.run("logs", run, "-f")
    assert f"its job at {cluster} is FAILED, exit code 2" in followed
    assert "stages.pretrain.resources: pretrain asks for 4 ranks" in followed
    assert re.match(rf"{run}  FAILED +its job at {cluster} is FAILED, exit code 2", story.program.run("status", run))
