"""Sums and exchanges over the ranks of a gang; a single rank needs no torch.distributed for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class Collectives:
    """Every method is called by all ranks, in the same order."""

    rank: int
    world_size: int
    device: torch.device

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, as a new tensor on the same device."""
        total = tensor.detach().clone()
        if self.world_size > 1:
            moved = self._for_backend(total)
            dist.all_reduce(moved)
            total = moved.to(tensor.device)
        return total

    def sum_numbers(self, numbers: Mapping[str, Tensor | float]) -> dict[str, float]:
        """Sum each number over ranks in float64, in the order of ranks: the bits don't depend on the network's topology."""
        if not numbers:
            return {}
        names = sorted(numbers)
        own = torch.tensor([float(numbers[name]) for name in names], dtype=torch.float64)
        if self.world_size == 1:
            return dict(zip(names, own.tolist(), strict=True))
        moved = self._for_backend(own)
        gathered = [torch.empty_like(moved) for _ in range(self.world_size)]
        dist.all_gather(gathered, moved)
        total = torch.zeros_like(own)
        for of_rank in gathered:
            total += of_rank.cpu()
        return dict(zip(names, total.tolist(), strict=True))

    def gather(self, value: T) -> list[T]:
        """Every rank's picklable value, by rank, on all ranks."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def _for_backend(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device) if dist.get_backend() == "nccl" else tensor.cpu()
