"""The export stage: what it refuses before it loads a model's weights. tests/gpt/test_hf.py tests the files that it writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpt.settings import PRESETS, GPTConfig
from pipelines.artifacts import Model
from pipelines.stage import StageFailure
from pipelines.stages.export import export


def model_without_weights(folder: Path, preset: str, **metadata: str) -> Model:
    (folder / "config.json").write_text(GPTConfig(**PRESETS[preset].model_dump(), vocab_size=300).model_dump_json())
    return Model(folder, "e" * 64, {"role": "policy", "tokenizer": "t" * 64, **metadata})


@pytest.mark.parametrize(
    ("preset", "found"),
    [("llama-nano", "positions = 'learned', found 'rope'; .*n_kv_head = 2, found 1"), ("transformer-nano", "found 'relu'")],
)
def test_another_architecture_than_gpt_2_is_refused_before_its_weights_are_loaded(tmp_path: Path, preset: str, found: str):
    with pytest.raises(StageFailure, match=rf"^model eeeeeeeeeeee: only gpt2-\* presets can be exported to transformers: .*{found}"):
        export(model_without_weights(tmp_path, preset), None)  # type: ignore[arg-type]


def test_a_model_of_another_chat_format_is_refused(tmp_path: Path):
    model = model_without_weights(tmp_path, "gpt2-nano", chat_format="gptline-0")
    with pytest.raises(StageFailure, match="expected chat format gptline-1, found gptline-0"):
        export(model, None)  # type: ignore[arg-type]
