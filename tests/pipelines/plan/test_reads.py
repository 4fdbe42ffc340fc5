"""A plan reads as much of a store with 10,000 actions as of one with 100."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from pipelines.plan.config import load
from pipelines.plan.environment import ROOT
from pipelines.plan.graph import Graph, build
from pipelines.plan.planner import Planner
from pipelines.plan.resolve import resolve
from pipelines.store.store import Store

TOML = """
pipeline = "read"

[stages.documents]
uses = "ingest"
source = "text"
unit = "line"
files = ["a.txt"]

[stages.more]
uses = "ingest"
source = "text"
unit = "paragraph"
files = ["a.txt"]

[stages.tokenizer]
algorithm = "bytes"
inputs = { documents = ["documents"] }

[stages.evaluate]
inputs = { model = "model:other@newest", documents = ["documents"] }
"""
MODEL = "e" * 64
OTHERS = """
[stages.of_digest]
uses = "evaluate"
inputs = { model = "sha256:eeeeeeee", baseline = "sha256:WHOLE", documents = ["sha256:DOCUMENTS"] }

[stages.of_folder]
uses = "evaluate"
inputs = { model = "hf:gpt2", documents = ["documents"] }
""".replace("WHOLE", MODEL).replace("DOCUMENTS", "b" * 64)
GPT2 = {"model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 32, "vocab_size": 300}
FOLDER = {"config.json": json.dumps(GPT2), "model.safetensors": "weights", "tokenizer.json": "{}"}


class CountingBackend:
    """An in-memory backend that counts its reads, and the names that a folder would have to be searched for."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.reads: Counter[str] = Counter()

    def get(self, name: str) -> bytes | None:
        self.reads["get"] += 1
        return self.objects.get(name)

    def put_if_absent(self, name: str, data: bytes) -> bool:
        return self.objects.setdefault(name, data) is data

    def put(self, name: str, data: bytes | Path) -> None:
        self.objects[name] = data if isinstance(data, bytes) else data.read_bytes()

    def list(self, prefix: str) -> list[str]:
        found = sorted(name for name in self.objects if name.startswith(prefix))
        self.reads["list"] += 1
        beside = prefix[: prefix.rfind("/") + 1]
        self.reads["names searched"] += len({name[len(beside) :].partition("/")[0] for name in self.objects if name.startswith(beside)})
        return found

    def delete(self, name: str) -> None:
        self.objects.pop(name, None)


def add_action(backend: CountingBackend, key: str, stage: str, output: str, artifact: str, **metadata: str) -> None:
    """Write an action's record and its artifact, as an earlier run would have left them."""
    action = {
        "schema": 1, "key": key, "number": 1, "pipeline": "read", "stage": stage, "kind": "ingest", "run": "r", "leaves": {"seed": 1},
        "inputs": {}, "output": output, "output_kind": artifact, "started_ms": 1, "seconds": 1.0, "host": "h", "user": "u", "pid": 1,
    }  # fmt: skip
    backend.put(f"actions/{key}/000001.json", json.dumps(action).encode())
    manifest = {"schema": 1, "kind": artifact, "files": [], "metadata": metadata}
    backend.put(f"artifacts/{output}/manifest.json", json.dumps(manifest).encode())


def filled(folder: Path, graph: Graph, others: int) -> tuple[Store, CountingBackend]:
    """A store with `others` actions of other pipelines, in which `documents` is built, `more` had another key, and the rest is new."""
    store = Store(folder / "store")
    store.backend = backend = CountingBackend()
    for number in range(others):
        add_action(backend, f"{number:064x}", "documents", f"{number + 2**32:064x}", "documents")
        backend.put(f"latest/other{number}/documents.json", json.dumps({"key": f"{number:064x}", "number": 1}).encode())
    (documents, *_) = Planner(graph_without_model(folder), store, ROOT).plan()
    assert documents.key is not None
    add_action(backend, documents.key, "documents", "d" * 64, "documents")
    add_action(backend, "c" * 64, "more", "b" * 64, "documents")
    backend.put("latest/read/more.json", json.dumps({"key": "c" * 64, "number": 1}).encode())
    add_action(backend, "f" * 64, "pretrain", MODEL, "model", role="policy", tokenizer="1" * 64)
    backend.put("aliases/other/newest.json", json.dumps({"digest": MODEL}).encode())
    backend.reads.clear()
    return store, backend


