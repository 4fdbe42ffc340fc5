"""The pretrain stage: which inputs it refuses to bring together. Its training is that of tests/gpt/test_pretrain.py."""

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
            r"^model eeeeeeeeeeee has the role reward; pretrain goes on from a policy, or begins from nothing$",
        ),
        (
            [TOKENS],
            Model(Path("model"), "e" * 64, {"role": "policy", "tokenizer": "d" * 64}),
            "^model eeeeeeeeeeee was made with tokenizer dddddddddddd, tokens aaaaaaaaaaaa with ffffffffffff; tokenize the documents",
        ),
        (
            [TOKENS, Tokens(Path("other"), "b" * 64, {**TOKENS.metadata, "tokenizer": "d" * 64})],
            None,
            "^tokens bbbbbbbbbbbb was made with tokenizer dddddddddddd, tokens aaaaaaaaaaaa with ffffffffffff",
        ),
    ],
)
def test_a_reward_model_and_what_another_tokenizer_made_are_refused(tokens: list[Tokens], model: Model | None, message: str):
    with pytest.raises(StageFailure, match=message):
        pretrain(CONFIG, tokens, model, None)  # type: ignore[arg-type]
