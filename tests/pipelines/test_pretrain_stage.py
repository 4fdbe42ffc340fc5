"""The pretrain stage: which inputs it refuses to combine. tests/gpt/test_pretrain.py tests its training."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.artifacts import Model, Tokens
from pipelines.stage import StageFailure
from pipelines.stages.pretrain import PretrainConfig, pretrain

CONFIG = PretrainConfig(preset="gpt2-nano", steps=2, global_batch_size=2, lr=1e-3)
TOKENS = Tokens(Path("tokens"), "a" * 64, {"dtype": "uint16", "vocab_size": 16, "tokenizer": "f" * 64})


@pytest.mark.parametrize(
    ("tokens", "model", "message"),
    [
        (
            [TOKENS],
            Model(Path("model"), "e" * 64, {"role": "reward", "tokenizer": "f" * 64}),
            r"^model eeeeeeeeeeee: expected role policy, found reward; pretrain starts from a policy, or without a model$",
        ),
        (
            [TOKENS],
            Model(Path("model"), "e" * 64, {"role": "policy", "tokenizer": "d" * 64}),
            "^model eeeeeeeeeeee: expected tokenizer ffffffffffff, the one of tokens aaaaaaaaaaaa, found dddddddddddd; .*rebuild",
        ),
        (
            [TOKENS, Tokens(Path("other"), "b" * 64, {**TOKENS.metadata, "tokenizer": "d" * 64})],
            None,
            "^tokens bbbbbbbbbbbb: expected tokenizer ffffffffffff, the one of tokens aaaaaaaaaaaa, found dddddddddddd",
        ),
    ],
)
def test_a_reward_model_and_inputs_of_another_tokenizer_are_refused(tokens: list[Tokens], model: Model | None, message: str):
    with pytest.raises(StageFailure, match=message):
        pretrain(CONFIG, tokens, model, None)  # type: ignore[arg-type]
