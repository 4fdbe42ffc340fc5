"""Fixtures of the RL tests: a small policy, a reward model, and prompts."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

# As in tests/gpt/conftest.py: the ranks of a test import this folder's modules by their plain names.
sys.path.insert(0, str(Path(__file__).parent))

from small import TOKENIZER

from gpt.batching import padded
from gpt.chat import encode_prompt, encode_response
from gpt.losses import lm_loss
from gpt.model import GPT, RewardModel, load_model, save_model
from gpt.rl.scorers import RewardModelScorer
from gpt.settings import PRESETS, GPTConfig


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model trained to answer with one to six letters of "abcd", all equally likely, and an end token."""
    torch.set_num_threads(1)
    config = GPTConfig(**{**PRESETS["gpt2-nano"].model_dump(), "dropout": 0.1}, vocab_size=TOKENIZER.vocab_size)
    model = GPT(config, torch.Generator().manual_seed(1)).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    draw = random.Random(1)
    for _ in range(80):
        rows, masks = [], []
        for _ in range(32):
            prompt = encode_prompt(TOKENIZER, [{"role": "user", "content": "".join(draw.choices("xyz", k=draw.randint(1, 5)))}])
            response = encode_response(TOKENIZER, "".join(draw.choices("abcd", k=draw.randint(1, 6))))
            rows.append([*prompt, *response])
            masks.append([0] * len(prompt) + [1] * len(response))
        token_ids, mask = padded(rows, 0), padded(masks, 0).bool()
        loss = lm_loss(model(token_ids[:, :-1]), token_ids[:, 1:], mask[:, 1:], global_count=int(mask.sum()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("policy")
    save_model(folder, config, dict(model.named_parameters()))
    TOKENIZER.save(folder / "tokenizer.json")
    return folder


@pytest.fixture
def reward_model(policy: Path, tmp_path: Path) -> RewardModelScorer:
    model = RewardModel.from_policy(load_model(policy), torch.Generator().manual_seed(5))
    save_model(tmp_path / "reward", model.config, dict(model.named_parameters()), RewardModel)
    return RewardModelScorer(tmp_path / "reward", mean=0.5, std=2.0)


@pytest.fixture
def make_prompts(tmp_path: Path) -> Callable[..., Path]:
    """Make a prompts artifact's folder."""

    def make(*texts: str, name: str = "prompts") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        records = [{"prompt": [{"role": "user", "content": text}], "reference": None, "source": "test"} for text in texts]
        (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        (folder / "held_out.jsonl").touch()
        return folder

    return make


@pytest.fixture
def prompts(make_prompts: Callable[..., Path]) -> Path:
    return make_prompts("x", "yy", "zzz", "xyxy", "z", "yzyzy")
