"""The sft stage: what it refuses, and the metadata of its model. tests/gpt/test_sft.py tests its training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.artifacts import Conversations, Model
from pipelines.stage import StageFailure
from pipelines.stages.sft import SftConfig, sft

CONFIG = SftConfig(steps=2, global_batch_size=2, lr=1e-3)


class Bench:
    """The part of StageContext that sft uses. Its gang is one rank in this process, which never stops and saves no checkpoints."""

    seed = 1

    def __init__(self, output: Path) -> None:
        self.output = output

    def gang(self, function: Any, *arguments: Any) -> Any:
        return function(OneRank(), *arguments)

    def publish(self, kind: type[Model], **metadata: Any) -> Model:
        return kind(self.output, "0" * 64, metadata)


class OneRank:
    rank, world_size = 0, 1

    def __init__(self) -> None:
        import torch

        self.device = torch.device("cpu")

    def engine(self, name: str, model: Any, groups: Any, settings: Any) -> Any:
        from gpt.torch_engine import TorchEngine

        return TorchEngine(model, groups, settings, device=self.device)

    def restore(self) -> int:
        return 0

    def save(self, finished_steps: int) -> None: ...

    def log(self, step: int, **values: Any) -> None: ...

    def progress(self, done: int, total: int, unit: str) -> None: ...

    def should_stop(self) -> bool:
        return False

    def section(self, name: str, deadline_s: float) -> Any:
        import contextlib

        return contextlib.nullcontext()


def conversations(folder: Path) -> Conversations:
    folder.mkdir()
    record = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": folder.name}]}
    (folder / "train.jsonl").write_text(json.dumps(record) + "\n")
    (folder / "held_out.jsonl").write_text("")
    return Conversations(folder, "c" * 64)


def test_a_reward_model_is_refused_and_its_role_is_named(tmp_path: Path):
    reward_model = Model(tmp_path / "nowhere", "e" * 64, {"role": "reward", "tokenizer": "f" * 64})
    with pytest.raises(
        StageFailure, match=r"^model eeeeeeeeeeee: expected role policy, found reward; sft trains a policy, such as a pretrain stage makes$"
    ):
        sft(CONFIG, reward_model, [conversations(tmp_path / "b")], Bench(tmp_path))  # type: ignore[arg-type]


def test_the_model_is_a_policy_with_the_same_tokenizer_and_a_chat_format(tmp_path: Path):
    import torch

    from gpt.model import GPT, count_parameters, save_model
    from gpt.settings import PRESETS, GPTConfig
    from gpt.tokenizer import byte_tokenizer

    shape = GPTConfig(**PRESETS["gpt2-nano"].model_dump(), vocab_size=byte_tokenizer().vocab_size)
    network = GPT(shape, torch.Generator().manual_seed(1))
    save_model(tmp_path / "policy", shape, dict(network.named_parameters()))
    byte_tokenizer().save(tmp_path / "policy" / "tokenizer.json")
    policy = Model(tmp_path / "policy", "e" * 64, {"role": "policy", "tokenizer": "f" * 64})
    model = sft(CONFIG, policy, [conversations(tmp_path / "b"), conversations(tmp_path / "cd")], Bench(tmp_path / "out"))  # type: ignore[arg-type]
    # Each of the 2 steps has both conversations, whose answers are "b" and "cd" with an end token each: 2 * (2 + 3) = 10 tokens.
    assert model.metadata == {
        "role": "policy",
        "tokenizer": "f" * 64,
        "chat_format": "gptline-1",
        "parameters": count_parameters(network),
        "steps": 2,
        "tokens_trained": 10,
        "conversations": {"train": 2, "cut": 0, "too_long": 0},
    }
    assert {path.name for path in model.path.iterdir()} == set(Model.files)
