"""A Rank for tests: one process, the plain engine, checkpoints in a folder, every metric kept."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gpt.settings import TrainSettings
from gpt.torch_engine import TorchEngine


class FakeRank:
    """Stops at the step boundary after `stop_after` finished steps of this process."""

    rank = 0
    world_size = 1
    device = torch.device("cpu")

    def __init__(self, folder: Path, stop_after: int | None = None) -> None:
        self.folder = folder
        self.points: list[tuple[str, int, float]] = []
        self.sections: list[str] = []
        self.saved: list[int] = []
        self._boundaries_left = stop_after
        self._engines: dict[str, TorchEngine] = {}

    def engine(self, name: str, model: nn.Module, parameter_groups: Sequence[Mapping[str, Any]], settings: TrainSettings) -> TorchEngine:
        self._engines[name] = TorchEngine(model, parameter_groups, settings, device=self.device)
        return self._engines[name]

    def restore(self) -> int:
        steps = sorted(int(path.name) for path in self.folder.iterdir())
        for name, engine in self._engines.items() if steps else ():
            engine.load(self.folder / str(steps[-1]) / name)
        return steps[-1] if steps else 0

    def save(self, finished_steps: int) -> None:
        folder = self.folder / str(finished_steps)
        shutil.rmtree(folder, ignore_errors=True)
        for name, engine in self._engines.items():
            (folder / name).mkdir(parents=True)
            engine.save(folder / name)
        self.saved.append(finished_steps)

    def log(self, step: int, *, sums: Mapping[str, Tensor | float] | None = None, values: Mapping[str, float] | None = None) -> None:
        self.points += [(name, step, float(value)) for name, value in {**(sums or {}), **(values or {})}.items()]

    @contextlib.contextmanager
    def section(self, name: str, deadline_s: float) -> Iterator[None]:
        self.sections.append(name)
        yield

    def should_stop(self) -> bool:
        if self._boundaries_left is None:
            return False
        self._boundaries_left -= 1
        return self._boundaries_left == 0

    def all_sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def curve(self, name: str) -> dict[int, float]:
        return {step: value for point, step, value in self.points if point == name}


@pytest.fixture
def make_rank(tmp_path: Path) -> Callable[..., FakeRank]:
    """`make_rank("a")` begins a run; called again with the same name, it goes on from that run's checkpoints."""

    def make(name: str = "run", stop_after: int | None = None) -> FakeRank:
        folder = tmp_path / "checkpoints" / name
        folder.mkdir(parents=True, exist_ok=True)
        return FakeRank(folder, stop_after)

    return make


@pytest.fixture
def make_tokens(tmp_path: Path) -> Callable[..., Path]:
    """A tokens artifact's folder."""

    def make(train: Sequence[int], held_out: Sequence[int] = (), name: str = "tokens") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        np.array(train, "<u2").tofile(folder / "train.bin")
        np.array(held_out, "<u2").tofile(folder / "held_out.bin")
        (folder / "tokenizer.json").write_text("{}")
        return folder

    return make


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # models this small only wait for a second one
