from __future__ import annotations

import datetime
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.plan.config import ConfigError, load
from pipelines.plan.graph import Graph, build

DOCUMENTS = """
pipeline = "test"
seed = 1

[stages.documents]
uses = "ingest"
source = "text"
files = ["*.txt"]
"""
LINE = (
    DOCUMENTS
    + """
[stages.tokenizer]
algorithm = "bytes"
inputs = { documents = "documents" }

[stages.tokenize]
inputs = { documents = ["documents"], tokenizer = "tokenizer" }

[stages.pretrain]
inputs = { tokens = "tokenize" }
preset = "gpt2-nano"
steps = 10
global_batch_size = 8
lr = 1e-3
"""
)


def built(tmp_path: Path, text: str, *overrides: str) -> Graph:
    (tmp_path / "a.txt").write_text("To be, or not to be.\n")
    path = tmp_path / "test.toml"
    path.write_text(text)
    return build(load(path, overrides))


def faults(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        built(tmp_path, text, *overrides)
    return [str(fault) for fault in caught.value.faults]


def test_a_valid_file_has_its_stages_in_the_order_of_their_inputs(tmp_path: Path):
    shuffled = LINE.replace("[stages.documents]", "[stages.late]")
    graph = built(tmp_path, LINE)
    assert list(graph.stages) == ["documents", "tokenizer", "tokenize", "pretrain"]
    assert graph.needed(["tokenize"]) == {"documents", "tokenizer", "tokenize"}
    assert graph.needed(["pretrain"], given=["tokenize"]) == {"pretrain", "tokenize"}
    assert any("no stage 'documents'" in fault for fault in faults(tmp_path, shuffled))


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("seed = 1", "sede = 1", "sede: unknown key; did you mean 'seed'?"),
        ("steps = 10", "stepps = 10", "stages.pretrain.stepps: unknown key; did you mean 'steps'?"),
        ("lr = 1e-3", "lr = 'fast'", "stages.pretrain.lr: expected a number, found 'fast'"),
        ("lr = 1e-3", "", "stages.pretrain.lr: is missing"),
        ("steps = 10", "steps = 'ten'", "stages.pretrain.steps: expected a whole number, found 'ten'"),
        ("steps = 10", "steps = 10\nbias = 'maybe'", "stages.pretrain.bias: expected true or false, found 'maybe'"),
        ("steps = 10", "steps = true", "stages.pretrain.steps: expected a whole number, found true"),
        ("steps = 10", "steps = '10'", "stages.pretrain.steps: expected a whole number, found '10'"),
        ("steps = 10", "steps = 10.0", "stages.pretrain.steps: expected a whole number, found 10.0"),
        ("steps = 10", "steps = 10\nbias = 1", "stages.pretrain.bias: expected true or false, found 1"),
        ("steps = 10", "steps = 10\nzero_stage = true", "stages.pretrain.zero_stage: expected a whole number, found true"),
        ("steps = 10", "steps = 10\nresources.ranks = true", "stages.pretrain.resources.ranks: expected a whole number, found true"),
        ("lr = 1e-3", "lr = '1e-3'", "stages.pretrain.lr: expected a number, found '1e-3'"),
        ("seed = 1", "seed = true", "seed: expected a whole number, found true"),
        ("lr = 1e-3", "lr = 0", "stages.pretrain.lr: expected more than 0, found 0"),
        ("steps = 10", "steps = 10\nn_layer = 0", "stages.pretrain.n_layer: expected at least 1, found 0"),
        ("steps = 10", "steps = 10\nn_layer = 4097", "stages.pretrain.n_layer: expected at most 4096, found 4097"),
        ("steps = 10", "steps = 10\nn_head = 4097", "stages.pretrain.n_head: expected at most 4096, found 4097"),
        ("steps = 10", "steps = 10\nn_embd = 1_000_000_000", "stages.pretrain.n_embd: expected at most 131072, found 1000000000"),
        ("steps = 10", "steps = 10\nn_hidden = 1_000_000_000", "stages.pretrain.n_hidden: expected at most 16777216, found 1000000000"),
        ("steps = 10", "steps = 10\nseq_len = 1_000_000_000", "stages.pretrain.seq_len: expected at most 16777216, found 1000000000"),
        ("steps = 10", "steps = 10\ndropout = 1.0", "stages.pretrain.dropout: expected less than 1, found 1.0"),
        ("batch_size = 8", "batch_size = 1_000_000_000", "stages.pretrain.global_batch_size: expected at most 16777216, found 1000000000"),
        ('["*.txt"]', '"a.txt"', "stages.documents.files: expected a list, found 'a.txt'"),
        ("seed = 1", "seed = 1\ntracking = 'sqlite'", "tracking: expected a table, found 'sqlite'"),
        ("steps = 10", "steps = 10\nresources.labels = ['big']", "stages.pretrain.resources.labels: expected a table, found ['big']"),
        ('"ingest"', '"ingets"', "stages.documents.uses: there is no stage kind 'ingets'; did you mean 'ingest'?"),
        ('"gpt2-nano"', '"gpt2-nanno"', "Did you mean 'gpt2-nano'?"),
        ("tokens = ", "token = ", "stages.pretrain.inputs.token: unknown input; did you mean 'tokens'?"),
        ('tokens = "tokenize"', 'tokens = "documents"', "'documents' makes documents, expected tokens"),
        ('tokens = "tokenize"', 'tokens = "tokenise"', "there is no stage 'tokenise'; did you mean 'tokenize'?"),
        (
            '{ tokens = "tokenize" }',
            "{}",
            "stages.pretrain.inputs.tokens: is missing; pretrain needs several tokens; tokens = ['tokenize'] would fit",
        ),
        ('["*.txt"]', '["*.md"]', "*.md"),
        ("global_batch_size = 8", "global_batch_size = 8\nmicro_batch_size = 3", "the nearest that fit are 6 and 9"),
        ('uses = "ingest"', 'uses = "./mine.py:clean"', "there is no Python file"),
        ("steps = 10", "steps = 10\nprecision = 'fp16'", "needs a GPU"),
        ('algorithm = "bytes"', 'algorithm = "bpe"', "vocab_size is missing"),
        ("seed = 1", "seed = 1\n[tracking]\nuri = 'http://me:hush@host'", "tracking.uri: holds a password"),
        (
            '"tokenize"',
            '"sha:12"',
            "is not a reference; expected a stage's name, sha256:<at least 8 digits>, run:<id>/<stage>, model:<pipeline>@newest "
            "or hf:<folder>",
        ),
    ],
)
def test_each_fault_says_where_it_is_what_was_expected_and_what_was_found(tmp_path: Path, old: str, new: str, expected: str):
    assert old in LINE
    assert any(expected in fault for fault in faults(tmp_path, LINE.replace(old, new, 1))), faults(tmp_path, LINE.replace(old, new, 1))


