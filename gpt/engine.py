"""The two protocols that training loops are written against: Engine (a model being trained) and Rank (a process of the gang).

`gpt/torch_engine.py` has the plain Engine; `cluster/` has DeepSpeed's, and both implementations of Rank. A loop in `gpt/` knows nothing
else about the machines it runs on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gpt.settings import TrainSettings


class Engine(Protocol):
    """A model with its optimizer, possibly sharded over ranks. All ranks call every method, in the same order."""

    module: nn.Module
    """The model. The loop calls its `train()` and `eval()`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model's forward pass in the engine's precision."""
        ...

    def frozen(self, model: nn.Module) -> Callable[..., Any]:
        """Take over another model, which will not learn. Return its forward pass in the engine's precision: equal weights, equal bits."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Accumulate this pass's gradients. `loss` () is this rank's part of a sum that is already divided by the global count."""
        ...

    def step(self, lr: float) -> float:
        """Sum gradients over ranks, clip them by their global norm, update, zero them. Return the norm before clipping."""
        ...

    def full_weights(self) -> dict[str, Tensor]:
        """Return the whole fp32 weights, on the CPU, on every rank."""
        ...

    def save(self, folder: Path) -> None:
        """Write this rank's state: weights, optimizer state, loss scale. `folder` exists, and all ranks share it."""
        ...

    def load(self, folder: Path) -> None: ...


class Rank(Protocol):
    """A process of the gang, as a training loop sees it."""

    rank: int
    world_size: int
    device: torch.device

    def engine(self, name: str, model: nn.Module, parameter_groups: Sequence[Mapping[str, Any]], settings: TrainSettings) -> Engine:
        """Make an AdamW engine of the run's type. `name` distinguishes several of them in checkpoints.

        `parameter_groups` are torch's: `[{"params": [...], "weight_decay": 0.1}, ...]`.
        """
        ...

    def restore(self) -> int:
        """Load the newest verified checkpoint into the engines made so far. Return how many steps it had finished (0: there is none)."""
        ...

    def save(self, finished_steps: int) -> None:
        """Commit a checkpoint of all engines. All ranks call it."""
        ...

    def log(self, step: int, *, sums: Mapping[str, Tensor | float] | None = None, values: Mapping[str, float] | None = None) -> None:
        """Record metrics of `step` (names are area/name_unit). `sums` are summed over ranks; `values` are rank 0's. All ranks call it."""
        ...

    def warn(self, text: str) -> None:
        """Show a sentence to the user. Only rank 0's is shown."""
        ...

    def progress(self, done: int, total: int, unit: str) -> None:
        """Show how far work outside the steps is: `rank.progress(12_000, 52_000, "conversations encoded")`. Only rank 0's is shown."""
        ...

    def section(self, name: str, deadline_s: float) -> AbstractContextManager[None]:
        """Enclose work that must end within `deadline_s` seconds. Otherwise the gang counts as dead, and its stacks are printed."""
        ...

    def should_stop(self) -> bool:
        """Return True on all ranks once a stop was requested. The loop then saves a checkpoint and returns None."""
        ...

    def all_sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over ranks, on every rank."""
        ...
