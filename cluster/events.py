"""What happens while a stage runs, as the stage's process and its ranks report it. The journal's events are made of these.

Every event is a small frozen dataclass that can be pickled; JSON exists only at the journal's edge (`pipelines/store/events.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Point(NamedTuple):
    """One value of a metric: `Point(step=10, value=4.673, time_ms=1764400000000)`."""

    step: int
    value: float
    time_ms: int
    """Milliseconds since 1970, taken when the value was logged."""


Curves = dict[str, list[Point]]
"""Metric name to its points, in the order in which they were logged."""


@dataclass(frozen=True)
class Points:
    """New points of one or several metrics."""

    curves: Curves


@dataclass(frozen=True)
class Progress:
    """How far a stage is: `Progress(done=3, total=12, unit="files")`."""

    done: float
    total: float
    unit: str


@dataclass(frozen=True)
class Notice:
    """A sentence for people: a checkpoint that could not be written, records that were left out."""

    text: str


@dataclass(frozen=True)
class Waiting(Notice):
    """The gang is waiting for its resources."""


@dataclass(frozen=True)
class GangStarted(Notice):
    """The gang's processes are up."""

    pids: tuple[int, ...]
    """Process ids in the order of ranks, each on its own node."""


@dataclass(frozen=True)
class Restart(Notice):
    """The gang lost a rank and starts again."""

    start: int
    """Which start of the gang this is, from 2."""


@dataclass(frozen=True)
class Stacks(Notice):
    """What every thread of a rank was doing when the gang hung."""

    rank: int


@dataclass(frozen=True)
class CheckpointSaved:
    """A checkpoint was committed."""

    step: int
    """Number of finished steps when it was written."""
    bytes: int
    seconds: float


StageEvent = Points | Progress | Notice | CheckpointSaved
"""What a stage sends to its driver while it runs. `Waiting`, `GangStarted`, `Restart` and `Stacks` are notices."""
