"""What a plan costs on a store of 10,000 actions, beside the same plan on one of 100.

    python -m benchmarks.plan_store [--rounds 15]

Both stores hold what other pipelines left (records, artifacts, index, runs) and the same few results of the pipeline that is planned: some
stages are reused, some run, and inputs are given as `sha256:` digests, whole and shortened, as `model:NAME@newest` and as an `hf:` folder.
A round reads the pipeline file and plans it once on each store, in one process; rounds alternate (ABBA), and the ratio is that of the
medians, with a bootstrap interval. The first plan of a process, which parses all code, doesn't count.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import report
from pipelines.observe.plan_rows import plan_lines
from pipelines.plan.config import load
from pipelines.plan.environment import ROOT
from pipelines.plan.graph import build
from pipelines.plan.planner import Decision, Planner
from pipelines.store.action import Action
from pipelines.store.store import Store

GOAL = 1 / 1.5
ACTIONS_PER_RUN = 10
GPT2 = {"model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 32, "vocab_size": 300}
PIPELINE = """
pipeline = "planned"

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
inputs = {{ documents = ["documents", "more"] }}

[stages.tokenize]
inputs = {{ documents = ["documents", "more"], tokenizer = "tokenizer" }}

[stages.pretrain]
preset = "gpt2-nano"
steps = 2
global_batch_size = 4
lr = 1e-3
inputs = {{ tokens = ["tokenize"] }}

[stages.of_whole_digest]
uses = "evaluate"
inputs = {{ model = "sha256:{model}", documents = ["documents"] }}

[stages.of_short_digest]
uses = "evaluate"
inputs = {{ model = "sha256:{short}", documents = ["documents"] }}

[stages.of_alias]
uses = "evaluate"
inputs = {{ model = "model:other@newest", documents = ["documents"] }}

[stages.of_folder]
uses = "evaluate"
inputs = {{ model = "hf:gpt2", documents = ["documents"] }}
"""


def digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def write(path: Path, content: bytes = b"") -> None:
    """Without the store's fsync of every file, which would take minutes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def add_action(store: Store, pipeline: str, stage: str, key: str, run: str, artifact: str = "documents", **metadata: str) -> str:
    """Write an action's record, its artifact and its index, as a run leaves them; the artifact's digest."""
    output, given = digest_of(f"output of {key}"), digest_of(f"input of {key}")
    action = Action(
        key=key, number=1, pipeline=pipeline, stage=stage, kind="ingest", run=run, leaves={"seed": 1}, inputs={"documents": [given]},
        output=output, output_kind=artifact, started_ms=1, seconds=1.0, host="h", user="u", pid=1,
    )  # fmt: skip
    write(store.root / f"actions/{key}/000001.json", action.model_dump_json().encode())
    manifest = {"schema": 1, "kind": artifact, "files": [], "metadata": metadata}
    write(store.artifact_folder(output) / "manifest.json", json.dumps(manifest).encode())
    for entry in (f"output/{output}", f"input/{given}"):
        write(store.root / f"index/{entry}/{key}")
    write(store.root / f"latest/{pipeline}/{stage}.json", json.dumps({"key": key, "number": 1}).encode())
    return output


def make_store(root: Path, actions: int) -> tuple[Store, str]:
    """A store in which other pipelines left `actions` records, ten a run; and the digest of one of their models."""
    store = Store(root)
    for number in range(actions - 1):
        run = f"20261130-000000-other{number // ACTIONS_PER_RUN}-000000"
        add_action(store, f"other{number // ACTIONS_PER_RUN}", f"stage{number % ACTIONS_PER_RUN}", digest_of(f"key {number}"), run)
        if number % ACTIONS_PER_RUN == 0:
            write(root / f"runs/{run}/run.json", b"{}")
            write(root / f"runs/{run}/journal/00000001.jsonl")
    model = add_action(store, "other", "pretrain", digest_of("model"), "r", "model", role="policy", tokenizer=digest_of("tokenizer"))
    write(root / "aliases/other/newest.json", json.dumps({"digest": model}).encode())
    write(root / "index/complete.json", b'{"schema": 1}')
    return store, model


