"""What a submitted run consists of: code, config and options that mean the same on the cluster as where they were typed."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pipelines.plan.config import ConfigError, load
from pipelines.plan.environment import ROOT
from pipelines.plan.graph import Graph, build
from pipelines.plan.planner import Planner
from pipelines.plan.snapshot import freeze
from pipelines.run.frozen_config import freeze_config
from pipelines.run.runner import Options, Run
from pipelines.run.submission import entrypoint, main, submit
from pipelines.stage import StageFailure
from pipelines.store.journal import Superseded
from pipelines.store.runs import RunFolder
from pipelines.store.store import Store

WORDS = """
from our_neighbour import LETTERS
from pipelines.artifacts import Documents
from pipelines.stage import Source, StageConfig, StageContext


class WordsConfig(StageConfig):
    file: str

    def sources(self, data):
        return [Source(self.file, data / self.file)]


def words(config: WordsConfig, stage: StageContext) -> Documents:
    raise AssertionError(LETTERS)
"""
CUT = """
from gpt.settings import UserFunction
from pipelines.artifacts import Documents
from pipelines.stage import StageConfig, StageContext


class CutConfig(StageConfig):
    by: UserFunction


def cut(config: CutConfig, documents: Documents, stage: StageContext) -> Documents:
    return stage.function(config.by)
"""
RULE = """
def rule(text):
    return text[:3]
"""
TOML = """
pipeline = "small"
data = "texts"

[tracking]
uri = "sqlite:///mine.db"

[stages.words]
uses = "own_words.py:words"
file = "a.txt"

