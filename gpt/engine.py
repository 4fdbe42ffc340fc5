"""The two protocols that a training loop is written against: Engine (one model being trained) and Rank (one process of the gang).

`gpt/torch_engine.py` is the plain Engine; `cluster/` has DeepSpeed's and both kinds of Rank.
A loop in `gpt/` knows nothing else of the machines it runs on.
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
    """One model with its optimizer, perhaps sharded over ranks. Every method is called by all ranks, in the same order."""

    module: nn.Module
    """The model; its `train()` and `eval()` are the loop's to call."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward pass in the engine's precision."""
        ...

    def frozen(self, model: nn.Module) -> Callable[..., Any]:
        """Another model that is taken over and does not learn, read in the engine's own precision: equal weights give equal bits."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add this pass's gradients; `loss` () is this rank's part of a sum that was already divided by the global count."""
        ...

    def step(self, lr: float) -> float:
        """Sum gradients over ranks, clip them by their global norm, update, zero them; the norm before clipping."""
        ...

    def full_weights(self) -> dict[str, Tensor]:
        """The fp32 weights, whole, on the CPU, on every rank."""
        ...

    def save(self, folder: Path) -> None:
        """Write what this rank must restore: weights, optimizer state, loss scale. `folder` exists and is shared by all ranks."""
        ...

    def load(self, folder: Path) -> None: ...


class Rank(Protocol):
    """One process of the gang, as a training loop sees it."""

    rank: int
    world_size: int
    device: torch.device

    def engine(self, name: str, model: nn.Module, parameter_groups: Sequence[Mapping[str, Any]], settings: TrainSettings) -> Engine:
        """An AdamW engine of the run's kind; `name` tells two of them apart in checkpoints.

        `parameter_groups` are torch's: `[{"params": [...], "weight_decay": 0.1}, ...]`.
        """
        ...

    def restore(self) -> int:
        """Load the newest verified checkpoint into the engines made so far; how many steps it had finished (0: none)."""
        ...

    def save(self, finished_steps: int) -> None:
        """Commit a checkpoint of all engines. All ranks call it."""
        ...

    def log(self, step: int, *, sums: Mapping[str, Tensor | float] | None = None, values: Mapping[str, float] | None = None) -> None:
        """Record metrics of `step` (names are area/name_unit). `sums` are added over ranks; `values` are rank 0's. All ranks call it."""
        ...

    def warn(self, text: str) -> None:
        """Tell the user what the numbers alone would not; rank 0's words are told."""
        ...

    def section(self, name: str, deadline_s: float) -> AbstractContextManager[None]:
        """Work that must end within `deadline_s` seconds, or this gang counts as dead and its stacks are printed."""
        ...

    def should_stop(self) -> bool:
        """True on all ranks once anyone asked to stop: save a checkpoint and return None."""
        ...

    def all_sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, on every rank."""
        ...
