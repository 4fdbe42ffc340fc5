"""README and docs agree with the code: the map is the tree, the commands exist, the metrics are those that are logged."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.metric_names import METRIC_NAME
from pipelines.cli import app
from pipelines.observe.meanings import MEANINGS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def tracked(*under: str) -> list[str]:
    listed = subprocess.run(["git", "ls-files", *under], cwd=ROOT, capture_output=True, text=True, check=True)
    return listed.stdout.split()


def metrics(file: Path, quote: str) -> set[str]:
    """The metric names that a file has in quotes; one that ends with _ is the beginning of many."""
    quoted = re.finditer(f"{quote}({METRIC_NAME.pattern}){quote}", file.read_text())
    return {match[1] for match in quoted if not match[1].endswith("_")}


def test_the_map_names_every_folder_and_nothing_that_does_not_exist():
    section = README.split("## The map")[1].split("```")[1]
    named: set[str] = set()
    top = ""
    for line in section.splitlines():
        if match := re.match(r"( *)((?:[\w.-]+/? )*[\w.-]+/?)(\s{2}|$)", line):
            names = match[2].split()
            named |= {(top if match[1] else "") + name for name in names}
            top = top if match[1] else names[0]
    folders = {f"{name.split('/')[0]}/" for name in tracked() if "/" in name} - {".ci/"}
    wings = {f"{Path(name).parent.as_posix()}/" for name in tracked("pipelines") if name.count("/") == 2}
    assert folders | wings <= named
    assert all((ROOT / name).exists() for name in named)


def test_pages_made_from_the_code_are_up_to_date():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    for name, page in generate.PAGES.items():
        assert (ROOT / name).read_text(encoding="utf-8") == page(), f"{name} is out of date; run `python docs/generate.py`"


def test_every_command_in_the_readme_exists():
    shown = set(re.findall(r"^(?:\.venv/bin/)?gptline (\w+)", README, re.MULTILINE)) | set(re.findall(r"`gptline (\w+)", README))
    assert {"run", "plan", "rerun", "lineage", "ui", "doctor", "sample", "sync"} <= shown
    for verb in shown:
        assert CliRunner().invoke(app, [verb, "--help"]).exit_code == 0, verb
    targets = set(re.findall(r"`?make (\w+)", README)) & {"quickstart", "test", "unit", "install", "lint", "clean"}
    makefile = (ROOT / "Makefile").read_text()
    assert {"quickstart", "test"} <= targets
    assert all(f"\n{target}:" in makefile for target in targets)


def test_exactly_the_logged_metrics_are_explained():
    explained = metrics(ROOT / "docs" / "metrics.md", "`")
    code = [file for file in tracked("gpt", "pipelines", "cluster") if file.endswith(".py") and not file.endswith("observe/meanings.py")]
    logged = {name for file in code for name in metrics(ROOT / file, '"')}
    assert {"time/stage_s", "time/step_s", "eval/loss"} <= logged
    assert logged <= explained
    assert set(MEANINGS) <= explained
    # Names of an evaluation's figures are composed (`baseline_`, `best_of_`): tests/pipelines/test_evaluate.py compares them with the page.
    assert {name for name in explained - logged if not name.startswith("eval/")} == set()


def test_the_chinese_readme_has_the_commands_and_links_of_the_english_one():
    chinese = (ROOT / "README.zh.md").read_text(encoding="utf-8")
    for pattern in (r"`(gptline [^`]+)`", r"\]\(([^)]+)\)", r"(?m)^([$>].*)$"):
        assert set(re.findall(pattern, README)) - {"README.zh.md"} == set(re.findall(pattern, chinese)) - {"README.md"}


@pytest.mark.parametrize("path", [path for path in tracked("*.md") if "fixtures" not in path])
def test_links_between_our_own_pages_lead_somewhere(path: str):
    text = (ROOT / path).read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert ((ROOT / path).parent / target).exists(), target
