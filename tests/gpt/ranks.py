"""Ranks for tests: a single one, and two in separate processes, since a process has one process group at a time."""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gpt.settings import TrainSettings
from gpt.torch_engine import TorchEngine

ROOT = Path(__file__).resolve().parents[2]


class Killed(BaseException):
    """Nothing catches this, so it ends a loop like a signal."""


class FakeRank:
    """One process with the plain engine and checkpoints in a folder. It keeps every metric, and stops after `stop_after` finished steps."""

    rank = 0
    world_size = 1
    device = torch.device("cpu")

    def __init__(self, folder: Path, stop_after: int | None = None) -> None:
        self.folder = folder
        self.points: list[tuple[str, int, float]] = []
        self.warnings: list[str] = []
        self.sections: list[str] = []
        self.shown: list[tuple[int, int, str]] = []
        """Each call of `progress`."""
        self.saved: list[int] = []
        self.killed_in: tuple[str, int] | None = None
        """The name of the section in which it is killed, and the last saved step at that time."""
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

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def progress(self, done: int, total: int, unit: str) -> None:
        self.shown.append((done, total, unit))

    @contextlib.contextmanager
    def section(self, name: str, deadline_s: float) -> Iterator[None]:
        self.sections.append(name)
        if self.killed_in == (name, self.saved[-1] if self.saved else 0):
            raise Killed
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


class RankOfTwo(FakeRank):
    """Like the Rank of a gang of two: every sum is over both."""

    world_size = 2

    def __init__(self, rank: int, folder: Path) -> None:
        super().__init__(folder)
        self.rank = rank

    def engine(self, name: str, model: nn.Module, parameter_groups: Sequence[Mapping[str, Any]], settings: TrainSettings) -> TorchEngine:
        self._engines[name] = TorchEngine(model, parameter_groups, settings, device=self.device, world_size=2)
        return self._engines[name]

    def restore(self) -> int:
        return 0

    def save(self, finished_steps: int) -> None: ...

    def log(self, step: int, *, sums: Mapping[str, Tensor | float] | None = None, values: Mapping[str, float] | None = None) -> None:
        summed = {name: self.all_sum(torch.as_tensor(value)) for name, value in (sums or {}).items()}
        super().log(step, sums=summed, values=values)

    def all_sum(self, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        torch.distributed.all_reduce(total)
        return total


def as_two_ranks(function: Callable[..., None], *arguments: str | Path) -> None:
    """Run `function(rank, *arguments)` in two processes; the arguments arrive as strings."""
    path = Path(sys.modules[function.__module__].__file__ or "")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, path, function.__name__, f"{folder}/store"]
        ranks = [subprocess.Popen([*map(str, (*command, rank, *arguments))], cwd=ROOT) for rank in (0, 1)]
        try:
            assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()


if __name__ == "__main__":
    path, name, store, rank, *arguments = sys.argv[1:]
    sys.path[:0] = [os.getcwd(), str(Path(path).parent)]
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=2)
    getattr(importlib.import_module(Path(path).stem), name)(int(rank), *arguments)
    torch.distributed.barrier()
    os._exit(0)  # at a normal exit gloo's threads may abort the process, although its work is done