def test_a_value_of_a_users_own_type_is_converted_from_toml(tmp_path: Path):
    (tmp_path / "mine.py").write_text(
        "import datetime, pathlib\nfrom pipelines.artifacts import Documents\nfrom pipelines.stage import StageConfig\n\n"
        "class C(StageConfig):\n    words: tuple[str, ...]\n    path: pathlib.Path\n    day: datetime.date\n    share: float\n\n"
        "def mine(config: C) -> Documents: ...\n"
    )
    settings = "words = ['a', 'b']\npath = 'a/b'\nday = 2026-02-03\nshare = 1\n"
    config = built(tmp_path, f'pipeline = "p"\n[stages.mine]\nuses = "./mine.py:mine"\n{settings}').stages["mine"].config
    assert config.model_dump() == {"words": ("a", "b"), "path": Path("a/b"), "day": datetime.date(2026, 2, 3), "share": 1.0}
    assert type(config).model_validate(config.model_dump(mode="json")) == config  # as a worker reads it


@pytest.mark.parametrize("depth", [300, 3000])  # more than JSON's parser takes; more than Python's stack takes
def test_tables_nested_too_deeply_are_a_fault(tmp_path: Path, depth: int):
    assert faults(tmp_path, LINE + f"[stages.{'a.' * depth}a]") == ["file: is nested too deeply to be read"]


