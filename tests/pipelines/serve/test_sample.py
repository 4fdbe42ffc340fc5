"""`gptline sample`: a model continues a text."""

from __future__ import annotations

import unicodedata

import pytest
from typer.testing import CliRunner

from pipelines.artifacts import Model
from pipelines.cli import app
from pipelines.serve.sample import continue_prompt
from pipelines.store.store import Store

from .conftest import publish, random_model


@pytest.fixture
def untrained(store: Store) -> Model:
    return publish(store, random_model())


def test_a_sample_begins_with_its_prompt_and_follows_its_seed(untrained: Model):
    def sampled(seed: int) -> list[str]:
        return list(continue_prompt(untrained, "春眠不覺曉", tokens=40, temperature=1.0, seed=seed))

    assert sampled(1)[0] == "春眠不覺曉"
    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)


def test_control_characters_that_a_model_writes_are_shown_and_not_obeyed(untrained: Model):
    written = "".join(continue_prompt(untrained, "", tokens=100, temperature=1.0, seed=1))
    assert set(written) & set("\N{SYMBOL FOR NULL}\N{SYMBOL FOR ESCAPE}\N{SYMBOL FOR BELL}\N{SYMBOL FOR BACKSPACE}\N{SYMBOL FOR DELETE}")
    assert [letter for letter in written if unicodedata.category(letter) == "Cc" and letter not in "\n\t"] == []


@pytest.mark.parametrize("verb", ["sample", "chat"])
@pytest.mark.parametrize("temperature", ["-1", "nan", "-inf"])
def test_a_temperature_is_at_least_0(store: Store, verb: str, temperature: str):
    asked = [verb, "model:line@newest", "--store", str(store.root), "--temperature", temperature]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 2
    assert "Invalid value for '--temperature': " in result.output
