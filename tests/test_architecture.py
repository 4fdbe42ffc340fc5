"""The rules of the architecture: who imports whom, the doors of heavy libraries, a light plan, and limits of size."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = [path for package in ("pipelines", "gpt", "cluster") for path in sorted((ROOT / package).rglob("*.py"))]

LAYERS = {"pipelines": {"pipelines", "gpt", "cluster"}, "gpt": {"gpt"}, "cluster": {"cluster"}}
DOORS = {
    "mlflow": ["pipelines/observe/mlflow_session.py"],
    "deepspeed": ["cluster/deepspeed_engine.py"],
    "ray": [
        "cluster/failures.py",
        "cluster/gang_launch.py",
        "cluster/gang_start.py",
        "cluster/jobs.py",
        "cluster/rank_process.py",
        "cluster/ray_session.py",
        "cluster/room.py",
    ],
    "datasets": [],
    "pyarrow": ["pipelines/ingest/parquet.py", "pipelines/ingest/streams.py"],
    "typer": ["pipelines/cli.py", "pipelines/options.py", "pipelines/terminal.py"],
    "rich": ["pipelines/observe/progress.py"],
    "tokenizers": ["gpt/tokenizer.py"],
    "pyppmd": ["gpt/evaluation.py"],
    "transformers": [],
}
FOR_STAGES = {
    "pipelines.artifacts",
    "pipelines.stage",
    "pipelines.ingest.dialogue_settings",
    "pipelines.ingest.dialogues",
    "pipelines.ingest.documents",
    "pipelines.ingest.gather",
    "pipelines.ingest.pairs",
    "pipelines.ingest.settings",
}
"""What a stage's file may import from `pipelines`; everything else reaches it as an argument."""


def imports(path: Path) -> set[str]:
    """The dotted targets of all imports in a file, `from a import b` as a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_file_imports_its_own_layer_and_those_below(path: Path):
    layer = path.relative_to(ROOT).parts[0]
    for name in imports(path):
        top = name.split(".")[0]
        assert top not in LAYERS or top in LAYERS[layer], f"{path} imports {name}"
        if top in DOORS:
            assert path.relative_to(ROOT).as_posix() in DOORS[top], f"{path} imports {name}, whose door is {DOORS[top]}"


@pytest.mark.parametrize("path", sorted((ROOT / "pipelines" / "stages").glob("*.py")), ids=lambda path: path.stem)
def test_a_stage_imports_neither_other_stages_nor_the_wings(path: Path):
    ours = {name.rsplit(".", 1)[0] for name in imports(path) if name.startswith("pipelines.")}
    assert ours <= FOR_STAGES


WINGS = {"store": 0, "plan": 1, "observe": 2, "run": 3, "serve": 3}
"""The wings of pipelines/ by floor: a file imports its own wing and those on lower floors."""
PUBLIC = {"artifacts", "stage"}
"""What every file of pipelines/ may import."""


def wing_of(path: Path) -> str:
    """`plan` for pipelines/plan/graph.py, `cli` for pipelines/cli.py."""
    return path.relative_to(ROOT / "pipelines").parts[0].removesuffix(".py")


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.is_relative_to(ROOT / "pipelines")], ids=lambda path: path.relative_to(ROOT).as_posix()
)
def test_imports_between_wings_only_go_down(path: Path):
    wing = wing_of(path)
    allowed = {
        **{name: PUBLIC | {wing for wing, floor in WINGS.items() if floor < WINGS[name]} | {name} for name in WINGS},
        "artifacts": {"artifacts"},
        "stage": PUBLIC,
        "ingest": PUBLIC | {"ingest"},
        "stages": PUBLIC | {"ingest"},
    }
    allowed["observe"] |= {"ingest"}  # the overlap report compares records
    for name in imports(path):
        if name.startswith("pipelines.") and wing in allowed:
            assert name.split(".")[1] in allowed[wing], f"{path} imports {name}"


def test_no_file_imports_itself_through_other_files():
    """Imports under TYPE_CHECKING count: two files that name each other's types have to be read together."""
    modules = {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path for path in FILES}
    below = {
        name: {target for each in imports(path) for target in (each, each.rpartition(".")[0]) if target in modules}
        for name, path in modules.items()
    }
    graphlib.TopologicalSorter(below).prepare()  # CycleError names the files of a circle


LONG_FUNCTIONS = {
    "gpt/reward.py:train": "a training loop stays in one piece",
    "gpt/rl/loop.py:train": "a training loop stays in one piece",
}


def test_no_file_class_or_function_is_too_long_to_read():
    too_long = set()
    for path in FILES:
        place, text = path.relative_to(ROOT).as_posix(), path.read_text()
        if text.count("\n") > 400:
            too_long.add(place)
        for node in ast.walk(ast.parse(text)):
            limit = 250 if isinstance(node, ast.ClassDef) else 80 if isinstance(node, ast.FunctionDef) else None
            if limit and node.end_lineno - node.lineno + 1 > limit:
                too_long.add(f"{place}:{node.name}")
    assert too_long == set(LONG_FUNCTIONS)


def test_init_files_are_empty():
    # only pipelines.ingest re-exports: it is what stage authors import
    packages = {path.parent.relative_to(ROOT).as_posix() for path in FILES} - {"pipelines/ingest"}
    assert {package for package in packages if (ROOT / package / "__init__.py").read_text()} == set()


@pytest.mark.parametrize(
    "module",
    [
        "pipelines.cli",
        "pipelines.plan.planner",
        "pipelines.run.runner",
        "pipelines.observe.tracker",
        "pipelines.run.follow",
        "pipelines.ingest",
        "gpt.settings",
    ],
)
def test_a_plan_imports_no_heavy_library(module: str):
    heavy = ("torch", "ray", "deepspeed", "mlflow", "datasets", "pyarrow", "transformers", "numpy")
    script = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_loading_every_stage_kind_imports_no_heavy_library(tmp_path: Path):
    script = (
        "import sys; from pathlib import Path; from pipelines.plan.kinds import load_kind;"
        "[load_kind(path.stem, Path('.')) for path in Path('pipelines/stages').glob('*.py') if path.stem != '__init__'];"
        "print([name for name in ('torch', 'ray', 'deepspeed', 'mlflow', 'datasets', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_deepspeeds_own_keys_are_in_one_file():
    keys = ("train_micro_batch_size_per_gpu", "zero_optimization", "gradient_clipping")
    found = {path.relative_to(ROOT).as_posix() for path in FILES if any(key in path.read_text() for key in keys)}
    assert found == {"cluster/deepspeed_engine.py"}
