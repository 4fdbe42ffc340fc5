"""`gptline plan CONFIG --config`: what it prints is a pipeline file with the same keys."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest

from pipelines.plan.config import load
from pipelines.plan.graph import ROOT, Graph, build
from pipelines.plan.planner import Planner
from pipelines.plan.resolved import home, resolved, saved_in
from pipelines.plan.toml_writer import write_toml
from pipelines.store.store import Store

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    """A copy of the shipped configs, with an empty file for each data file that they name."""
    copy = tmp_path / "configs"
    shutil.copytree(CONFIGS, copy)
    for path in CONFIGS.glob("*.toml"):
        file = tomllib.loads(path.read_text(encoding="utf-8"))
        tables = [table for stage in file["stages"].values() for table in (stage, *stage.get("mixture", ()))]
        for pattern in (pattern for table in tables for pattern in table.get("files", ())):
            source = copy / file.get("data", ".") / pattern.replace("*", "any")
            source.parent.mkdir(parents=True, exist_ok=True)
            source.touch()
    return copy


def leaves(graph: Graph, store: Store) -> dict[str, dict[str, Any]]:
    planner = Planner(graph, store, ROOT)
    return {name: planner.leaves(stage, {}) for name, stage in graph.stages.items()}


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("*.toml")))
def test_the_resolved_pipeline_has_the_keys_of_the_shipped_config(configs: Path, store: Store, name: str):
    graph = build(load(configs / name, ["seed=3"]))
    saved = configs / "saved.toml"
    saved.write_text(write_toml(saved_in(home(graph), graph)), encoding="utf-8")
    again = build(load(saved))
    assert leaves(again, store) == leaves(graph, store)
    for stage, other in zip(graph.stages.values(), again.stages.values(), strict=True):
        assert (stage.name, stage.inputs, stage.resources, stage.gates) == (other.name, other.inputs, other.resources, other.gates)
        assert stage.operational() == other.operational()


def test_every_default_is_written_and_what_is_not_set_is_left_out(configs: Path):
    graph = build(load(configs / "quickstart.toml"))
    stage = tomllib.loads(write_toml(saved_in(home(graph), graph)))["stages"]["pretrain"]
    assert stage["weight_decay"] == 0.1
    assert stage["resources"]["cpus_per_rank"] == 1
    assert "micro_batch_size" not in stage


def test_a_run_records_data_as_the_file_writes_it_even_if_no_one_folder_would_do_for_a_saved_file(tmp_path: Path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"kind_{name}.py").write_text(
            "from pipelines.artifacts import Documents\nfrom pipelines.stage import StageContext\n\n\n"
            f"def {name}(stage: StageContext) -> Documents: ...\n"
        )
    (tmp_path / "one" / "base.toml").write_text('pipeline = "p"\ndata = "texts"\n[stages.one]\nuses = "./kind_one.py:one"\n')
    (tmp_path / "two" / "p.toml").write_text('extends = "../one/base.toml"\n[stages.two]\nuses = "./kind_two.py:two"\n')
    graph = build(load(tmp_path / "two" / "p.toml"))
    assert resolved(graph)["data"] == "texts"
    with pytest.raises(ValueError, match=r"one file can't name functions relative to 2 folders: one in .*/one, two in .*/two; put the"):
        home(graph)
