"""The key of every stage kind is the recorded one, so that no user's finished stages rerun by accident.

The keys are those of the pipeline in `sound_pipeline.py`, with digests of zeros for inputs and source files: they depend on the kinds'
names, settings and code, not on data. `recorded_keys.json` says for each stage since when it has its key. After an intended change:

    python -m tests.pipelines.plan.test_recorded_keys --record
"""

from __future__ import annotations

import datetime
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from pipelines.plan.config import load
from pipelines.plan.environment import ROOT
from pipelines.plan.graph import build
from pipelines.plan.key import key_of
from pipelines.plan.kinds import known_kinds
from pipelines.plan.planner import Planner
from pipelines.store.store import Store
from tests.pipelines.plan.sound_pipeline import write_sound_pipeline

FILE = Path(__file__).with_name("recorded_keys.json")
RECORD = "python -m tests.pipelines.plan.test_recorded_keys --record"
ZEROS = "0" * 64


def keys(folder: Path) -> dict[str, dict[str, str]]:
    """Each stage's kind and key."""
    foreign = folder / "foreign"
    foreign.mkdir()
    shape = {"n_layer": 1, "n_head": 1, "n_embd": 8, "n_positions": 8, "vocab_size": 8}
    (foreign / "config.json").write_text(json.dumps({"model_type": "gpt2", **shape}))
    for name in ("model.safetensors", "tokenizer.json"):
        (foreign / name).touch()
    graph = build(load(write_sound_pipeline(folder)))
    planner = Planner(graph, Store(folder / "store"), ROOT)
    found = {}
    for name, stage in graph.stages.items():
        leaves = planner.leaves(stage, {parameter: [ZEROS] * len(references) for parameter, references in stage.inputs.items()})
        stubbed = {leaf: ZEROS if leaf.startswith("source.") else value for leaf, value in leaves.items()}
        found[name] = {"kind": stage.kind.uses, "key": key_of(stubbed)}
    return found


def recorded() -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = json.loads(FILE.read_text())
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    return keys(tmp_path_factory.mktemp("keys"))


@pytest.mark.parametrize("kind", known_kinds())
def test_the_keys_of_a_kind_are_the_recorded_ones(found: dict[str, dict[str, str]], kind: str):
    before = {name: each["key"] for name, each in recorded().items() if each["kind"] == kind}
    since = sorted({each["since"] for each in recorded().values() if each["kind"] == kind})
    now = {name: each["key"] for name, each in found.items() if each["kind"] == kind}
    assert now, f"sound_pipeline.py has no stage of kind {kind!r}; add one, then run: {RECORD}"
    assert now == before, (
        f"the key of kind {kind!r} changed, which was the same since {', '.join(since) or 'never'}: in everyone's stores all finished "
        f"{kind} stages will run again, and what follows them if their outputs differ. If intended, say so in CHANGELOG.md and run: "
        f"{RECORD}"
    )


def test_every_recorded_stage_still_exists(found: dict[str, dict[str, str]]):
    assert list(recorded()) == list(found), f"if the stages of sound_pipeline.py were changed on purpose, run: {RECORD}"


def record(today: str) -> list[str]:
    """Write the current keys; a key that didn't change keeps its date. Return the stages whose keys changed."""
    before: dict[str, Any] = recorded() if FILE.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        found = keys(Path(folder))
    changed = [name for name, each in found.items() if each["key"] != before.get(name, {}).get("key")]
    now = {name: {**each, "since": today if name in changed else before[name]["since"]} for name, each in found.items()}
    FILE.write_text(json.dumps(now, indent=1) + "\n")
    return changed


if __name__ == "__main__":
    if sys.argv[1:] != ["--record"]:
        sys.exit(f"usage: {RECORD}")
    sys.stdout.write(f"recorded; changed: {', '.join(record(datetime.date.today().isoformat())) or 'none'}\n")