@pytest.mark.parametrize(
    "uri",
    [
        *("", "nonsense", "./mlruns", "file:///tmp/mlruns", "ftp://host", "databricks", "sqlite:", "sqlite://"),
        *("http://", "http:host", "http:///path", "http://:5000", "http://host:port", "http://host:99999", "http://my host"),
    ],
)
def test_an_address_that_mlflow_rejects_is_refused_when_the_file_is_read(tmp_path: Path, uri: str):
    (fault,) = faults(tmp_path, LINE, f"tracking.uri={uri!r}")
    assert fault.startswith("tracking.uri: expected 'sqlite' (a file inside the store), a server such as")
    assert fault.endswith(f"found {uri!r}")


@pytest.mark.parametrize(
    "uri",
    ["sqlite", "sqlite:////data/mlflow.db", "http://127.0.0.1:5000", "https://me@mlflow.example/team/", "postgresql+psycopg2://host/runs"],
)
def test_an_address_that_mlflow_accepts_is_left_unchanged(tmp_path: Path, uri: str):
    assert built(tmp_path, LINE, f"tracking.uri={uri!r}").loaded.file.tracking.uri == uri


@pytest.mark.parametrize("verb", ["sync", "ui"])
def test_an_address_on_the_command_line_is_checked_like_one_in_a_file(tmp_path: Path, verb: str):
    done = CliRunner().invoke(app, [verb, "--store", str(tmp_path), "--tracking", "./mlruns"])
    assert str(done.exception).startswith("--tracking: expected 'sqlite' (a file inside the store), a server such as")
    assert list(tmp_path.iterdir()) == []


def test_all_faults_are_reported_at_once_and_nothing_is_written(tmp_path: Path):
    text = LINE.replace("steps = 10", "stepps = 10").replace("lr = 1e-3", "lr = -1").replace('"bytes"', '"byte"')
    found = faults(tmp_path, text)
    assert len(found) == 4  # steps is missing, too
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.txt", "test.toml"]


def test_faults_of_the_file_of_a_stages_settings_and_of_its_inputs_come_together(tmp_path: Path):
    text = LINE.replace("seed = 1", "sede = 1").replace("steps = 10", "steps = -1").replace('tokens = "tokenize"', 'tokens = "tokenise"')
    found = faults(tmp_path, text)
    assert len(found) == 3
    assert any(each.startswith("sede: unknown key") for each in found)
    assert any(each.startswith("stages.pretrain.steps: expected at least 1, found -1") for each in found)
    assert any(each.startswith("stages.pretrain.inputs.tokens: there is no stage 'tokenise'") for each in found)


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        ("[Source('gone.txt', data / 'gone.txt')]", "stages.mine: there is no readable file"),
        ("open(data / 'gone.txt')", "stages.mine: its sources() failed: FileNotFoundError"),
    ],
)
def test_a_users_function_that_names_missing_files_is_a_fault(tmp_path: Path, sources: str, expected: str):
    (tmp_path / "mine.py").write_text(
        "from pipelines.artifacts import Documents\nfrom pipelines.stage import Source, StageConfig, StageContext\n\n"
        f"class C(StageConfig):\n    def sources(self, data):\n        return {sources}\n\n"
        "def mine(config: C, stage: StageContext) -> Documents: ...\n"
    )
    assert any(expected in each for each in faults(tmp_path, 'pipeline = "p"\n[stages.mine]\nuses = "./mine.py:mine"\n'))


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("@field_validator('size')\n    def check(cls, value): {}[value]", ": its settings can't be checked: KeyError: 3"),
        ("@field_validator('size')\n    def check(cls, value): value + 'a'", ": its settings can't be checked: TypeError: "),
        ("@model_validator(mode='after')\n    def check(self): raise SystemExit(4)", ": its settings can't be checked: SystemExit: 4"),
        ("@field_serializer('size')\n    def write(self, value): {}[value]", ".size: is 3, which can't be recorded as JSON: "),
        ("other: Any = object", ".other: is <class 'object'>, which can't be recorded as JSON: Unable to serialize"),
        ("other: int = None", ".other: expected a whole number, found None"),
    ],
)
def test_a_users_settings_that_fail_by_themselves_are_a_fault(tmp_path: Path, body: str, expected: str):
    (tmp_path / "mine.py").write_text(
        "from pathlib import Path\nfrom typing import Any\nfrom pydantic import field_serializer, field_validator, model_validator\n"
        "from pipelines.artifacts import Documents\nfrom pipelines.stage import StageConfig\n\n"
        f"class C(StageConfig):\n    size: int\n    path: Path = Path('a')\n    {body}\n\n"
        "def mine(config: C) -> Documents: ...\n"
    )
    (fault,) = faults(tmp_path, 'pipeline = "p"\n[stages.mine]\nuses = "./mine.py:mine"\nsize = 3\n')
    assert fault.startswith(f"stages.mine{expected}")


