"""Faults from outside: each costs no more than it must, and is reported in a few sentences."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

from pipelines.store.events import RunEnded

pytestmark = pytest.mark.slow

BRANCH = """
[stages.count]
uses = "./faulty.py:count"
inputs = { documents = "documents" }

[stages.export]
inputs = { model = "pretrain" }
"""
COPY = """
[stages.copy]
uses = "./faulty.py:copy"
inputs = { documents = "documents" }
"""


@pytest.fixture
def program(small, new_program) -> Any:
    """A program in a new folder with `small.toml`, whose stages up to its tokens are built."""
    return new_program(like=small)


@pytest.fixture
def marks(tmp_path) -> Path:
    return tmp_path


def command(fault: str, marks: Path, *more: str) -> tuple[str, ...]:
    return ("run", "small.toml", "--set", f"stages.pretrain.fault={fault}", "--set", f"stages.pretrain.marks={marks}", *more)


def resume_command(output: str) -> list[str]:
    (printed,) = re.findall(r"resume with: gptline (.*)", output)
    return shlex.split(printed)


def written(program: Any) -> list[Path]:
    """Every path in the store except the cache of the sources' digests."""
    return sorted(path for path in program.store.root.rglob("*") if "cache" not in path.parts)


@pytest.fixture(scope="module")
def inline_undisturbed(small, new_program) -> Any:
    program = new_program(like=small)
    program.run("run", "small.toml", "--inline")
    return program


def test_a_rank_that_raises_fails_its_stage_once_and_the_other_branch_finishes(program, marks):
    toml = program.folder / "small.toml"
    toml.write_text(toml.read_text() + BRANCH)
    output = program.run(*command("rank 1: raise at 3", marks, "--set", "stages.pretrain.resources.ranks=2"), code=1)
    assert program.status() == {
        "documents": "reused",
        "tokenizer": "reused",
        "tokenize": "reused",
        "pretrain": "failed",
        "count": "done",
        "export": "blocked",
    }
    error = program.ended()["pretrain"].error
    assert re.fullmatch(
        r"pretrain: rank 1 \(pid \d+, node \S+\) raised at step [0123]: ZeroDivisionError: the data has no end.*", error, re.DOTALL
    )
    assert "start 2" not in output  # a retry would fail the same way
    assert "Traceback" not in output
    assert "pretrain failed; the other results are kept. Fix the cause, then resume with: gptline run small.toml" in output
    assert 'raise ZeroDivisionError("the data has no end")' in (
        program.store.root / "runs" / program.last_run() / "pretrain.traceback.txt"
    ).read_text(encoding="utf-8")
    assert resume_command(output)[:2] == ["run", "small.toml"]


def test_more_ranks_than_the_machine_has_are_refused_at_once_and_nothing_is_written(program):
    before = written(program)
    cpus = len(os.sched_getaffinity(0))
    arguments = ("--set", f"stages.pretrain.resources.ranks={cpus + 1}", "--set", f"stages.pretrain.global_batch_size={cpus + 1}")
    output = program.run("run", "small.toml", *arguments, code=2)
    assert f"stages.pretrain.resources: asks for {cpus + 1} ranks of 1 CPU" in output
    assert "starting Ray" not in output
    assert written(program) == before


def test_labels_that_no_node_has_are_refused_before_the_run_begins(program):
    runs = program.store.runs()
    output = program.run("run", "small.toml", "--set", 'stages.pretrain.resources.labels={tier="a100"}', code=2)
    assert "stages.pretrain.resources: pretrain asks for 1 CPU and labels {'tier': 'a100'}, but no node of the cluster has that" in output
    assert program.store.runs() == runs


def test_the_second_of_two_runs_waits_and_an_edit_to_the_loss_meanwhile_changes_neither_result_nor_record(
    small, new_program, copied_code, one_rank_undisturbed, wait_for, marks
):
    program = new_program(copied_code, like=small)
    arguments = command("rank 0: wait at 5", marks)
    first = program.start(*arguments)
    wait_for((marks / "wait-0-5").exists, "step 5", first)
    first_run = program.last_run()
    second = program.start(*arguments)
    wait_for(lambda: program.waits_for(first_run), "the second run to wait", second)
    losses = copied_code / "gpt" / "losses.py"
    before = losses.read_text(encoding="utf-8")
    losses.write_text(before.replace(".sum() / global_count", ".sum() / global_count * 2.0"), encoding="utf-8")
    assert losses.read_text(encoding="utf-8") != before
    (marks / "go").touch()
    program.finish(first)
    output = program.finish(second)

    assert program.status(first_run)["pretrain"] == "done"
    assert program.status()["pretrain"] == "reused"
    assert re.search(rf"waiting for \S+ on \S+, process {first.pid}, run {first_run}, which is building it", output)
    assert program.outputs(first_run)["pretrain"] == one_rank_undisturbed.outputs()["pretrain"]
    name = "code.gpt.losses:lm_loss"
    assert program.action("pretrain", first_run).leaves[name] == one_rank_undisturbed.action("pretrain").leaves[name]
    assert program.plan("small.toml")["pretrain"] == ("run", "code of gpt.losses:lm_loss changed")
    losses.write_text(before, encoding="utf-8")
    assert program.plan("small.toml")["pretrain"][0] == "reuse"


