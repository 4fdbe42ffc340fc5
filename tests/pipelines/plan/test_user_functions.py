"""Functions that a stage's settings name: what is in the key, what is refused, and that the frozen code runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from pipelines.plan.config import ConfigError, load
from pipelines.plan.environment import ROOT
from pipelines.plan.graph import build
from pipelines.plan.planner import Planner
from pipelines.run.runner import Options, Run
from pipelines.store.events import StageEnded
from pipelines.store.journal import read_journal
from pipelines.store.store import Store
from tests.pipelines.run.small import NoTracker

KINDS = '''
import multiprocessing
import os
import subprocess
import sys

from gpt.settings import PretrainSettings, UserFunction
from pipelines.artifacts import Report
from pipelines.stage import StageConfig, StageContext


class MarkConfig(StageConfig):
    reward: UserFunction | None = None
    others: list[UserFunction] = []
    best: UserFunction = "./reward.py:best"
    keys: dict[str, list[UserFunction]] = {}


class GangConfig(MarkConfig, PretrainSettings):
    where: str = ""


def mark(config: MarkConfig, stage: StageContext) -> Report:
    named = [each for each in (config.reward, *config.others, *config.keys.get("more", []), config.best) if each]
    return published(stage, {each: stage.function(each)("four") for each in named})


def in_a_gang(config: GangConfig, stage: StageContext) -> Report:
    """The file is edited while the stage runs; then four kinds of process call the function."""
    with open(config.where + "/reward.py", "a") as file:
        file.write("\\n\\ndef score(response):\\n    return -1\\n")
    score = stage.function(config.reward)
    program = f"import {score.__module__} as m; print(m.score('four'))"
    answers = {
        "here": score("four"),
        "spawned": multiprocessing.get_context("spawn").Pool(1).apply(score, ["four"]),
        "started": int(subprocess.check_output([sys.executable, "-c", program], env=environment())),
    }
    return published(stage, answers | stage.gang(asked, score))


def environment():
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


def asked(rank, score):
    return {"rank": score("four")}


def published(stage, marks):
    for name, mark in marks.items():
        stage.figure("eval/" + name.rpartition(":")[2], mark)
    (stage.output / "report.json").write_text(str(marks))
    return stage.publish(Report)
'''
REWARD = '''
from letters import count


class Score:
    pass


LIMIT = 3
shorter = lambda response: 0


def score(response):
    """How long a response is."""
    return count(response)


def best(response):
    return 10


def made():
    def inner(response):
        return 0

    return inner


nested = made()
'''
LETTERS = "def count(text):\n    return len(text)\n\n\ndef unread(text):\n    return 0\n"
TOML = """
pipeline = "marks"

[stages.marked]
uses = "./kinds.py:mark"
reward = "./reward.py:score"

[stages.plain]
uses = "./kinds.py:mark"
"""


class Marks:
    """A pipeline in its own folder, with two stages that name the user's functions."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = Store(folder / "store")
        for name, text in (("kinds.py", KINDS), ("reward.py", REWARD), ("letters.py", LETTERS), ("marks.toml", TOML)):
            self.write(name, text)

    def write(self, name: str, text: str) -> None:
        (self.folder / name).parent.mkdir(exist_ok=True)
        (self.folder / name).write_text(text)

    def edit(self, name: str, old: str, new: str) -> None:
        text = (self.folder / name).read_text()
        assert old in text
        self.write(name, text.replace(old, new))

    def graph(self, *overrides: str) -> Any:
        for name in ("gptline_user_kinds", "gptline_user_reward", "gptline_user_elsewhere", "letters"):  # as in a new process
            sys.modules.pop(name, None)
        sys.path[:] = [each for each in sys.path if not Path(each, "kinds.py").exists()]
        return build(load(self.folder / "marks.toml", overrides))

    def planned(self, *overrides: str) -> dict[str, Any]:
        return {each.stage: each for each in Planner(self.graph(*overrides), self.store, ROOT).plan()}

    def faults(self, *overrides: str) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            self.graph(*overrides)
        return [str(fault) for fault in caught.value.faults]

    def run(self, *overrides: str, inline: bool = True) -> int:
        options = Options("gptline run marks.toml", "gptline run marks.toml", inline=inline)
        return Run(self.graph(*overrides), self.store, options, lambda event: None).execute()

    def figures(self, stage: str) -> dict[str, float]:
        (action,) = [each for each in self.store.all_actions() if each.stage == stage]
        return action.figures