def make_project(folder: Path, model: str) -> Path:
    """The pipeline file and what it reads."""
    write(folder / "a.txt", b"one\ntwo\n")
    write(folder / "gpt2/config.json", json.dumps(GPT2).encode())
    write(folder / "gpt2/model.safetensors")
    write(folder / "gpt2/tokenizer.json", b"{}")
    write(folder / "planned.toml", PIPELINE.format(model=model, short=model[:12]).encode())
    return folder / "planned.toml"


def plan(config: Path, store: Store) -> list[Decision]:
    """What `gptline plan` does, but for printing."""
    graph = build(load(config))
    decisions = Planner(graph, store, ROOT).plan()
    plan_lines(decisions, graph.loaded.file.about_itself())
    return decisions


def finish(config: Path, store: Store) -> None:
    """Record results of the planned pipeline: `documents` is reused then, and `more` had another key."""
    documents = next(each for each in plan(config, store) if each.stage == "documents")
    assert documents.key is not None
    add_action(store, "planned", "documents", documents.key, "r")
    add_action(store, "planned", "more", digest_of("an earlier key"), "r")


def measure(folder: Path, sizes: tuple[int, int], rounds: int) -> dict[int, list[float]]:
    """Seconds of each plan, by the number of actions in its store."""
    stores = {}
    for size in sizes:
        stores[size], model = make_store(folder / f"store-{size}", size)
        config = make_project(folder, model)
        finish(config, stores[size])
    decided = {size: [(each.stage, each.action, each.key) for each in plan(config, store)] for size, store in stores.items()}
    assert decided[sizes[0]] == decided[sizes[1]], decided
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    for number in range(rounds):
        for size in sizes if number % 2 else sizes[::-1]:
            started = time.perf_counter()
            plan(config, stores[size])
            seconds[size].append(time.perf_counter() - started)
    return seconds


def result(seconds: dict[int, list[float]], sizes: tuple[int, int], goal: float) -> dict[str, Any]:
    few, many = (np.array(seconds[size]) for size in sizes)
    draws = np.random.default_rng(1).integers(len(few), size=(10_000, len(few)))
    ratios = np.median(few[draws], axis=1) / np.median(many[draws], axis=1)  # pairs stay pairs: a slow minute hits both
    return report.result(
        "plan_store",
        unit="ms",
        device=torch.device("cpu"),
        peer=f"the same plan on a store of {sizes[0]:,} actions",
        ratio=statistics.median(few) / statistics.median(many),
        goal=goal,
        ours=1000 * statistics.median(many),
        theirs=1000 * statistics.median(few),
        interval_95=[float(each) for each in np.quantile(ratios, (0.025, 0.975))],
        actions=sizes[1],
        rounds=len(few),
        slowest_ms={"ours": 1000 * float(many.max()), "theirs": 1000 * float(few.max())},
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--actions", type=int, nargs=2, default=(100, 10_000), metavar=("FEW", "MANY"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--goal", type=float, default=GOAL, help="exit code 1 where the ratio is lower")
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    given = parser.parse_args(arguments)
    sizes = (given.actions[0], given.actions[1])
    with tempfile.TemporaryDirectory() as folder:
        row = result(measure(Path(folder), sizes, given.rounds), sizes, given.goal)
    low, high = row["interval_95"]
    print(
        f"{row['theirs']:.1f} ms with {sizes[0]:,} actions, {row['ours']:.1f} ms with {sizes[1]:,} (medians of {given.rounds} plans each)"
    )
    print(
        f"{row['ratio']:.3f} ({low:.3f} to {high:.3f}), goal {given.goal:.3f}: the larger store costs {1 / row['ratio']:.2f} times as much"
    )
    print(f"written: {report.write(given.out, row)}")
    return int(row["ratio"] < given.goal)


if __name__ == "__main__":
    raise SystemExit(main())