def test_a_waiting_run_takes_over_when_the_first_is_killed_and_sync_ends_the_first(program, inline_undisturbed, wait_for, marks):
    arguments = command("rank 0: wait at 5", marks, "--inline")
    first = program.start(*arguments)
    wait_for((marks / "wait-0-5").exists, "step 5", first)
    first_run = program.last_run()
    second = program.start(*arguments)
    wait_for(lambda: program.waits_for(first_run), "the second run to wait", second)
    first.kill()
    output = program.finish(second)
    assert "resume: resumes at step 5 of 30" in output
    assert program.outputs()["pretrain"] == inline_undisturbed.outputs()["pretrain"]
    assert f"{first_run}  ended as KILLED: its driver is gone" in program.run("sync", code=3)
    last = program.events(first_run)[-1]
    assert isinstance(last, RunEnded)
    assert last.status == "KILLED"


def test_sigterm_saves_a_checkpoint_exits_with_143_and_prints_the_command_that_resumes(program, inline_undisturbed, wait_for, marks):
    process = program.start(*command("rank 0: pause at 7", marks, "--inline"))
    wait_for((marks / "pause-0-7").exists, "step 7", process)
    process.terminate()
    output = program.finish(process, code=143)
    assert program.status()["pretrain"] == "stopped"
    assert "resume: resumes at step 8 of 30" in program.run(*resume_command(output))
    assert program.outputs()["pretrain"] == inline_undisturbed.outputs()["pretrain"]


def test_rerun_executes_one_stage_again_and_reuses_what_follows_if_its_output_is_unchanged(one_rank_undisturbed, new_program):
    program = new_program(like=one_rank_undisturbed)
    output = program.run("rerun", "small.toml", "tokenizer")
    assert "tokenizer   run: rerun requested" in output
    assert program.status() == {"documents": "reused", "tokenizer": "done", "tokenize": "reused", "pretrain": "reused"}
    assert (program.action("tokenizer").number, program.action("tokenizer").forced) == (2, True)
    assert program.outputs() == one_rank_undisturbed.outputs()


def test_stop_reaches_an_inline_training_and_newest_keeps_the_finished_model(program, wait_for, marks):
    toml = program.folder / "small.toml"
    head, pretrain, settings = toml.read_text().partition("[stages.pretrain]")
    toml.write_text(head + pretrain + settings + "\n[stages.further]" + settings.replace("dropout = 0.1", "dropout = 0.2"))
    program.run("run", "small.toml", "--inline")
    finished = program.outputs()["further"]
    assert program.store.alias("small", "newest") == finished
    faults = [f"stages.{stage}.{setting}" for stage in ("pretrain", "further") for setting in ("lr=2e-3", f"marks={marks}")]
    sets = [word for each in [*faults, "stages.further.fault=rank 0: pause at 7"] for word in ("--set", each)]
    process = program.start("run", "small.toml", "--inline", *sets)
    wait_for((marks / "pause-0-7").exists, "step 7", process)
    run = program.last_run()
    assert run in program.run("stop", run)
    output = program.finish(process, code=143)
    assert (program.status()["pretrain"], program.status()["further"]) == ("done", "stopped")
    assert "saved at step 8" in output
    assert program.store.alias("small", "newest") == finished


def test_a_second_ctrl_c_stops_at_once_and_keeps_the_last_checkpoint(program, wait_for, marks):
    process = program.start(*command("rank 0: wait at 7", marks, "--inline"))
    wait_for((marks / "wait-0-7").exists, "step 7", process)
    process.send_signal(signal.SIGINT)
    wait_for((marks / "asked-0-7").exists, "the stop request to reach a step that never ends", process)
    process.send_signal(signal.SIGINT)
    output = program.finish(process, code=130)
    assert "Traceback" not in output
    assert program.plan("small.toml", "--set", "stages.pretrain.engine=torch")["pretrain"] == ("resume", "resumes at step 5 of 30")


def test_a_kill_during_a_publish_leaves_no_half_artifact(program, marks):
    toml = program.folder / "small.toml"
    toml.write_text(toml.read_text() + COPY)
    arguments = ("run", "small.toml", "--inline", "--until", "copy", "--set", f"stages.copy.marks={marks}")
    program.run(*arguments, code=-signal.SIGKILL)
    assert (marks / "killed-publishing").exists()
    artifacts = program.store.root / "artifacts"
    half = [folder for folder in artifacts.iterdir() if not (folder / "manifest.json").exists()]
    assert len(half) == 1  # some of its files exist, but without a manifest it is no artifact
    assert half[0].name not in program.store.digests()
    output = program.run(*arguments)
    assert "copy        run: not built here before" in output
    assert program.outputs()["copy"] == half[0].name
    assert program.store.verify(half[0].name) == []
    assert list((program.store.root / "tmp").iterdir()) == []


def test_an_unreachable_mlflow_is_reported_once_and_sync_delivers_each_point_once(program, marks):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening, so no other process can serve there
        uri = f"http://127.0.0.1:{taken.getsockname()[1]}"
        output = program.run("run", "small.toml", "--inline", "--set", f"tracking.uri={uri}")
    assert program.status()["pretrain"] == "done"
    assert output.count(f"MLflow {uri} can't be reached (connection refused): what happens is kept in the run's journal") == 1

    from mlflow import MlflowClient

    for _ in ("delivered", "nothing left to deliver"):
        program.run("sync", "--tracking", "sqlite")  # instead of the unreachable one
    client = MlflowClient(f"sqlite:///{program.store.root}/mlflow.db")
    experiment = client.get_experiment_by_name("small")
    tag = f"tags.`gptline.run` = '{program.last_run()}'"
    (pretrain,) = client.search_runs([experiment.experiment_id], f"{tag} AND tags.`gptline.stage` = 'pretrain'")
    assert pretrain.info.status == "FINISHED"
    assert [point.step for point in client.get_metric_history(pretrain.info.run_id, "train/loss")] == list(range(1, 31))