@pytest.fixture
def marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Marks:
    monkeypatch.setattr("pipelines.run.runner.start_tracking", lambda *_: NoTracker())
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # Python would take two edits within a second for one
    return Marks(tmp_path)


def test_a_stage_calls_the_functions_that_its_settings_name(marks: Marks):
    marks.edit("reward.py", "nested = made()", "def half(response):\n    return count(response) / 2")
    assert marks.run("stages.marked.others=['./reward.py:best']", "stages.marked.keys={more=['./reward.py:half']}") == 0
    assert marks.figures("marked") == {"eval/score": 4, "eval/best": 10, "eval/half": 2}  # four letters
    assert marks.figures("plain") == {"eval/best": 10}  # named by a default


@pytest.mark.parametrize(
    ("file", "old", "new", "changed"),
    [
        ("reward.py", "return count(response)", "return 2 * count(response)", ["marked"]),
        ("letters.py", "return len(text)", "return len(text) + 1", ["marked"]),
        ("reward.py", "return 10", "return 11", ["marked", "plain"]),
        ("reward.py", "How long a response is.", "Its length.", []),
        ("reward.py", "LIMIT = 3", "LIMIT = 4", []),
        ("letters.py", "return 0", "return 1", []),
    ],
)
def test_an_edit_changes_only_the_keys_of_the_stages_that_reach_it(marks: Marks, file: str, old: str, new: str, changed: list[str]):
    before = marks.planned()
    marks.edit(file, old, new)
    after = marks.planned()
    assert [name for name in after if after[name].key != before[name].key] == changed


def test_the_key_has_the_settings_value_and_the_code_behind_it(marks: Marks):
    leaves = marks.planned()["marked"].leaves
    assert leaves["config.reward"] == "./reward.py:score"
    assert {"code.reward:score", "code.letters:count", "code.kinds:mark"} <= leaves.keys()
    assert not {"code.reward:LIMIT", "code.letters:unread"} & leaves.keys()


def test_the_folders_of_the_pipeline_and_its_snapshot_are_not_in_the_key(marks: Marks, tmp_path_factory: pytest.TempPathFactory):
    marks.run()
    assert [each.action for each in marks.planned().values()] == ["reuse", "reuse"]
    other = Marks(tmp_path_factory.mktemp("elsewhere"))
    assert {name: each.key for name, each in other.planned().items()} == {name: each.key for name, each in marks.planned().items()}


