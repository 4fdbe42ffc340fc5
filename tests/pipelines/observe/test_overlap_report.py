"""`gptline overlap` reports what one stage holds out and another trains on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.observe.overlap_report import overlap_lines, training_readers
from pipelines.plan.config import load
from pipelines.plan.graph import ROOT, Graph, build
from pipelines.plan.planner import Planner
from pipelines.stage import StageFailure
from pipelines.store.store import Action, Store

PIPELINE = """
pipeline = "p"

[stages.documents]
uses = "ingest"
source = "json"
files = ["documents.jsonl"]

[stages.tokenizer]
inputs = { documents = "documents" }
algorithm = "bytes"

[stages.tokenize]
inputs = { documents = "documents", tokenizer = "tokenizer" }

[stages.pretrain]
inputs = { tokens = "tokenize" }
preset = "gpt2-nano"
steps = 10
global_batch_size = 8
lr = 1e-3

[stages.questions]
uses = "prompts"
source = "json"
files = ["questions.jsonl"]

[stages.evaluate]
inputs = { model = "pretrain", questions = "questions" }
"""
PROBLEM = "Write a function that returns the larger of two numbers."


@pytest.fixture
def graph(tmp_path: Path) -> Graph:
    (tmp_path / "p.toml").write_text(PIPELINE)
    for name in ("documents.jsonl", "questions.jsonl"):
        (tmp_path / name).write_text("{}\n")
    return build(load(tmp_path / "p.toml"))


def make(graph: Graph, store: Store, stage: str, train: list[Any], held_out: list[Any]) -> None:
    """Publish records as the output of a stage."""
    folder = store.new_folder()
    for split, records in (("train", train), ("held_out", held_out)):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    kind = graph.stages[stage].kind.output.kind
    decision = next(each for each in Planner(graph, store, ROOT).plan() if each.stage == stage)
    output = store.publish(folder, kind, {"train": {}, "held_out": {}})
    what: dict[str, Any] = {"pipeline": "p", "stage": stage, "kind": kind, "leaves": decision.leaves, "inputs": {}}
    where: dict[str, Any] = {"run": "r", "started_ms": 1, "seconds": 1.0, "host": "h", "user": "u", "pid": 1}
    store.record(Action(key=decision.key or "", output=output.digest, output_kind=kind, **what, **where))


def test_a_held_out_question_inside_a_pretraining_document_is_reported(graph: Graph, store: Store):
    make(graph, store, "documents", [{"text": f"{PROBLEM}\n\nmax(a, b)"}], [])
    questions = [{"prompt": [{"role": "user", "content": question}]} for question in (PROBLEM, "Why?")]
    make(graph, store, "questions", [], questions)
    assert overlap_lines(graph, store) == [
        "questions: 1 of its 2 held-out records (50.0%) are in the training records of documents, "
        "which pretrain reads (0 as a whole, 1 inside another text)",
        f"    {PROBLEM!r}",
    ]


def test_without_an_overlap_it_says_what_was_compared_and_what_is_missing(graph: Graph, store: Store):
    make(graph, store, "documents", [{"text": "one"}], [{"text": "two"}])
    assert overlap_lines(graph, store) == [
        "documents: none of its 1 held-out records is in the training records of documents",
        "not compared, since they are not built yet: questions",
    ]


def test_before_the_first_run_there_is_nothing_to_compare(graph: Graph, store: Store):
    with pytest.raises(StageFailure, match="no stage's records exist yet"):
        overlap_lines(graph, store)


def test_the_records_that_a_training_stage_reads_through_others_are_its_own(graph: Graph):
    assert training_readers(graph) == {"documents": ["pretrain"]}
