"""What `gptline describe` shows about stage kinds, tables and a user's own functions."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.plan.describe import TABLES, describe, describe_all, known_kinds, settings_of
from pipelines.plan.graph import load_kind

MINE = '''"""Clean texts."""

from typing import Literal

from gpt.settings import Operational, Settings, UserFunction
from pipelines.artifacts import Documents, Model
from pipelines.stage import StageConfig
from pydantic import Field


class Rule(Settings):
    share: float = Field(gt=0, le=0.5)
    """How much of it."""


class CleanConfig(StageConfig):
    words: list[str]
    """Words to remove."""
    mode: Literal["soft", "hard"] = "soft"
    by: UserFunction | None = None
    rules: tuple[Rule, ...] = ()
    workers: Operational[int] = Field(default=2, ge=1)
    """Processes."""


def clean(config: CleanConfig, documents: list[Documents], model: Model | None) -> Documents:
    """Remove words from texts. It keeps the rest."""
'''


def test_a_users_function_is_described_from_its_signature_and_its_settings(tmp_path: Path):
    (tmp_path / "mine.py").write_text(MINE)
    assert describe("./mine.py:clean", tmp_path) == [
        "./mine.py:clean: Remove words from texts.",
        "",
        "inputs",
        "  documents  several documents",
        "  model      model, optional",
        "output: documents",
        "",
        "settings that are part of the key: changing one rebuilds the stage",
        "",
        "  words: list of text; required",
        "      Words to remove.",
        '  mode: "soft" | "hard"; default "soft"',
        '  by: a function of yours, "./file.py:function"; not set',
        "  rules: list of tables; default []",
        "  rules[].share: number, more than 0, at most 0.5; required",
        "      How much of it.",
        "",
        "operational settings: changing one rebuilds nothing",
        "",
        "  workers: whole number, at least 1; default 2",
        "      Processes.",
        "",
        "every stage also takes `uses`, `inputs`, `resources` and `gate`: see `gptline describe resources`, `... gate`",
    ]


def test_the_first_page_lists_every_kind_and_every_table_in_one_line():
    lines = describe_all()
    for name in (*known_kinds(), *TABLES):
        assert len([line for line in lines if line.startswith(f"  {name} ")]) == 1


@pytest.mark.parametrize("name", known_kinds())
def test_every_field_of_a_kind_is_listed_with_its_default_and_whether_it_is_in_the_key(name: str):
    config = load_kind(name, Path()).config
    listed = {each.name: each for each in settings_of(config)}
    assert set(config.model_fields) <= set(listed)
    for field, setting in listed.items():
        assert setting.type_name, field
        assert setting.default or setting.type_name == "table", field
    operational = {field for field, each in config.model_fields.items() if "operational" in map(repr, each.metadata)}
    assert {field for field, each in listed.items() if not each.in_key and "." not in field} == operational


@pytest.mark.parametrize("name", list(TABLES))
def test_every_table_is_described(name: str):
    assert len(describe(name, Path())) > 2


def test_an_unknown_kind_is_refused_with_the_nearest_one():
    with pytest.raises(ValueError, match="did you mean 'sft'"):
        describe("stf", Path())