def test_settings_that_a_users_function_takes_or_builds_are_in_the_key_as_code(marks: Marks):
    marks.write("reward.py", REWARD.replace("def score(response):", "def score(response, shape: Shape = None):"))
    marks.edit(
        "reward.py", "class Score:", "from gpt.settings import Settings\n\n\nclass Shape(Settings):\n    size: int = 3\n\n\nclass Score:"
    )
    before = marks.planned()
    marks.edit("reward.py", "size: int = 3", "size: int = 4")
    after = marks.planned()
    assert [name for name in after if after[name].key != before[name].key] == ["marked"]


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("./gone.py:score", "'./gone.py:score': there is no Python file "),
        ("./reward.py:scor", "'./reward.py:scor': ./reward.py has no function 'scor'; its functions: shorter, score, best, made"),
        ("./reward.py:Score", "'./reward.py:Score': ./reward.py has 'Score', a class, not a function; its functions: shorter, score, best"),
        ("./reward.py:LIMIT", "'./reward.py:LIMIT': ./reward.py has 'LIMIT', of type int, not a function; its functions: "),
        ("reward", "is 'reward', expected a function of your own, such as './file.py:function'"),
        (
            "./reward.py:shorter",
            "'./reward.py:shorter' is reward.<lambda>; expected a `def` at the top level of reward.py, "
            "since other processes import it by its name",
        ),
        ("./reward.py:nested", "'./reward.py:nested' is reward.made.<locals>.inner; expected a `def` at the top level of reward.py"),
        ("./reward.py:count", "'./reward.py:count' is letters.count; expected a `def` at the top level of reward.py"),
        ("./gpt.py:score", "'./gpt.py:score': gpt.py has the name of a package of gptline; rename the file"),
        ("./broken.py:score", "can't be imported: ZeroDivisionError: division by zero"),
        ("./aside/elsewhere.py:score", "'./aside/elsewhere.py:score' and './kinds.py:mark' are in two folders, but a stage's own code is"),
    ],
)
def test_a_reference_that_is_not_a_function_of_the_users_is_refused_with_the_reason(marks: Marks, reference: str, expected: str):
    marks.write("gpt.py", REWARD)
    marks.write("broken.py", "1 / 0")
    marks.write("aside/elsewhere.py", "def score(response):\n    return 0\n")
    (fault,) = marks.faults(f"stages.marked.reward='{reference}'")
    assert fault.startswith("stages.marked.reward: ")
    assert expected in fault


def test_a_fault_in_a_list_names_the_index_and_a_number_is_refused(marks: Marks):
    (fault,) = marks.faults("stages.marked.others=['./reward.py:best', './reward.py:worst']")
    assert fault.startswith("stages.marked.others.1: './reward.py:worst': ./reward.py has no function 'worst'")
    assert marks.faults("stages.marked.reward=3") == ["stages.marked.reward: expected a string, found 3"]


def test_two_files_of_one_name_in_two_folders_are_refused_for_functions_too(marks: Marks):
    marks.write("aside/letters.py", LETTERS)
    head = "import letters\nfrom pipelines.artifacts import Report\nfrom pipelines.stage import StageContext\n\n\n"
    marks.write("aside/counting.py", head + "def mark(stage: StageContext) -> Report: ...\n")
    marks.write("marks.toml", TOML.replace("[stages.marked]", '[stages.first]\nuses = "./aside/counting.py:mark"\n\n[stages.marked]'))
    (fault,) = marks.faults()
    assert fault.startswith("stages.marked.reward: ")
    assert fault.endswith("/letters.py have the same name; rename one")


def test_a_stage_cannot_get_a_function_that_no_setting_names(marks: Marks):
    marks.edit("kinds.py", "stage.function(each)", "stage.function('./reward.py:score')")
    assert marks.run() == 1
    (last,) = _ended(marks, "plain")
    has = "./kinds.py:mark has ['./kinds.py:mark', './reward.py:best']"
    assert last.error.startswith(f"ValueError: expected the value of a UserFunction setting, found './reward.py:score'; {has}")


def _ended(marks: Marks, stage: str) -> list[StageEnded]:
    events = read_journal(marks.store, marks.store.runs()[-1])
    return [each for each in events if isinstance(each, StageEnded) and each.stage == stage]


GANG = """
[stages.gang]
uses = "./kinds.py:in_a_gang"
preset = "gpt2-nano"
steps = 1
global_batch_size = 2
lr = 1e-3
engine = "torch"
resources.ranks = 2
"""


@pytest.mark.slow
def test_every_process_runs_the_frozen_code_although_the_file_was_edited_meanwhile(marks: Marks):
    marks.write("marks.toml", 'pipeline = "marks"\n' + GANG + f'reward = "./reward.py:score"\nwhere = "{marks.folder}"\n')
    assert marks.run(inline=False) == 0, _ended(marks, "gang")
    assert marks.figures("gang") == {"eval/here": 4, "eval/spawned": 4, "eval/started": 4, "eval/rank": 4}
    assert marks.planned()["gang"].reason == "code of reward:score changed"


