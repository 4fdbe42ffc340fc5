"""Implement gpt's Rank with a stopwatch. The training loop itself runs under it, so that no benchmark keeps a copy of the loop."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gpt.engine import Engine
from gpt.settings import TrainSettings


class TimedRank:
    """One process that stops after `n_steps` or at `stop_at_s` (time.monotonic), and saves nothing."""

    rank = 0
    world_size = 1

    def __init__(self, device: torch.device, make_engine: Callable[..., Engine], n_steps: int, stop_at_s: float = math.inf) -> None:
        self.device = device
        self.losses: list[float] = []
        """train/loss at every logged step."""
        self.began_at_s: list[float] = []
        self.ended_at_s: list[float] = []
        """When each step began and ended, with the device idle at both moments."""
        self._make_engine = make_engine
        self._n_steps = n_steps
        self._stop_at_s = stop_at_s

    def engine(self, name: str, model: nn.Module, parameter_groups: Sequence[Mapping[str, Any]], settings: TrainSettings) -> Engine:
        return self._make_engine(model, parameter_groups, settings, device=self.device)

    def restore(self) -> int:
        return 0

    def save(self, finished_steps: int) -> None:
        pass

    def log(self, step: int, *, sums: Mapping[str, Tensor | float] | None = None, values: Mapping[str, float] | None = None) -> None:
        if sums is not None and "train/loss" in sums:
            self.losses.append(float(sums["train/loss"]))

    @contextlib.contextmanager
    def section(self, name: str, deadline_s: float) -> Iterator[None]:
        if name != "step":
            yield
            return
        self._wait_for_device()
        self.began_at_s.append(time.monotonic())
        yield
        self._wait_for_device()
        self.ended_at_s.append(time.monotonic())

    def should_stop(self) -> bool:
        return len(self.ended_at_s) >= self._n_steps or time.monotonic() > self._stop_at_s

    def all_sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def step_s(self) -> list[float]:
        return [end - begin for begin, end in zip(self.began_at_s, self.ended_at_s, strict=True)]

    def _wait_for_device(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def write_random_tokens(folder: Path, *, n_tokens: int, vocab_size: int, seed: int) -> Path:
    """Write a tokens folder for `gpt.pretrain.train`. Id k is drawn with a probability near 1 / k, so that there is something to learn:
    with uniform ids the loss would stay at its first value, and two engines would agree whatever they did."""
    uniforms = np.random.default_rng(seed).random(n_tokens)
    token_ids = np.exp(uniforms * math.log(vocab_size)).astype(np.int64) - 1
    folder.mkdir(parents=True)
    token_ids.clip(0, vocab_size - 1).astype("<u4").tofile(folder / "train.bin")
    (folder / "held_out.bin").touch()
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    return folder


TOKENS_DTYPE = "uint32"
