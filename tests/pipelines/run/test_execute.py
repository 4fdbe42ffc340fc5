"""One stage executed in this process: what it may open, log, publish and use, and what its outcome says."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.events import Points, Progress, StageEvent
from pipelines.plan.config import Resources
from pipelines.plan.environment import versions
from pipelines.run.execute import execute
from pipelines.run.job import Job, Outcome
from pipelines.stage import Source
from pipelines.store.store import Store

HEAD = """
import gc, os, sys
from pipelines.artifacts import Documents, HfCheckpoint, Model, Report, Tokenizer, Tokens
from pipelines.stage import StageContext

COUNTS = {"documents": 1, "bytes": 6}


def report(stage):
    (stage.output / "report.json").write_text("{}")
    return stage.publish(Report)


"""


class Bench:
    """Run one function, given as source text, as a stage."""

    def __init__(self, folder: Path, store: Store) -> None:
        self.folder = folder
        self.store = store

    def run(self, body: str, *, kind: str = "Report", sources: tuple[Source, ...] = (), cpus: int = 1) -> Outcome:
        lines = "".join(f"    {line}\n" for line in body.splitlines())
        (self.folder / "bench.py").write_text(f"{HEAD}def it(stage: StageContext) -> {kind}:\n{lines}")
        sys.modules.pop("gptline_user_bench", None)
        job = Job(
            run="r",
            stage="it",
            uses="./bench.py:it",
            user_folder=self.folder,
            functions={},
            config={},
            inputs={},
            sources=list(sources),
            seed=1,
            store=self.store.root,
            key="k",
            series=1,
            resources=Resources(cpus=cpus),
            identity={},
            inline=True,
        )
        self.events: list[StageEvent] = []
        return execute(job, self.events.append, lambda: False)

    def source(self, text: str) -> Source:
        """A source file that was changed after the plan was made."""
        path = self.folder / "words.txt"
        path.write_text(text)
        return Source("words.txt", path, hashlib.sha256(b"as it was planned").hexdigest())


@pytest.fixture
def bench(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # two bodies of one length within one second would be one to Python
    return Bench(tmp_path, store)


@pytest.mark.parametrize(
    "read",
    [
        "stage.open(stage.sources[0]).read()\ngc.collect()",  # forgotten at once: what its closing raises is dropped
        "file = stage.open(stage.sources[0])\nfile.read(2)",  # still open, and read in part
        "try:\n    with stage.open(stage.sources[0]) as file: file.read()\nexcept Exception:\n    pass",
    ],
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_changed_source_is_noticed_however_it_is_read(bench: Bench, read: str):
    outcome = bench.run(read + "\nreturn report(stage)", sources=(bench.source("changed"),))
    assert outcome.error == "words.txt was changed after this run was planned; run again to read it as it is now"
    assert bench.store.digests() == []


def test_a_stage_may_publish_while_a_source_is_open(bench: Bench):
    planned = bench.source("as it was planned")
    assert bench.run("with stage.open(stage.sources[0]) as file:\n    file.read(2)\n    return report(stage)", sources=(planned,)).output


FILES = "for name in {}: (stage.output / name).write_text('x')\n"
DOCUMENTS = FILES.format(("train.jsonl", "held_out.jsonl"))
TOKENS = FILES.format(("train.bin", "held_out.bin", "tokenizer.json"))


@pytest.mark.parametrize(
    ("kind", "body", "fault"),
    [
        (
            "Documents",
            DOCUMENTS + "return stage.publish(Documents)",
            "documents without metadata train; expected, for example, "
            "stage.publish(Documents, train={'documents': 3, 'bytes': 120}, held_out=...)",
        ),
        (
            "Documents",
            DOCUMENTS + "return stage.publish(Documents, train=COUNTS, held_out={'documents': 1})",
            "documents with metadata held_out = {'documents': 1}; expected, for example, "
            "stage.publish(Documents, held_out={'documents': 1, 'bytes': 40}, train=...)",
        ),
        (
            "Documents",
            FILES.format(("train.jsonl",)) + "return stage.publish(Documents, train=COUNTS, held_out=COUNTS)",
            "documents without held_out.jsonl: write it into stage.output; Documents holds train.jsonl, held_out.jsonl",
        ),
        (
            "Tokens",
            TOKENS + "return stage.publish(Tokens, dtype='uint16', tokenizer='6b1f')",
            "tokens without metadata vocab_size; expected, for example, stage.publish(Tokens, vocab_size=4096, dtype=..., tokenizer=...)",
        ),
        (
            "Tokenizer",
            FILES.format(("tokenizer.json",)) + "return stage.publish(Tokenizer, vocab_size='many')",
            "tokenizer with metadata vocab_size = 'many'; expected, for example, stage.publish(Tokenizer, vocab_size=4096)",
        ),
        (
            "Model",
            FILES.format(("model.safetensors", "tokenizer.json")) + "return stage.publish(Model, role='policy', tokenizer='6b1f')",
            "model without config.json: write it into stage.output; Model holds model.safetensors, config.json, tokenizer.json",
        ),
        (
            "Report",
            FILES.format(("figures.json",)) + "return stage.publish(Report)",
            "report without report.json: write it into stage.output; Report holds report.json",
        ),
        (
            "HfCheckpoint",
            FILES.format(("model.safetensors",)) + "return stage.publish(HfCheckpoint)",
            "hf_checkpoint without config.json: write it into stage.output; HfCheckpoint holds config.json",
        ),
    ],
)
def test_an_artifact_must_have_what_its_type_requires(bench: Bench, kind: str, body: str, fault: str):
    assert bench.run(body, kind=kind).error == f"./bench.py:it publishes {fault}"
    assert bench.store.digests() == []


def test_an_artifact_may_have_more_than_its_type_requires(bench: Bench):
    body = DOCUMENTS + "(stage.output / 'notes.txt').write_text('n')\n"
    outcome = bench.run(body + "return stage.publish(Documents, train=COUNTS, held_out=COUNTS, language='zh')", kind="Documents")
    assert outcome.output is not None
    assert bench.store.artifact(outcome.output).metadata["language"] == "zh"


@pytest.mark.parametrize("call", ["stage.log(1, {'Loss (nats)': 1.0})", "stage.figure('Loss (nats)', 1.0)"])
def test_a_metric_name_is_checked_where_it_is_logged(bench: Bench, call: str):
    error = bench.run(call + "\nreturn report(stage)").error
    assert error is not None
    assert error.startswith("ValueError: metric name 'Loss (nats)': expected area/name_unit in lower case, e.g. 'time/step_s'")


def test_a_stage_uses_as_many_threads_as_it_has_cpus_and_restores_the_number(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("RAYON_NUM_THREADS", raising=False)
    set_threads = []
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(get_num_threads=lambda: 5, set_num_threads=set_threads.append))
    body = "for name in ('OMP', 'RAYON'): stage.figure(f'system/{name.lower()}', int(os.environ[f'{name}_NUM_THREADS']))\n"
    assert bench.run(body + "return report(stage)", cpus=3).figures == {"system/omp": 3, "system/rayon": 3}
    assert set_threads == [3, 5]
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert "RAYON_NUM_THREADS" not in os.environ


def test_a_failed_stage_restores_the_threads_and_torch_is_not_loaded_for_that(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    outcome = bench.run("assert os.environ['OMP_NUM_THREADS'] == '3'\nraise KeyError('torch' in sys.modules)", cpus=3)
    assert str(outcome.error).startswith("KeyError: False")
    assert os.environ["OMP_NUM_THREADS"] == "7"


def test_an_outcome_says_where_the_stage_ran(bench: Bench):
    for body in ("return report(stage)", "raise KeyError('no')"):
        outcome = bench.run(body)
        assert (outcome.host, outcome.pid, outcome.versions) == (socket.gethostname(), os.getpid(), versions())


def test_numpy_numbers_become_plain_numbers_in_what_a_stage_reports(bench: Bench):
    body = "import numpy as np\nstage.progress(np.int64(3), np.float32(4.5), 'rows')\nstage.log(np.int64(2), {'eval/x': np.float32(0.5)})\n"
    outcome = bench.run(body + "stage.figure('eval/y', np.int64(7))\nreturn report(stage)")
    progress, points = bench.events
    assert isinstance(progress, Progress)
    assert json.dumps([progress.done, progress.total, progress.unit]) == '[3, 4.5, "rows"]'
    assert isinstance(points, Points)
    assert json.dumps(points.curves["eval/x"][0][:2]) == "[2, 0.5]"
    assert json.dumps(outcome.figures) == '{"eval/y": 7.0}'
