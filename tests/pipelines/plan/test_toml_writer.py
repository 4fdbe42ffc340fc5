"""TOML is written as a person would write it."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.plan.toml_writer import write_toml, write_value

TEXT = st.text(st.characters(exclude_categories=("Cs",)))
VALUES = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@given(VALUES)
def test_every_value_is_read_back(value: Any):
    assert tomllib.loads(f"value = {write_value(value)}") == {"value": value}


@given(st.dictionaries(TEXT, VALUES, max_size=3), st.dictionaries(TEXT, st.dictionaries(TEXT, VALUES, max_size=3), max_size=3))
def test_every_document_is_read_back(document: dict[str, Any], stages: dict[str, Any]):
    assert tomllib.loads(write_toml(document | {"stages": stages})) == document | {"stages": stages}


def test_short_tables_and_lists_take_one_line_and_every_stage_a_table():
    document = {
        "pipeline": "p",
        "stages": {"a": {"lr": 0.001, "inputs": {"tokens": ["b"]}, "seed": None}, "b": {"files": ["x" * 60, "y" * 60]}},
        "store": {"root": "s"},
    }
    assert write_toml(document) == (
        'pipeline = "p"\n\n[stages.a]\nlr = 0.001\ninputs = { tokens = ["b"] }\n\n'
        f'[stages.b]\nfiles = [\n    "{"x" * 60}",\n    "{"y" * 60}",\n]\n\n[store]\nroot = "s"\n'
    )


def test_none_in_a_list_is_refused_since_toml_has_no_null():
    with pytest.raises(ValueError, match="None can't be written as TOML"):
        write_toml({"a": [1, None]})
