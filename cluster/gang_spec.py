"""A gang's settings, what one of its starts runs, and its result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.checkpoint import Checkpoint
from cluster.events import Curves
from cluster.room import Room


@dataclass(frozen=True, kw_only=True)
class GangSpec(Room):
    """A gang's resources, and what its ranks are given.

    `GangSpec(name="pretrain", ranks=2, make_engine=DeepSpeedEngine, work=Path("work/ab12"), series=1, identity={})`
    """

    make_engine: Callable[..., Any]
    """A module-level function or class: `make_engine(model, parameter_groups, settings, *, device, world_size)`."""
    work: Path
    """The stage's work folder, on storage that all nodes share."""
    series: int = 1
    """Number of the attempt that a person requested; checkpoints of other series are not read."""
    identity: Mapping[str, Any]
    """Goes into each checkpoint's manifest: engine, zero_stage, precision, versions. `world_size` is added."""
    max_restarts: int = 2
    start_deadline_s: float = 300
    """Longest time from the reservation to the function's first section, and longest wait for resources that no node has."""

    def full_identity(self, world_size: int) -> dict[str, Any]:
        return {**self.identity, "world_size": world_size}


@dataclass(frozen=True)
class StartSpec:
    """What one start of a gang runs."""

    gang: GangSpec
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    folder: Path
    """The start's own folder, `work/<key>/<series>.<start>`, for its checkpoints, crash logs and stacks."""
    resume_from: Checkpoint | None

    @property
    def first_step(self) -> int:
        """The number of steps that were finished before this start."""
        return self.resume_from.step if self.resume_from else 0


@dataclass(frozen=True)
class GangResult:
    value: Any
    """What the function returned on rank 0."""
    history: Curves
    """Every point of the curves, those before a resume included."""
    restarts: int
    resumed_from_step: int
    """The step from which the last start resumed; 0 if it began at the beginning."""
    stopped: bool
    """True if the function returned None after a stop was requested; its checkpoint is there to resume from."""
