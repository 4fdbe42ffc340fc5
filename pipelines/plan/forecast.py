"""How long a stage is expected to take: as long as the nearest earlier execution, scaled to the steps that it has to run.

The time of a training stage is a part for each step and a rest that does not grow with them, such as the start of its gang. A trial of
five steps is nearly all rest, so only the first part is scaled.
"""

from __future__ import annotations

from typing import Any

from gpt.settings import TrainSettings
from pipelines.plan.graph import Stage
from pipelines.store.action import Action
from pipelines.store.store import Store

CONSIDERED = 20
"""As many of a stage's newest executions are compared: a plan's cost does not grow with the store."""
STEPS = "config.steps"


def expected_s(store: Store, pipeline: str, stage: Stage, leaves: dict[str, Any], key: str | None = None, start: int = 0) -> float | None:
    """Seconds that a stage is expected to take from step `start` to its end; None if it was never executed.

    `leaves` are those of its key that are known: without the inputs if they don't exist yet.
    """
    earlier = [*(store.actions(key) if key else []), *store.index.newest(pipeline, stage.name, CONSIDERED)]
    if (latest := store.latest(pipeline, stage.name)) is not None:
        earlier.append(latest)
    candidates = [action for action in earlier if action.kind == stage.kind.uses]
    if not candidates:
        return None
    steps = stage.config.steps if isinstance(stage.config, TrainSettings) else 0

    def distance(action: Action) -> tuple[int, int, int]:
        # A gang that lost a rank repeated steps, which nobody expects of the next one.
        return _differences(action, stage, leaves) + bool(action.restarts), abs(_steps(action) - steps), -action.started_ms

    nearest = min(candidates, key=distance)
    if not steps or not _steps(nearest):
        return nearest.seconds
    done = _steps(nearest) - (nearest.resumed_from_step or 0)
    step_s = _step_s(nearest)
    if step_s is None:
        return nearest.seconds * (steps - start) / max(1, done)
    rest_s = max(0.0, nearest.seconds - step_s * done)
    return rest_s + step_s * (steps - start)


def _differences(action: Action, stage: Stage, leaves: dict[str, Any]) -> int:
    """Count the settings, inputs and sources in which an execution differs from what the stage has now, except the number of steps."""
    areas = {name.partition(".")[0] for name in leaves} & {"config", "input", "source"}
    names = {name for name in (*leaves, *action.leaves) if name.partition(".")[0] in areas} - {STEPS}
    asked = stage.operational()
    return sum(leaves.get(name) != action.leaves.get(name) for name in names) + sum(
        action.operational.get(name, value) != value for name, value in asked.items()
    )


def _steps(action: Action) -> int:
    return int(action.leaves.get(STEPS, 0))


def _step_s(action: Action) -> float | None:
    """Seconds per step with what comes between steps, evaluations and checkpoints; None if the execution did not log its pace.

    Points from before a resume are another execution's, whose pauses are not this one's.
    """
    points = [point for point in action.curves.get("time/step_s", []) if point.step > (action.resumed_from_step or 0)]
    if not points:
        return None
    first, last = points[0], points[-1]
    if last.step == first.step:
        return first.value
    return max(0.0, last.time_ms - first.time_ms) / 1000 / (last.step - first.step)