@pytest.mark.slow
def test_an_inline_stage_whose_file_was_edited_meanwhile_is_not_recorded(marks: Marks):
    marks.write("marks.toml", 'pipeline = "marks"\n' + GANG + f'reward = "./reward.py:score"\nwhere = "{marks.folder}"\n')
    assert marks.run(inline=True) == 1
    assert _ended(marks, "gang")[-1].error.startswith("its code was edited after this run was planned")
    assert marks.planned()["gang"].action == "run"


@pytest.mark.slow
def test_a_function_outside_the_pipelines_folder_is_found_in_the_snapshot(marks: Marks):
    above = marks.folder / "line"
    above.mkdir()
    text = TOML.replace("./kinds.py", "../kinds.py").replace("./reward.py", "../reward.py")
    (above / "marks.toml").write_text(text.replace('[stages.plain]\nuses = "../kinds.py:mark"\n', ""))
    marks.edit("kinds.py", '"./reward.py:best"', '"../reward.py:best"')
    marks.folder = above
    assert marks.run(inline=False) == 0
    assert marks.figures("marked") == {"eval/score": 4, "eval/best": 10}


@pytest.mark.parametrize(
    ("line", "module", "place"),
    [
        ("from pipelines.records import Record", "pipelines.records", "pipelines.ingest"),
        ("from pipelines.dialogues import read", "pipelines.dialogues", "pipelines.ingest"),
        ("import pipelines.reading", "pipelines.reading", "pipelines.ingest"),
        ("from pipelines.documents import split", "pipelines.documents", "pipelines.ingest"),
        ("from pipelines.graph import build", "pipelines.graph", "pipelines.plan.graph"),
        ("from pipelines.fingerprint import Code", "pipelines.fingerprint", "pipelines.plan.code"),
        ("from pipelines.store import Store", "pipelines.store", "pipelines.store.store"),
    ],
)
def test_importing_a_module_by_its_earlier_name_fails_with_the_new_name(
    marks: Marks, monkeypatch: pytest.MonkeyPatch, line: str, module: str, place: str
):
    if module != "pipelines.store":  # that is a package now, without a Store
        monkeypatch.setitem(sys.modules, module, None)  # as if it did not exist
    marks.edit("reward.py", "from letters import count", f"from letters import count\n{line}")
    (fault,) = [each for each in marks.faults() if each.startswith("stages.marked.reward: ")]
    assert f"reward.py can't be imported: {module} has moved; import from {place} (" in fault


def test_the_public_modules_are_still_importable(marks: Marks):
    marks.edit(
        "reward.py",
        "from letters import count",
        "from letters import count\nfrom pipelines.artifacts import Documents, Model, Report\n"
        "from pipelines.stage import Source, StageConfig, StageContext, StageFailure",
    )
    assert marks.run() == 0


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ("    hidden: int = Field(default=1, exclude=True)\n", "hidden"),
        ("    inner: Inner = Inner()\n", "inner.hidden"),
        ("    inner: list[Inner] | None = None\n", "inner.hidden"),
    ],
)
def test_a_field_that_pydantic_excludes_is_refused(marks: Marks, config: str, field: str):
    head = "from pydantic import Field\nfrom gpt.settings import PretrainSettings, Settings, UserFunction\n"
    inner = "class Inner(Settings):\n    hidden: int = Field(default=1, exclude=True)\n\n\nclass MarkConfig"
    marks.edit("kinds.py", "from gpt.settings import PretrainSettings, UserFunction\n", head)
    marks.edit("kinds.py", "class MarkConfig", inner)
    marks.edit("kinds.py", "    reward: UserFunction | None = None\n", "    reward: UserFunction | None = None\n" + config)
    assert marks.faults()[0] == (
        f"stages.marked.{field}: has Field(exclude=True), so it would reach neither the key nor the worker; "
        "remove that (a field that can't change the result may be Operational)"
    )
