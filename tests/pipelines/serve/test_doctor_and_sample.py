from __future__ import annotations

import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from gpt.model import GPT, save_model
from gpt.settings import PRESETS, GPTConfig
from gpt.tokenizer import byte_tokenizer
from pipelines.artifacts import Artifact
from pipelines.cli import app
from pipelines.observe.doctor import Finding, examine
from pipelines.serve.sample import continue_prompt
from pipelines.stage import StageFailure
from pipelines.store.store import Store


@pytest.mark.slow
def test_the_doctor_finds_this_installation_sound(store: Store):
    findings = examine(store)
    assert [str(each) for each in findings if each.wrong] == []
    assert {"python", "packages", "gpu", "deepspeed", "ray", "mlflow", "disk"} <= {each.about for each in findings}


def test_a_fault_comes_with_what_to_do():
    assert str(Finding("disk", "1 GiB free", "make room")) == "!!  disk        1 GiB free\n                make room"


@pytest.fixture
def untrained(store: Store) -> Artifact:
    folder = store.new_folder()
    tokenizer = byte_tokenizer()
    config = GPTConfig(**PRESETS["gpt2-nano"].model_dump(), vocab_size=tokenizer.vocab_size)
    save_model(folder, config, dict(GPT(config, torch.Generator().manual_seed(1)).named_parameters()))
    tokenizer.save(folder / "tokenizer.json")
    return store.publish(folder, "model", {"role": "policy", "tokenizer": "0"})


def test_a_sample_begins_with_its_prompt_and_follows_its_seed(store: Store, untrained: Artifact):
    pieces = list(continue_prompt(store, untrained.digest, "春眠不覺曉", tokens=40, temperature=1.0, seed=1))
    assert pieces[0] == "春眠不覺曉"
    assert pieces == list(continue_prompt(store, untrained.digest, "春眠不覺曉", tokens=40, temperature=1.0, seed=1))
    assert pieces != list(continue_prompt(store, untrained.digest, "春眠不覺曉", tokens=40, temperature=1.0, seed=2))


def test_control_characters_that_a_model_writes_are_shown_and_not_obeyed(store: Store, untrained: Artifact):
    written = "".join(continue_prompt(store, untrained.digest, "", tokens=100, temperature=1.0, seed=1))
    assert set(written) & set("\N{SYMBOL FOR NULL}\N{SYMBOL FOR ESCAPE}\N{SYMBOL FOR BELL}\N{SYMBOL FOR BACKSPACE}\N{SYMBOL FOR DELETE}")
    assert [letter for letter in written if unicodedata.category(letter) == "Cc" and letter not in "\n\t"] == []


def test_what_is_no_model_cannot_be_sampled(store: Store, tmp_path: Path):
    folder = store.new_folder()
    (folder / "train.jsonl").write_text("{}")
    with pytest.raises(StageFailure, match="is documents, wanted a model"):
        list(continue_prompt(store, store.publish(folder, "documents", {}).digest, "", tokens=1, temperature=1.0, seed=1))


def flip_a_byte(weights: Path) -> None:
    data = bytearray(weights.read_bytes())
    data[-7] ^= 0x40
    weights.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "found"),
    [
        (flip_a_byte, "model.safetensors has sha256 "),
        (lambda weights: weights.write_bytes(weights.read_bytes()[:-100]), "model.safetensors has "),
        (Path.unlink, "model.safetensors is missing"),
    ],
)
def test_damaged_weights_write_nothing(store: Store, untrained: Artifact, harm: Callable[[Path], object], found: str):
    harm(untrained.path / "model.safetensors")
    with pytest.raises(StageFailure, match=f"model {untrained.digest[:12]} is damaged: {found}"):
        next(continue_prompt(store, untrained.digest, "", tokens=1, temperature=1.0, seed=1))


def test_a_reward_model_cannot_be_sampled(store: Store):
    folder = store.new_folder()
    (folder / "config.json").write_text("{}")
    reward = store.publish(folder, "model", {"role": "reward", "tokenizer": "0"})
    with pytest.raises(StageFailure, match=f"model {reward.digest[:12]} has the role reward; wanted a policy: only those write"):
        next(continue_prompt(store, reward.digest, "", tokens=1, temperature=1.0, seed=1))


@pytest.mark.parametrize("verb", ["sample", "chat"])
@pytest.mark.parametrize("temperature", ["-1", "nan", "-inf"])
def test_a_temperature_is_a_number_from_0_on(store: Store, verb: str, temperature: str):
    asked = [verb, "model:line@newest", "--store", str(store.root), "--temperature", temperature]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 2
    assert "Invalid value for '--temperature': " in result.output
