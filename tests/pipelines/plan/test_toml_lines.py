"""Line numbers of a TOML file's keys: each is right or absent."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.plan.toml_lines import is_one_value, lines_of
from pipelines.plan.toml_writer import write_toml

CONFIGS = sorted((Path(__file__).parents[3] / "configs").glob("*.toml"))
TEXT = '''# a comment = "not a key"
pipeline = "p"
"quoted key".'and.dotted' = 1
text = """
not = "a key"
[not.a.table]
"""

[stages.rl]   # [stages.none]
files = [
    "a",      # ]
    "b]",
]
inputs = { policy = "sft", prompts = ["x",
    "y"] }
resources.ranks = 2
day = 2026-02-03 10:00:00

[[stages.rl.gate]]
min = 1

[[stages.rl.gate]]
max = 2
[stages.rl.gate.deeper]
name = 'its'
'''


def test_every_key_table_and_list_item_has_its_line():
    assert lines_of(TEXT) == {
        ("pipeline",): 2,
        ("quoted key",): 3,
        ("quoted key", "and.dotted"): 3,
        ("text",): 4,
        ("stages", "rl"): 9,
        ("stages", "rl", "files"): 10,
        ("stages", "rl", "files", 0): 11,
        ("stages", "rl", "files", 1): 12,
        ("stages", "rl", "inputs"): 14,
        ("stages", "rl", "inputs", "policy"): 14,
        ("stages", "rl", "inputs", "prompts"): 14,
        ("stages", "rl", "inputs", "prompts", 0): 14,
        ("stages", "rl", "inputs", "prompts", 1): 15,
        ("stages", "rl", "resources"): 16,
        ("stages", "rl", "resources", "ranks"): 16,
        ("stages", "rl", "day"): 17,
        ("stages", "rl", "gate"): 19,
        ("stages", "rl", "gate", 0): 19,
        ("stages", "rl", "gate", 0, "min"): 20,
        ("stages", "rl", "gate", 1): 22,
        ("stages", "rl", "gate", 1, "max"): 23,
        ("stages", "rl", "gate", 1, "deeper"): 24,
        ("stages", "rl", "gate", 1, "deeper", "name"): 25,
    }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_line_of_a_setting_of_a_shipped_config_is_the_one_that_names_it(path: Path):
    text = path.read_text(encoding="utf-8")
    lines = lines_of(text)
    assert len(lines) > 20
    for keys, line in lines.items():
        if isinstance(keys[-1], str):
            assert keys[-1] in text.splitlines()[line - 1]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('a = """one"""\nb = 1', 2),
        ('a = """"quoted" at both ends""""\nb = 1', 2),
        ('a = """\\"""\\\n"""\nb = 1', 3),
        ("a = '''\n'''''\nb = 1", 3),
        ('a = "\\"#"\nb = 1', 2),
        ("a = '\"'\r\nb = 1", 2),
        ("a = [[], [{}], [\n]]\nb = 1", 3),
        ("a = [1, # two\n 3]\n\n b = 1", 4),
        ("a.c = {}\nb = 1", 2),
    ],
)
def test_a_key_behind_a_tricky_value_has_its_line(text: str, line: int):
    assert set(tomllib.loads(text)) == {"a", "b"}
    assert lines_of(text)[("b",)] == line


def test_a_text_that_is_not_toml_has_no_lines():
    assert lines_of("a = [1,\n") == {}
    assert lines_of("a = 1\na = 2\n") == {}
    assert lines_of("a.b = 1\n" + "[" * 5000) == {}


NAMES = st.text(st.characters(exclude_categories=("Cs",)), max_size=3)
VALUES = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(NAMES, VALUES, max_size=4))
def test_every_written_document_is_read_back_and_every_leaf_has_a_line(document: dict):
    text = write_toml(document)
    assert tomllib.loads(text) == document
    lines = lines_of(text)
    for name, value in document.items():
        assert (name,) in lines or isinstance(value, dict)


@pytest.mark.parametrize(
    ("text", "one"),
    [
        ("3e-4", True),
        (" [1,\n 2] ", True),
        ('{ a = "b" }', True),
        ('"a\\nb"', True),
        ("2026-02-03 10:00:00", True),
        ("1\nother = 2", False),
        ("1\n[table]", False),
        ("3 # a comment", False),
        ("fast", False),
        ("", False),
        ("[1", False),
    ],
)
def test_a_text_is_one_value_only_if_nothing_follows_it(text: str, one: bool):
    assert is_one_value(text) == one
