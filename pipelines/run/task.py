"""A stage's job being executed: as a Ray task, or inline in this process. The runner sees only `StageTask`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from cluster.events import StageEvent
from pipelines.plan.graph import Stage
from pipelines.run.execute import execute, stream
from pipelines.run.job import Job, Outcome
from pipelines.run.preflight import room_of


class StageTask(Protocol):
    """Polled by the runner until it is done."""

    done: bool

    @property
    def started(self) -> bool:
        """False while it waits for resources."""
        ...

    def poll(self) -> list[StageEvent]:
        """The events since the last poll."""
        ...

    def result(self) -> Outcome:
        """How the stage ended; raises if its process died. `done` must be True."""
        ...

    def cancel(self) -> None:
        """End its process."""
        ...


class InlineTask:
    """A stage in this process, which runs when it is first polled."""

    def __init__(self, job: Job, emit: Callable[[StageEvent], None], should_stop: Callable[[], bool]) -> None:
        self.done = False
        self.started = True
        self._execute = lambda: execute(job, emit, should_stop)
        self._outcome = Outcome()

    def poll(self) -> list[StageEvent]:
        self._outcome = self._execute()
        self.done = True
        return []

    def result(self) -> Outcome:
        return self._outcome

    def cancel(self) -> None:
        """Nothing to end: it is this process."""


def start_ray_task(job: Job, stage: Stage, pipeline: str) -> StageTask:
    """Submit a stage's job to the Ray cluster of the open session."""
    from cluster.ray_session import submit

    # A stage that trains holds nothing itself: a task that held what its gang waits for would never end.
    room = {} if stage.kind.trains() else room_of(stage)
    return submit(
        stream,
        job,
        name=f"{pipeline}:{stage.name}",
        cpus=room.get("cpus_per_rank", 0),
        gpus=room.get("gpus_per_rank", 0),
        memory_gib=room.get("memory_gib"),
        labels=room.get("labels"),
        accelerator=room.get("accelerator"),
        environment={"OMP_NUM_THREADS": str(room.get("cpus_per_rank", 1))},
    )
