"""Models that write what a test scripts: the next token depends only on the last one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gpt.chat import FORMAT
from gpt.model import GPT, save_model
from gpt.settings import PRESETS, GPTConfig
from gpt.tokenizer import byte_tokenizer
from pipelines.artifacts import Model
from pipelines.store.store import Store

TOKENIZER = byte_tokenizer()
ASSISTANT, END = TOKENIZER.special["assistant"], TOKENIZER.special["end"]
MOON = [*"月é!".encode(), END]


def after_the_last(following: Sequence[int], seq_len: int) -> GPT:
    """After <|assistant|> the likeliest token is following[0], after that following[1] and so on; each token may occur once."""
    config = GPTConfig(**{**PRESETS["gpt2-nano"].model_dump(), "seq_len": seq_len, "tied": False}, vocab_size=TOKENIZER.vocab_size)
    model = GPT(config, torch.Generator().manual_seed(1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.final_norm.weight.fill_(1.0)
        for feature, (last, token_id) in enumerate(zip([ASSISTANT, *following], following, strict=False)):
            model.token_embedding.weight[last, feature] = 10.0
            model.output.weight[token_id, feature] = 1.0
    return model


def random_model() -> GPT:
    config = GPTConfig(**PRESETS["gpt2-nano"].model_dump(), vocab_size=TOKENIZER.vocab_size)
    return GPT(config, torch.Generator().manual_seed(1))


def publish(store: Store, model: GPT, **metadata: Any) -> Model:
    folder = store.new_folder()
    save_model(folder, model.config, dict(model.named_parameters()))
    TOKENIZER.save(folder / "tokenizer.json")
    made = store.publish(folder, "model", {"role": "policy", "tokenizer": "0", "steps": 300, "chat_format": FORMAT, **metadata})
    assert isinstance(made, Model)
    return made


def flip_a_byte(model: Model) -> None:
    weights = bytearray((model.path / "model.safetensors").read_bytes())
    weights[-7] ^= 0x40
    (model.path / "model.safetensors").write_bytes(weights)