[stages.cut]
uses = "../shared/own_cut.py:cut"
by = "../shared/own_rule.py:rule"
inputs = { documents = "words" }
"""


class Sent:
    """A cluster that accepts every job, or refuses every job with `error`."""

    address = "http://127.0.0.1:8265"

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.jobs: list[tuple[str, str, Mapping[str, str]]] = []

    def submit(self, name: str, entrypoint: str, environment: Mapping[str, str]) -> None:
        if self.error is not None:
            raise self.error
        self.jobs.append((name, entrypoint, environment))


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """line/small.toml with a file of functions and its neighbour, two more files in ../shared, and data."""
    folder = tmp_path / "project"
    for name, text in {
        "line/small.toml": TOML,
        "line/own_words.py": WORDS,
        "line/our_neighbour.py": "LETTERS = 3\n",
        "shared/own_cut.py": CUT,
        "shared/own_rule.py": RULE,
        "line/texts/a.txt": "abc",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return folder


def graph_of(config: Path, *overrides: str) -> Graph:
    for name in ("gptline_user_own_words", "gptline_user_own_cut", "gptline_user_own_rule", "our_neighbour"):
        sys.modules.pop(name, None)
    sys.path[:] = [each for each in sys.path if not Path(each, "our_neighbour.py").exists()]  # of an earlier graph
    return build(load(config, overrides))


def leaves(graph: Graph, store: Store) -> dict[str, dict[str, Any]]:
    planner = Planner(graph, store, ROOT)
    return {name: planner.leaves(stage, {}) for name, stage in graph.stages.items()}


def test_the_frozen_config_has_the_keys_and_code_of_the_submitted_one(project: Path, store: Store, tmp_path: Path) -> None:
    graph = graph_of(project / "line" / "small.toml", "stages.words.file=a.txt", "seed=7")
    snapshot = freeze(graph, store)
    config = freeze_config(graph, store, snapshot, tmp_path / "elsewhere" / "submitted")
    before = leaves(graph, store)
    for file in project.rglob("*.py"):
        file.write_text("an edit\n")
    (project / "line" / "small.toml").write_text("another\n")
    again = graph_of(config)
    assert leaves(again, store) == before
    assert (before["cut"]["kind"], before["cut"]["config.by"]) == ("../shared/own_cut.py:cut", "../shared/own_rule.py:rule")
    assert freeze(again, store).artifact.digest == snapshot.artifact.digest


def test_a_config_that_an_earlier_version_froze_on_one_line_per_key_has_the_same_keys(project: Path, store: Store, tmp_path: Path) -> None:
    graph = graph_of(project / "line" / "small.toml")
    before = leaves(graph, store)
    config = freeze_config(graph, store, freeze(graph, store), tmp_path / "elsewhere" / "submitted")
    config.write_text(
        'pipeline = "small"\nseed = 0\nstages = {"words" = {"uses" = "own_words.py:words", "file" = "a.txt"}, "cut" = {"uses" = '
        '"../shared/own_cut.py:cut", "by" = "../shared/own_rule.py:rule", "inputs" = {"documents" = "words"}}}\n'
        f'data = "{project}/line/texts"\n'
    )
    assert leaves(graph_of(config), store) == before


def test_relative_paths_mean_what_they_meant_on_submission(project: Path, store: Store, tmp_path: Path) -> None:
    graph = graph_of(project / "line" / "small.toml")
    again = graph_of(freeze_config(graph, store, freeze(graph, store), tmp_path / "elsewhere")).loaded
    assert again.data() == project / "line" / "texts"
    assert again.file.store.root == str(store.root)
    assert again.file.tracking.uri == f"sqlite:///{tmp_path}/mine.db"
    assert again.file.cluster.address == "auto"


def test_a_variant_is_frozen_with_its_base_and_the_functions_of_both_folders(project: Path, store: Store, tmp_path: Path) -> None:
    (project / "variants").mkdir()
    (project / "variants" / "our_score.py").write_text(RULE.replace("rule", "score"))
    (project / "line" / "small.toml").write_text(TOML.replace("../shared/own_cut.py:cut", "./own_rule_cut.py:cut"))
    (project / "line" / "own_rule_cut.py").write_text(CUT)
    variant = project / "variants" / "variant.toml"
    variant.write_text('extends = "../line/small.toml"\nseed = 9\n[stages.cut]\nuses = "./own_cut.py:cut"\nby = "./our_score.py:score"\n')
    (project / "variants" / "own_cut.py").write_text(CUT)
    graph = graph_of(variant)
    config = freeze_config(graph, store, freeze(graph, store), tmp_path / "elsewhere" / "submitted")
    before = leaves(graph, store)
    for file in (*(project / "line").glob("*.*"), *(project / "variants").iterdir()):
        file.unlink()
    assert leaves(graph_of(config), store) == before
    assert (before["words"]["kind"], before["cut"]["config.by"]) == ("own_words.py:words", "./our_score.py:score")


def test_a_config_near_the_root_puts_nothing_outside_its_folder(project: Path, store: Store, tmp_path: Path) -> None:
    up = "../" * len(project.parts)
    file = project / "line" / "small.toml"
    file.write_text(TOML.replace("../shared", f"{up}{project.relative_to('/')}/shared"))
    graph = graph_of(file)
    before = set(tmp_path.iterdir())
    config = freeze_config(graph, store, freeze(graph, store), tmp_path / "elsewhere" / "submitted")
    assert set(tmp_path.iterdir()) - before == {tmp_path / "elsewhere"}
    assert [each.name for each in (tmp_path / "elsewhere").iterdir()] == ["submitted"]
    assert list(graph_of(config).stages) == ["words", "cut"]


def test_a_file_with_an_absolute_path_cannot_be_frozen(project: Path, store: Store) -> None:
    file = project / "line" / "small.toml"
    file.write_text(TOML.replace("../shared", f"{project}/shared"))
    with pytest.raises(ConfigError, match=r"stages.cut.by: found the absolute path '/"):
        submit(graph_of(file), store, Options("", ""), {}, Sent())  # type: ignore[arg-type]
    assert store.runs() == []


def test_one_job_is_sent_with_the_runs_name(project: Path, store: Store) -> None:
    sent = Sent()
    asked = Options("gptline submit small.toml", "gptline submit small.toml", fresh=["cut"], until="cut")
    run = submit(graph_of(project / "line" / "small.toml"), store, asked, {}, sent)  # type: ignore[arg-type]
    record = RunFolder(store, run).job()
    assert record is not None
    assert record.address == "http://127.0.0.1:8265"
    code = store.root / "artifacts" / record.snapshot
    assert sent.jobs == [(run, entrypoint(code, store, run), {})]
    options = Options(**record.options)
    assert (options.run, options.fresh, options.until, options.inline) == (run, ["cut"], "cut", False)
    assert record.config == "submitted/line/small.toml"


def test_a_job_that_cannot_be_sent_leaves_no_run(project: Path, store: Store) -> None:
    with pytest.raises(ConnectionError, match="gone"):
        submit(graph_of(project / "line" / "small.toml"), store, Options("", ""), {}, Sent(ConnectionError("gone")))  # type: ignore[arg-type]
    assert store.runs() == []


@pytest.mark.parametrize("options", [{"until": "wrods"}, {"fresh": ["wrods"]}, {"use": {"wrods": "sha256:00000000"}}])
def test_an_option_that_names_an_unknown_stage_is_refused_before_anything_is_sent(
    project: Path, store: Store, options: dict[str, Any]
) -> None:
    sent = Sent()
    with pytest.raises(ConfigError, match=r"wrods.*there is no such stage"):
        submit(graph_of(project / "line" / "small.toml"), store, Options("", "", **options), {}, sent)  # type: ignore[arg-type]
    assert sent.jobs == []
    assert not list(store.root.iterdir())


def test_a_jobs_command_survives_the_shell_and_starts_the_code_that_it_names(tmp_path: Path) -> None:
    store = Store(tmp_path / "it's a $HOME; store")
    code = tmp_path / "the code & more"
    (code / "pipelines" / "run").mkdir(parents=True)
    (code / "pipelines" / "__init__.py").touch()
    (code / "pipelines" / "run" / "__init__.py").touch()
    (code / "pipelines" / "run" / "submission.py").write_text(
        "import json, os, sys; print(json.dumps([os.getppid(), sys.argv, sys.path[0]]))"
    )
    (tmp_path / "pipelines").mkdir()
    (tmp_path / "pipelines" / "submission.py").write_text("raise SystemExit('the working folder came first')")
    line = entrypoint(code, store, "run-1")
    process = subprocess.run(line, shell=True, capture_output=True, text=True, check=True, cwd=tmp_path)
    _, words, first = json.loads(process.stdout)
    assert words[1:] == [str(store.root), "run-1"]
    assert first == str(code)
    assert shlex.split(line)[0] == "exec"


def test_a_node_without_the_store_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nowhere"), "run-1"]) == 3
    assert capsys.readouterr().err == (
        f"can't continue: this node does not see {tmp_path}/nowhere/runs/run-1; "
        "expected the store on storage that every node has at this same path\n"
    )


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OSError(28, "No space left on device", "/store/x"), 3, "can't continue: [Errno 28] No space left on device: '/store/x'"),
        (ConnectionError("the cluster does not answer"), 3, "can't continue: the cluster does not answer"),
        (caused(ValueError("the token can't be read"), PermissionError()), 3, "the token can't be read"),
        (ConfigError("small.toml", []), 2, "small.toml: 0 faults; no stage was started."),
        (StageFailure("the store is of a later version"), 2, "the store is of a later version"),
        (
            Superseded("run r was taken over by another driver"),
            1,
            "run r was taken over by another driver, or `gptline sync` found no sign of life and ended it; `gptline status` shows which",
        ),
    ],
)
def test_a_jobs_driver_ends_with_the_exit_code_and_the_words_of_run(
    project: Path,
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    code: int,
    message: str,
) -> None:
    graph = graph_of(project / "line" / "small.toml")
    run = submit(graph, store, Options("", ""), {}, Sent())  # type: ignore[arg-type]

    def execute(self: Run) -> int:
        raise error

    monkeypatch.setattr(Run, "execute", execute)
    graph_of(project / "line" / "small.toml")  # forget the modules: the job reads frozen files
    assert main([str(store.root), run]) == code
    assert capsys.readouterr().err == f"{message}\n"


def test_a_jobs_driver_that_can_not_read_the_stores_files_ends_with_3(
    project: Path, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    run = submit(graph_of(project / "line" / "small.toml"), store, Options("", ""), {}, Sent())  # type: ignore[arg-type]
    job = RunFolder(store, run).path("job.json")
    job.unlink()
    job.mkdir()
    assert main([str(store.root), run]) == 3
    assert capsys.readouterr().err == f"can't continue: [Errno 21] Is a directory: '{job}'\n"