def test_two_modules_of_one_name_in_two_folders_are_refused(tmp_path: Path):
    text = 'pipeline = "p"\n'
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "words.py").write_text(f"WORD = {name!r}\n")
        (tmp_path / name / f"clean_{name}.py").write_text(
            "import words\nfrom pipelines.artifacts import Documents\nfrom pipelines.stage import StageContext\n\n"
            "def clean(stage: StageContext) -> Documents:\n    return words.WORD\n"
        )
        text += f'[stages.{name}]\nuses = "./{name}/clean_{name}.py:clean"\n'
    assert any("have the same name; rename one" in each for each in faults(tmp_path, text))


def test_a_cycle_is_reported_with_the_names_of_its_stages(tmp_path: Path):
    text = LINE.replace('inputs = { documents = "documents" }', 'inputs = { documents = "clean" }')
    (tmp_path / "mine.py").write_text(
        "from pipelines.artifacts import Documents, Tokens\nfrom pipelines.stage import StageContext\n\n"
        "def clean(tokens: Tokens, stage: StageContext) -> Documents: ...\n"
    )
    text += '\n[stages.clean]\nuses = "./mine.py:clean"\ninputs = { tokens = "tokenize" }\n'
    assert any("tokenizer reads clean reads tokenize reads tokenizer: a cycle" in fault for fault in faults(tmp_path, text))


def test_an_override_sets_one_value_and_a_misspelled_one_names_the_nearest(tmp_path: Path):
    graph = built(tmp_path, LINE, "stages.pretrain.lr=3e-4", "stages.pretrain.preset=llama-nano")
    assert graph.stages["pretrain"].config.lr == 3e-4  # type: ignore[attr-defined]
    assert graph.stages["pretrain"].config.preset == "llama-nano"  # type: ignore[attr-defined]
    assert faults(tmp_path, LINE, "stages.pretrian.lr=1") == [
        "--set stages.pretrian.lr=1: there is no stage 'pretrian'; did you mean 'pretrain'?"
    ]
    assert "expected NAME=VALUE" in faults(tmp_path, LINE, "lr")[0]


