"""The evaluate stage on a model of two layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.artifacts import Documents, Model, Report
from pipelines.stage import StageFailure
from pipelines.stages.evaluate import EvaluateConfig, evaluate


class Bench:
    """As much of a StageContext as evaluate asks for."""

    seed = 1
    device = "cpu"

    def __init__(self, output: Path) -> None:
        self.output = output
        self.figures: dict[str, float] = {}

    def figure(self, name: str, value: float) -> None:
        self.figures[name] = value

    def publish(self, kind: type[Report], **metadata: Any) -> Report:
        return kind(self.output, "0" * 64, metadata)


def documents(folder: Path, held_out: list[str]) -> Documents:
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "to train on"}\n')
    (folder / "held_out.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in held_out))
    return Documents(folder, "d" * 64)


@pytest.mark.parametrize("held_out", [[], [""]])
def test_without_held_out_text_one_is_told_to_hold_some_out_before_the_model_is_loaded(tmp_path: Path, held_out: list[str]):
    nowhere = Model(tmp_path / "nowhere", "e" * 64, {"role": "policy"})
    with pytest.raises(StageFailure, match=r"^documents dddddddddddd hold no held-out text.*; set hold_out in the ingest stage"):
        evaluate(EvaluateConfig(), nowhere, [documents(tmp_path / "documents", held_out)], Bench(tmp_path))  # type: ignore[arg-type]


def test_without_prompts_there_are_no_samples(tmp_path: Path):
    import torch

    from gpt.model import GPT, save_model
    from gpt.settings import PRESETS, GPTConfig
    from gpt.tokenizer import byte_tokenizer

    tokenizer = byte_tokenizer()
    shape = GPTConfig(**PRESETS["gpt2-nano"].model_dump(), vocab_size=tokenizer.vocab_size)
    folder = tmp_path / "model"
    folder.mkdir()
    save_model(folder, shape, dict(GPT(shape, torch.Generator().manual_seed(1)).named_parameters()))
    tokenizer.save(folder / "tokenizer.json")
    bench = Bench(tmp_path)
    model = Model(folder, "e" * 64, {"role": "policy"})
    config = EvaluateConfig.model_validate({"prompts": [], "compressors": False})
    evaluate(config, model, [documents(tmp_path / "documents", ["a text"])], bench)  # type: ignore[arg-type]
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["samples"], report["tokens"], report["bytes"]) == ([], 7, 6)
