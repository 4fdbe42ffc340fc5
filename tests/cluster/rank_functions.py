"""Functions that the tests run on ranks: a small training loop, and faults in it."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cluster.rank_process import RankProcess
from gpt.settings import TrainSettings


def settings(**changes: Any) -> TrainSettings:
    base = TrainSettings(steps=10, global_batch_size=8, lr=0.01, lr_schedule="constant", checkpoint_every=2, log_every=1, precision="fp32")
    return base.model_copy(update=changes)


def small_model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 16), nn.Dropout(0.2), nn.Tanh(), nn.Linear(16, 3))


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]


def micro_batch(config: TrainSettings, step: int, rank: int, world_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(config.global_batch_size, 5, generator=generator)
    y = torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin(), x.sum(dim=1)], dim=1)
    return x[rank::world_size], y[rank::world_size]


def train(rank: Any, config: TrainSettings, output: str, fault: str = "") -> dict[str, Any] | None:
    """Regression. Dropout draws from torch's global generator, so a resume must restore it.

    `fault` is "kind:rank:step" and strikes once, in the middle of a step: a marker file in `output` keeps it from recurring.
    """
    with rank.section("start", config.start_deadline_s):
        model = small_model()
        engine = rank.engine("policy", model, parameter_groups(model), config)
        torch.manual_seed(100 + rank.rank)
        start = rank.restore()
    for step in range(start, config.steps):
        with rank.section("step", config.step_deadline_s):
            x, y = micro_batch(config, step, rank.rank, rank.world_size)
            loss = (engine(x) - y).pow(2).sum() / (config.global_batch_size * 3)
            engine.backward(loss)
            if fault:
                _strike(fault, rank.rank, step, Path(output))
            engine.step(config.lr)
        rank.log(step + 1, sums={"train/loss": loss.detach()}, values={"train/lr": config.lr})
        stopping = rank.should_stop()
        if (step + 1) % config.checkpoint_every == 0 or stopping:
            with rank.section("checkpoint", 300):
                rank.save(step + 1)
        if stopping:
            return None
    weights = engine.full_weights()
    if rank.rank == 0:
        torch.save(weights, Path(output, "weights.pt"))
    return {"steps": config.steps}


def _strike(fault: str, rank: int, step: int, output: Path) -> None:
    kind, at_rank, at_step = fault.split(":")
    marker = output / "struck"
    if (rank, step) != (int(at_rank), int(at_step)) or (marker.exists() and kind != "raise"):
        return
    marker.touch()
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "crash":
        ctypes.string_at(0)
    if kind == "raise":
        raise ValueError(f"the data of step {step} has no end\nask for less")
    if kind == "sleep":
        time.sleep(600)
    raise AssertionError(fault)


def add_ranks(rank: Any, slowly: bool = False) -> dict[str, Any]:
    total = rank.all_sum(torch.tensor([float(rank.rank + 1), 10.0]))
    rank.log(1, sums={"eval/ranks": 1.0}, values={"eval/first": 7.0})
    if slowly:
        time.sleep(0.5)
    return {"total": total.tolist(), "threads": torch.get_num_threads(), "omp": os.environ["OMP_NUM_THREADS"], "pid": os.getpid()}


def stop_when_asked(rank: Any) -> dict[str, Any] | None:
    for _ in range(600):
        if rank.should_stop():
            return None
        time.sleep(0.05)
    return {"stopped": False}


def hang_between_sections(rank: Any) -> dict[str, Any]:
    with rank.section("step", 3):
        pass
    if rank.rank == 1:
        time.sleep(600)
    return {"stopped": rank.should_stop()}


class KilledAtStart(RankProcess):
    """Rank 1 of the first start dies when it is asked where it is."""

    def __init__(self, rank: int, folder: str) -> None:
        super().__init__(rank, folder)
        self._dies = rank == 1 and Path(folder).name == "1.1"

    def location(self) -> Any:
        if self._dies:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().location()


class SilentAtStart(RankProcess):
    """Rank 1 never reports where it is."""

    def __init__(self, rank: int, folder: str) -> None:
        super().__init__(rank, folder)
        self._silent = rank == 1

    def location(self) -> Any:
        if self._silent:
            time.sleep(600)
        return super().location()


class RefusesToStart(RankProcess):
    def __init__(self, rank: int, folder: str) -> None:
        raise ImportError("libcuda.so is missing\non this node")