def test_ranks_must_share_the_batch(tmp_path: Path):
    assert any("can't be shared by 3 ranks" in fault for fault in faults(tmp_path, LINE, "stages.pretrain.resources.ranks=3"))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def clean(documents, stage: StageContext) -> Documents: ...", "parameter 'documents' of clean is annotated None"),
        ("def clean(documents: Documents, stage: StageContext): ...", "expected the artifact type that it makes"),
        ("def clean(documents: Documents, stage: StageContext) -> str: ...", "expected the artifact type that it makes"),
        ("def other(documents: Documents) -> Documents: ...", "has no function 'clean'; its functions: other"),
        ("def clean(documents: Documents, /) -> Documents: ...", "parameter 'documents' of clean can't be passed by name"),
        ("def clean(*documents: Documents) -> Documents: ...", "parameter 'documents' of clean can't be passed by name"),
        ("def clean(**documents: Documents) -> Documents: ...", "parameter 'documents' of clean can't be passed by name"),
        (
            "def clean(a: C, documents: Documents, b: C) -> Documents: ...",
            "2 parameters with a Settings class: a, b; expected one",
        ),
        (
            "def clean(a: StageContext, b: StageContext) -> Documents: ...",
            "clean has 2 parameters with a StageContext: a, b",
        ),
        ("def clean(documents: List) -> Documents: ...", "parameter 'documents' of clean is annotated typing.List"),
        ("def clean(documents: 'Documents | 3') -> Documents: ...", "an annotation can't be resolved: TypeError"),
        ("import no_such_module", "can't be imported: ModuleNotFoundError"),
        ("raise GeneratorExit('enough')", "can't be imported: GeneratorExit: enough"),
        ("class Mine(BaseException): ...\n\nraise Mine(3)", "can't be imported: Mine: 3"),
    ],
)
def test_a_function_that_cannot_be_a_kind_says_why(tmp_path: Path, source: str, expected: str):
    (tmp_path / "mine.py").write_text(
        "from typing import List\nfrom pipelines.artifacts import Documents\nfrom pipelines.stage import StageConfig, StageContext\n\n"
        f"class C(StageConfig): ...\n\n{source}\n"
    )
    text = DOCUMENTS + '\n[stages.clean]\nuses = "./mine.py:clean"\ninputs = { documents = "documents" }\n'
    assert any(expected in fault for fault in faults(tmp_path, text))


def test_text_that_is_not_utf8_is_refused_before_it_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    byte = os.fsdecode(b"\xff")
    assert faults(tmp_path, LINE, f"stages.documents.license={byte}") == [
        r"--set 'stages.documents.license=\udcff': expected text, found bytes that are not UTF-8 and can't be recorded"
    ]
    assert faults(tmp_path, LINE, f"stages.{byte}.lr=1") == [
        r"--set 'stages.\udcff.lr=1': expected text, found bytes that are not UTF-8 and can't be recorded"
    ]
    (tmp_path / byte).mkdir()
    with pytest.raises(ConfigError, match=r"file: its path '.*/\\udcff/test.toml' is not UTF-8 and can't be recorded; rename it"):
        built(tmp_path / byte, LINE)
    monkeypatch.chdir(tmp_path / byte)
    assert faults(tmp_path, LINE) == [rf"store.root: its path '{tmp_path}/\udcff/.gptline' is not UTF-8 and can't be recorded; rename it"]


def test_ctrl_c_while_a_users_file_is_imported_is_not_a_fault_of_the_file(tmp_path: Path):
    (tmp_path / "mine.py").write_text("raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        built(tmp_path, 'pipeline = "p"\n[stages.mine]\nuses = "./mine.py:mine"\n')


def test_a_missing_file_names_its_neighbours(tmp_path: Path):
    (tmp_path / "quickstart.toml").touch()
    with pytest.raises(ConfigError, match=r"there is no such file; did you mean 'quickstart.toml'\?"):
        load(tmp_path / "quickstrat.toml")


def test_operational_settings_are_not_in_the_key_and_the_others_are(tmp_path: Path):
    stage = built(tmp_path, LINE).stages["pretrain"]
    semantic, operational = stage.semantic(), stage.operational()
    assert {"lr", "steps", "global_batch_size", "precision", "preset", "beta2"} <= set(semantic)
    assert {"micro_batch_size", "zero_stage", "engine", "log_every", "checkpoint_every", "max_restarts", "ranks"} <= set(operational)
    assert not set(semantic) & set(operational)
