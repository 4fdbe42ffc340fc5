"""A pipeline file that extends another: what is merged, what paths mean, and which line a fault names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines.plan.config import ConfigError, load
from pipelines.plan.graph import ROOT, Graph, build
from pipelines.plan.planner import Planner
from pipelines.plan.resolved import home, saved_in
from pipelines.plan.toml_writer import write_toml
from pipelines.store.store import Store

BASE = """\
pipeline = "base"
data = "texts"

[stages.documents]
uses = "./mine.py:documents"
files = ["a.txt", "b.txt"]

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
"""
MINE = """
from pipelines.artifacts import Documents
from pipelines.stage import Source, StageConfig, StageContext


class MineConfig(StageConfig):
    files: list[str]

    def sources(self, data):
        return [Source(name, data / name) for name in self.files]


def documents(config: MineConfig, stage: StageContext) -> Documents: ...
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with base/base.toml, its code and data, and an empty folder variants/."""
    for name, text in {
        "base/base.toml": BASE,
        "base/mine.py": MINE,
        "base/texts/a.txt": "a",
        "base/texts/b.txt": "b",
        "variants/readme": "",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def variant(project: Path, text: str, name: str = "variants/variant.toml") -> Path:
    path = project / name
    path.write_text(text)
    return path


def leaves(graph: Graph, store: Store) -> dict[str, dict[str, Any]]:
    planner = Planner(graph, store, ROOT)
    return {name: planner.leaves(stage, {}) for name, stage in graph.stages.items()}


def fault_lines(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        build(load(path, overrides))
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def test_tables_are_merged_key_by_key_and_lists_are_replaced(project: Path):
    path = variant(project, 'extends = "../base/base.toml"\nstages.documents.files = ["b.txt"]\n[stages.pretrain]\nlr = 3e-4\n')
    graph = build(load(path))
    config: Any = graph.stages["pretrain"].config
    assert (config.lr, config.steps, config.preset) == (3e-4, 10, "gpt2-nano")
    assert [source.name for source in graph.stages["documents"].sources] == ["b.txt"]
    assert graph.loaded.file.pipeline == "base"
    assert graph.loaded.path == path


def test_a_variant_that_changes_nothing_has_the_keys_of_its_base_though_it_lies_elsewhere(project: Path, store: Store):
    path = variant(project, 'extends = "../base/base.toml"\npipeline = "variant"\n')
    assert leaves(build(load(path)), store) == leaves(build(load(project / "base" / "base.toml")), store)


def test_paths_mean_what_they_mean_in_the_file_that_wrote_them(project: Path):
    (project / "variants" / "other.py").write_text(MINE)
    (project / "variants" / "c.txt").write_text("c")
    text = 'extends = "../base/base.toml"\ndata = "."\n[stages.documents]\nuses = "./other.py:documents"\nfiles = ["c.txt"]\n'
    graph = build(load(variant(project, text)))
    assert graph.loaded.data() == project / "variants"
    assert graph.stages["documents"].kind.file == project / "variants" / "other.py"


def test_a_stage_is_dropped_with_false(project: Path):
    path = variant(project, 'extends = "../base/base.toml"\n[stages]\npretrain = false\n')
    assert list(build(load(path)).stages) == ["documents", "tokenizer", "tokenize"]
    assert list(build(load(project / "base" / "base.toml", ["stages.pretrain=false"])).stages) == ["documents", "tokenizer", "tokenize"]


def test_an_unknown_stage_cannot_be_dropped(project: Path):
    path = variant(project, 'extends = "../base/base.toml"\n[stages]\npretrian = false\n')
    assert fault_lines(path) == [
        "variant.toml, line 3: stages.pretrian: there is no such stage to drop in what variant.toml extends; did you mean 'pretrain'?"
    ]


def test_a_chain_is_followed_and_the_nearest_file_wins(project: Path):
    variant(project, 'extends = "base.toml"\n[stages.pretrain]\nlr = 1\nsteps = 20\n', "base/middle.toml")
    config: Any = build(load(variant(project, 'extends = "../base/middle.toml"\nstages.pretrain.lr = 2\n'))).stages["pretrain"].config
    assert (config.lr, config.steps, config.global_batch_size) == (2.0, 20, 8)


def test_files_that_extend_each_other_are_refused(project: Path):
    variant(project, '\nextends = "../variants/variant.toml"\n', "base/loop.toml")
    path = variant(project, 'extends = "../base/loop.toml"\n')
    (fault,) = fault_lines(path)
    cycle = "variant.toml extends ../base/loop.toml extends variant.toml"
    assert fault.endswith(f", line 2: extends: {cycle}: a cycle; one of these files must extend nothing")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("extends = 3", "variant.toml, line 1: extends: expected the name of a pipeline file, found 3"),
        ('\nextends = "../base/bas.toml"', "variant.toml, line 2: extends: there is no file {base}/bas.toml; did you mean 'base.toml'?"),
        (
            'extends = "../base/texts"',
            "variant.toml, line 1: extends: {base}/texts is not a regular file; expected a pipeline file such as",
        ),
        ('extends = "../base/mine.py"', "../base/mine.py, line 2: TOML: can't be parsed: "),
    ],
)
def test_a_base_that_cannot_be_read_is_a_fault_of_the_line_that_names_it(project: Path, text: str, fault: str):
    (found,) = fault_lines(variant(project, text))
    assert found.startswith(fault.format(base=project / "variants" / ".." / "base"))


def test_faults_name_the_file_and_line_that_wrote_the_setting_or_the_override(project: Path):
    (project / "base" / "base.toml").write_text(BASE.replace("steps = 10", "stepps = 10").replace('"bytes"', '"byte"'))
    path = variant(project, 'extends = "../base/base.toml"\n\n[stages.pretrain]\nlr = "fast"\n')
    assert fault_lines(path, "stages.pretrain.global_batch_size=0") == [
        "../base/base.toml, line 10: stages.tokenizer.algorithm: expected 'bpe' or 'bytes', found 'byte'",
        "../base/base.toml, line 18: stages.pretrain.stepps: unknown key; did you mean 'steps'?",
        "variant.toml, line 3: stages.pretrain.steps: is missing",
        "variant.toml, line 4: stages.pretrain.lr: expected a number, found 'fast'",
        "--set stages.pretrain.global_batch_size=0: expected at least 1, found 0",
    ]


def test_functions_of_one_stage_named_by_files_of_two_folders_are_refused(project: Path):
    (project / "base" / "base.toml").write_text(
        BASE + '\n[stages.rl]\ninputs = { policy = "pretrain", prompts = "prompts" }\nreward = "./mine.py:score"\n'
    )
    path = variant(project, 'extends = "../base/base.toml"\n[stages.rl]\nuses = "./other.py:rl"\n')
    assert any("stages.rl: files in 2 folders name its functions" in fault for fault in fault_lines(path))


def test_the_resolved_pipeline_of_a_variant_has_its_keys_when_saved_beside_its_functions(project: Path, store: Store):
    graph = build(load(variant(project, 'extends = "../base/base.toml"\n[stages.pretrain]\nlr = 2e-3\n'), ["seed=4"]))
    saved = project / "base" / "saved.toml"
    saved.write_text(write_toml(saved_in(home(graph), graph)))
    assert leaves(build(load(saved)), store) == leaves(graph, store)


def test_the_gpu_variant_of_the_quickstart_is_the_quickstart_in_bf16_on_two_gpus():
    configs = Path(__file__).parents[3] / "configs"
    plain, gpu = build(load(configs / "quickstart.toml")), build(load(configs / "quickstart-gpu.toml"))
    assert list(gpu.stages) == list(plain.stages)
    for name, stage in gpu.stages.items():
        config: Any = stage.config
        if stage.kind.trains():
            assert (config.precision, config.zero_stage) == ("bf16", 2)
            assert (stage.resources.ranks, stage.resources.gpus_per_rank) == (2, 1)
            assert {**stage.semantic(), "precision": "fp32"} == plain.stages[name].semantic()
        else:
            assert stage == plain.stages[name]
    lines = (configs / "quickstart-gpu.toml").read_text().splitlines()
    assert len([line for line in lines if line and not line.startswith("#")]) <= 10
