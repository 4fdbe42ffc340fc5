"""The events of a run's journal: one frozen dataclass each, and their JSON form, which only the journal sees.

A line of the journal is an object with "type", "time_ms" and the event's fields:

    {"type": "stage_started", "time_ms": 1764400000000, "stage": "pretrain", "decision": "run", "reason": "lr: 0.1 -> 0.2", ...}
    {"type": "points", "time_ms": ..., "stage": "pretrain", "points": [["train/loss", 10, 4.673, 1764400000000], ...]}

Fields and types that a version does not know are skipped, and a missing field has its default, so versions read each other's journals.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from cluster.events import Curves, Point

DecisionName = Literal["reuse", "run", "resume", "wait", "blocked"]
StageStatus = Literal["done", "reused", "failed", "stopped", "blocked"]
RunStatus = Literal["FINISHED", "FAILED", "KILLED"]


def now_ms() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000


@dataclass(frozen=True, kw_only=True)
class _Event:
    time_ms: int = field(default_factory=now_ms)


@dataclass(frozen=True, kw_only=True)
class RunStarted(_Event):
    """The first event of every journal."""

    run: str = ""
    pipeline: str
    config: str = ""
    """Path of the pipeline file."""
    command: str = ""
    snapshot: str = ""
    """Digest of the code that the workers import."""
    user: str = ""
    host: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    forecast_s: float | None = None
    """Seconds that the run was expected to take; None when unknown."""


@dataclass(frozen=True, kw_only=True)
class StagePlanned(_Event):
    stage: str
    decision: DecisionName
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class StageStarted(_Event):
    stage: str
    key: str = ""
    decision: DecisionName
    reason: str = ""
    steps: int | None = None
    """Optimizer steps of a training stage."""


@dataclass(frozen=True, kw_only=True)
class StageProgress(_Event):
    """How far a stage is; only the newest one matters."""

    stage: str
    done: float
    total: float | None = None
    unit: str = ""


@dataclass(frozen=True, kw_only=True)
class StagePoints(_Event):
    """New points of a stage's curves."""

    stage: str
    curves: Curves


@dataclass(frozen=True, kw_only=True)
class Note(_Event):
    """A sentence about a stage: a rank that died, a checkpoint that was skipped."""

    stage: str = ""
    text: str


@dataclass(frozen=True, kw_only=True)
class StageEnded(_Event):
    stage: str
    status: StageStatus
    decision: DecisionName | None = None
    reason: str = ""
    key: str = ""
    number: int | None = None
    """Number of the action record under `key`."""
    output: str = ""
    seconds: float | None = None
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class RunEnded(_Event):
    """The last event of a journal."""

    status: RunStatus
    exit_code: int | None = None
    text: str = ""
    """What happened and the command that continues, for people."""


JournalEvent = RunStarted | StagePlanned | StageStarted | StageProgress | StagePoints | Note | StageEnded | RunEnded


@dataclass(frozen=True)
class Announcement:
    """A sentence for whoever watches the run; not kept in the journal."""

    text: str


_CLASSES: dict[str, type[_Event]] = {
    "run_started": RunStarted,
    "stage_planned": StagePlanned,
    "stage_started": StageStarted,
    "progress": StageProgress,
    "points": StagePoints,
    "note": Note,
    "stage_ended": StageEnded,
    "run_ended": RunEnded,
}
_TYPES = {each: name for name, each in _CLASSES.items()}


def to_json(event: JournalEvent) -> str:
    """One line without its newline."""
    values: dict[str, Any] = {"type": _TYPES[type(event)], "time_ms": event.time_ms}
    for each in fields(event):
        if each.name == "curves":
            assert isinstance(event, StagePoints)
            values["points"] = [[metric, *point] for metric, points in event.curves.items() for point in points]
        else:
            values.setdefault(each.name, getattr(event, each.name))
    return json.dumps(values, ensure_ascii=False)


def from_json(line: str | bytes) -> JournalEvent | None:
    """The event of a line; None for one that is damaged, or of a type that this version does not know."""
    try:
        values = json.loads(line)
        event_class = _CLASSES[values["type"]]
        if event_class is StagePoints:
            curves: Curves = {}
            for metric, step, value, time_ms in values["points"]:
                curves.setdefault(metric, []).append(Point(step, value, time_ms))
            values["curves"] = curves
        known = {each.name for each in fields(event_class)}
        return event_class(**{name: value for name, value in values.items() if name in known and value is not None})  # type: ignore[return-value]
    except (ValueError, KeyError, TypeError):
        return None
