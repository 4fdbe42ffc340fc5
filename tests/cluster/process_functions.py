"""Functions that the tests run in plain processes with a gloo group, without Ray: both engines side by side."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import rank_functions
import torch
from torch import Tensor
from torch import distributed as dist

from cluster.deepspeed_engine import DeepSpeedEngine
from gpt.model import GPT, parameter_groups
from gpt.settings import GPTConfig, TrainSettings
from gpt.torch_engine import TorchEngine

STEPS = 50
SAVED_AFTER = 35
WIDTH = 16
MAX_NORM = 0.5


def first_model() -> GPT:
    return GPT(GPTConfig(n_layer=1, n_head=2, n_embd=WIDTH, seq_len=16, vocab_size=64), torch.Generator().manual_seed(5))


def train(
    make: Any, config: TrainSettings, rank: int, world_size: int, *, save: Path | None = None, load: Path | None = None
) -> dict[str, Any]:
    """Fifty steps of two unequal passes each, as in `gpt.pretrain`; after step 5 there is a forward pass in eval mode too."""
    model = first_model()
    engine = make(model, parameter_groups(model, config.weight_decay), config, device=torch.device("cpu"), world_size=world_size)
    if load:
        engine.load(load)
    norms = []
    for step in range(SAVED_AFTER if load else 0, STEPS):
        ids = torch.randint(64, (config.global_batch_size, 17), generator=torch.Generator().manual_seed(step))[rank::world_size]
        engine.module.train()
        for rows in (slice(0, 1), slice(1, None)):
            logits = engine(ids[rows, :-1])
            targets = ids[rows, 1:].flatten()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets, reduction="sum")
            engine.backward(loss / (config.global_batch_size * 16))
        norms.append(engine.step(config.lr))
        if step == 5:
            engine.module.eval()
            with torch.no_grad():
                engine(ids[:, :-1])
        if save and step + 1 == SAVED_AFTER:
            engine.save(save)
    return {"weights": engine.full_weights(), "norms": norms}


def main(rank: int, world_size: int, rendezvous: str, cases: list[dict[str, Any]], output: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    results = {}
    plain: dict[str, Any] = {}
    for case in cases:
        config = rank_functions.settings(lr=0.003, max_grad_norm=MAX_NORM, **case)
        name = case_name(case)
        if config.precision not in plain:
            plain[config.precision] = train(TorchEngine, config, rank, world_size)
        folder = Path(output, name)
        folder.mkdir(exist_ok=True)
        sharded = train(DeepSpeedEngine, config, rank, world_size, save=folder)
        resumed = train(DeepSpeedEngine, config, rank, world_size, load=folder)
        results[name] = {"plain": plain[config.precision], "sharded": sharded, "resumed": resumed}
    torch.save(results, Path(output, f"results-{rank}.pt"))
    dist.destroy_process_group()


def case_name(case: dict[str, Any]) -> str:
    return "-".join(f"{key}={value}" for key, value in case.items())


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max((a[name] - b[name]).abs().max().item() for name in a)


def without_key_biases(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A key's bias shifts all scores of a query equally, so its gradient is rounding noise, which Adam scales up to whole steps."""
    return {
        name: weight[[*range(WIDTH), *range(2 * WIDTH, 3 * WIDTH)]] if "qkv.bias" in name else weight for name, weight in weights.items()
    }