def graph_without_model(folder: Path) -> Graph:
    (folder / "first.toml").write_text(TOML.partition("[stages.evaluate]")[0])
    return build(load(folder / "first.toml"))


@pytest.fixture
def graph(tmp_path: Path) -> Graph:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "read.toml").write_text(TOML)
    return build(load(tmp_path / "read.toml"))


def test_a_plan_reads_no_more_of_10000_actions_than_of_100(graph: Graph, tmp_path: Path):
    reads = {}
    for others in (100, 10_000):
        store, backend = filled(tmp_path, graph, others)
        plan = {each.stage: each.action for each in Planner(graph, store, ROOT).plan()}
        assert plan == {"documents": "reuse", "more": "run", "tokenizer": "run", "evaluate": "run"}
        reads[others] = dict(backend.reads)
    assert reads[100] == reads[10_000]
    assert reads[100]["names searched"] < 20


def folder_of_gpt2(folder: Path) -> Path:
    (folder / "gpt2").mkdir(exist_ok=True)
    for name, content in FOLDER.items():
        (folder / "gpt2" / name).write_text(content)
    return folder / "gpt2"


def test_inputs_given_as_digests_and_folders_cost_no_more_in_a_store_of_10000_actions(tmp_path: Path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    folder_of_gpt2(tmp_path)
    (tmp_path / "read.toml").write_text((TOML + OTHERS).replace('"sha256:eeeeeeee"', f'"sha256:{MODEL}"'))
    graph = build(load(tmp_path / "read.toml"))
    reads = {}
    for others in (100, 10_000):
        store, backend = filled(tmp_path, graph, others)
        plan = {each.stage: each.action for each in Planner(graph, store, ROOT).plan()}
        assert (plan["of_digest"], plan["hf-gpt2"], plan["of_folder"]) == ("run", "run", "run")
        reads[others] = dict(backend.reads)
    assert reads[100] == reads[10_000]
    assert reads[100]["names searched"] < 20


def test_a_shortened_digest_is_looked_up_among_the_names_of_artifacts_and_opens_one_of_them(tmp_path: Path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    folder_of_gpt2(tmp_path)
    (tmp_path / "read.toml").write_text(TOML + OTHERS)
    graph = build(load(tmp_path / "read.toml"))
    reads = {}
    for others in (100, 10_000):
        store, backend = filled(tmp_path, graph, others)
        Planner(graph, store, ROOT).plan()
        reads[others] = backend.reads
    assert reads[10_000]["names searched"] - reads[100]["names searched"] == 9_900  # one listing of the folder of artifacts
    assert (reads[100]["get"], reads[100]["list"]) == (reads[10_000]["get"], reads[10_000]["list"])


def import_gpt2(store: Store, backend: CountingBackend, folder: Path) -> Path:
    """The folder of a GPT-2 that was imported into the store, whose index of actions is complete."""
    path = folder_of_gpt2(folder)
    content = store.content_sha256([path / name for name in FOLDER])
    leaves = {f"source.gpt2/{name}": sha256 for name, sha256 in zip(FOLDER, content, strict=True)}
    key = "a" * 64
    add_action(backend, key, "hf-gpt2", MODEL, "model", role="policy", tokenizer="1" * 64)
    record = json.loads(backend.objects[f"actions/{key}/000001.json"]) | {"kind": "import_hf", "leaves": leaves}
    backend.put(f"actions/{key}/000001.json", json.dumps(record).encode())
    backend.put("index/complete.json", b'{"schema": 1}')
    store.index.add(store.action(key, 1))
    return path


@pytest.mark.parametrize("reference", ["model:other@newest", f"sha256:{MODEL}", MODEL, "hf:"])
def test_resolving_a_reference_reads_no_more_of_10000_actions_than_of_100(graph: Graph, tmp_path: Path, reference: str):
    reads = {}
    for others in (100, 10_000):
        store, backend = filled(tmp_path, graph, others)
        named = f"hf:{import_gpt2(store, backend, tmp_path)}" if reference == "hf:" else reference
        backend.reads.clear()
        assert resolve(store, named) == MODEL
        reads[others] = dict(backend.reads)
    assert reads[100] == reads[10_000]
