"""The settings below each sample on docs/data.md read that sample."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from pipelines.artifacts import Records
from pipelines.stages.conversations import ConversationsConfig, conversations
from pipelines.stages.ingest import IngestConfig, ingest
from pipelines.stages.preferences import PreferencesConfig, preferences
from pipelines.stages.prompts import PromptsConfig, prompts
from pipelines.stages.ratings import RatingsConfig, ratings

from .conftest import FakeStage, write_damaged_parquet

PAGE = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
SAMPLES = dict(re.findall(r"```(?:json|text|csv) (\S+)\n(.*?)```", PAGE, re.DOTALL))
STAGES: dict[str, dict[str, Any]] = {}
for block in re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL):
    STAGES |= tomllib.loads(block)["stages"]
KINDS: dict[str, tuple[Any, Any]] = {
    "ingest": (IngestConfig, ingest),
    "conversations": (ConversationsConfig, conversations),
    "preferences": (PreferencesConfig, preferences),
    "ratings": (RatingsConfig, ratings),
    "prompts": (PromptsConfig, prompts),
}


def turns(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    messages = [{"role": "user" if number % 2 == 0 else "assistant", "content": content} for number, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *messages] if system else messages


TREE = turns("Name a tree.")
EXPECTED: dict[str, list[dict[str, Any]]] = {
    "documents": [{"text": "Cod live in cold water."}, {"text": "Oaks live for centuries."}],
    "questions": [{"prompt": TREE, "reference": None}, {"prompt": turns("Name a fish."), "reference": None}],
    "qa": [{"messages": turns("Name a tree.", "Oak.", system="Be brief.")}],
    "instructions": [{"messages": turns("Translate into French.\n\ncat", "chat")}],
    "tool_use": [{"messages": turns("2+2?", "add(2, 2)", "4", "Four.", system='You can call: ["add"]')}],
    "calls": [{"messages": turns("2+2?", '{"name": "add", "arguments": {"a": 2, "b": 2}}', "4", "Four.")}],
    "hh": [{"prompt": TREE, "chosen": "Oak.", "rejected": "Cod."}],
    "guanaco": [{"messages": turns("Name a tree.", "Oak.", system="Be brief.")}],
    "ultrafeedback": [{"prompt": TREE, "chosen": "Oak.", "rejected": "Cod."}],
    "votes": [{"prompt": TREE, "chosen": "Oak.", "rejected": "Cod."}],
    "oasst": [{"prompt": TREE, "chosen": "Oak.", "rejected": "Cod."}],
    "kto": [{"prompt": TREE, "response": "Oak.", "score": 1.0}],
    "stars": [{"prompt": TREE, "response": "Oak.", "score": 1.0}, {"prompt": TREE, "response": "Cod.", "score": 0.25}],
    "choices": [{"prompt": turns("2 + 2?\nA. 3\nB. 4\nC. 5"), "reference": "B"}],
}


def test_every_stage_of_the_page_has_a_sample_and_an_expected_record():
    assert set(STAGES) == set(EXPECTED)
    assert sorted(SAMPLES) == sorted(name for stage in STAGES.values() for name in stage["files"])


@pytest.mark.parametrize("name", STAGES)
def test_a_sample_of_the_page_is_read_by_the_settings_below_it(data, output, name):
    settings = dict(STAGES[name])
    config_class, kind = KINDS[settings.pop("uses")]
    settings.pop("hold_out", None)  # one record can't be on both sides
    for file in settings["files"]:
        (data / file).write_text(SAMPLES[file], encoding="utf-8")
    config = config_class(**settings)
    made: Records = kind(config, FakeStage(output, config.sources(data)))
    found = [{key: value for key, value in record.items() if key != "source"} for record in made.records("train")]
    assert found == EXPECTED[name]


@pytest.mark.parametrize("name", sorted(set(STAGES) - {"documents", "questions", "stars", "calls"}))  # no JSON, or content of two types
def test_the_same_sample_in_parquet_is_read_past_a_damaged_column_that_nothing_names(data, output, name):
    settings = dict(STAGES[name]) | {"source": "parquet"}
    config_class, kind = KINDS[settings.pop("uses")]
    settings.pop("hold_out", None)
    for file in settings["files"]:
        rows = [json.loads(line) for line in SAMPLES[file].splitlines()]
        write_damaged_parquet(data / file, {column: [row[column] for row in rows] for column in rows[0]}, "noise")
    config = config_class(**settings)
    made: Records = kind(config, FakeStage(output, config.sources(data)))
    assert [{key: value for key, value in record.items() if key != "source"} for record in made.records("train")] == EXPECTED[name]


@pytest.mark.parametrize("name", [name for name in STAGES if "hold_out" in STAGES[name]])
def test_a_hold_out_of_the_page_is_one_that_its_stage_accepts(name):
    settings = dict(STAGES[name])
    config_class, _ = KINDS[settings.pop("uses")]
    assert config_class(**settings).hold_out.share == settings["hold_out"]["share"]
