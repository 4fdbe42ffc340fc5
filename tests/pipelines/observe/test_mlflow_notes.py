"""mlflow_notes.py: the texts that MLflow shows of a run."""

from __future__ import annotations

import pytest

from pipelines.observe.mlflow_notes import run_name, source_name, stage_name
from pipelines.observe.view import RunView
from pipelines.store.events import StageEnded, StagePlanned


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("gptline run configs/small/line.toml", "gptline run line.toml"),
        (
            "gptline run configs/line.toml --set tracking.uri=http://127.0.0.1:5000 --set pretrain.lr=0.1",
            "gptline run line.toml --set tracking.uri=http:∕∕127.0.0.1:5000 --set pretrain.lr=0.1",
        ),
        (
            """gptline run a/line.toml --set 'stages.documents.files=["a/b.txt", "c/d.txt"]'""",
            'gptline run line.toml --set stages.documents.files=["a∕b.txt", "c∕d.txt"]',
        ),
        ("gptline submit line.toml --address http://head:8265/", "gptline submit line.toml --address http:∕∕head:8265∕"),
        ("gptline run line.toml --set data=books/", "gptline run line.toml --set data=books"),
        ("gptline run 'my files/line.toml'", "gptline run line.toml"),
        ("gptline run 'unfinished/line.toml", "gptline run 'unfinished∕line.toml"),
        ("", ""),
    ],
)
def test_the_source_of_a_run_has_no_slash_since_mlflow_shows_only_what_follows_the_last_one(command: str, expected: str) -> None:
    assert source_name(command) == expected
    assert "/" not in source_name(command)


def planned(**reasons: str) -> RunView:
    """A run whose stages have these decisions and reasons: `net="run: lr: 0.1 -> 0.2"`."""
    view = RunView("20261130-201530-line-6415cc")
    for stage, text in reasons.items():
        decision, _, reason = text.partition(": ")
        view.add(StagePlanned(stage=stage, decision=decision, reason=reason))  # type: ignore[arg-type]
    return view


def test_a_run_is_called_by_the_end_of_its_id_and_by_what_made_it_differ() -> None:
    made = "reuse: made by run r1"
    assert run_name(planned(a=made, b="run: lr: 0.1 -> 0.2", c="run: its input b will be rebuilt")) == "6415cc b lr: 0.1 -> 0.2"
    two = planned(a="run: source x.txt changed", b="resume: resumes at step 3 of 9")
    assert run_name(two) == "6415cc a source x.txt changed, and 1 more"
    assert run_name(planned(a="run: not built here before", b="run: not built here before")) == "6415cc 2 stages not built here before"
    assert run_name(planned(a=made, b=made)) == "6415cc all reused"
    assert run_name(RunView("r1")) == "r1"  # nothing is known of it yet
    assert len(run_name(planned(a=f"run: {'x' * 500}"))) == 120


def test_runs_of_one_stage_have_different_names_and_a_reused_one_says_so() -> None:
    view = planned(net="reuse: made by run r1")
    assert stage_name(view, "net") == "net 6415cc"
    view.add(StageEnded(stage="net", status="reused"))
    assert stage_name(view, "net") == "net 6415cc (reused)"
