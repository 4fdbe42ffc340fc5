"""What a journal's events add up to, and how a person follows them: live rows on a terminal, plain lines in a pipe.

`RunView` is the fold that the progress, the run's page and MLflow's sender share: give it the events in order.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO

from pipelines.store.journal import Event, read_journal
from pipelines.store.store import Store

if TYPE_CHECKING:
    from rich.live import Live

    from pipelines.plan.planner import Decision

EVERY_S = 10.0
"""A running stage speaks in a pipe when so long has passed ..."""
EVERY_SHARE = 0.1
"""... or so much of it was done, whichever comes later."""
LIVE_PER_S = 4
TOLD = (("loss", "train/loss", ".3f"), ("val", "val/loss", ".3f"), ("tokens/s", "train/tokens_per_s", ",.0f"))
RL_TOLD = (
    ("score", "reward/score_mean", ".3f"),
    ("KL", "rollout/kl_k1_nats_per_response", ".2f"),
    ("tokens/s", "rollout/tokens_per_s", ",.0f"),
)
"""What a running stage says of its newest points: label, metric, form. The policy's loss says nothing of how RL goes."""

Point = tuple[int, float, int]
"""Step, value, time in ms since 1970."""


@dataclass
class StageView:
    """One stage of one run, as far as it is known."""

    name: str
    decision: str = ""
    """reuse, run, resume, wait or blocked."""
    reason: str = ""
    status: str = "planned"
    """planned, running, done, reused, failed, stopped, blocked, or killed: the run ended while it was running."""
    steps: int | None = None
    key: str = ""
    number: int | None = None
    output: str = ""
    seconds: float | None = None
    error: str = ""
    started_ms: int | None = None
    ended_ms: int | None = None
    done: float = 0
    total: float | None = None
    unit: str = ""
    notes: list[str] = field(default_factory=list)
    curves: dict[str, list[Point]] = field(default_factory=dict)
    """What the journal has; a reused stage's curves stand in its action record."""

    @property
    def step(self) -> int | None:
        """Steps done, as far as points or progress tell."""
        steps = [points[-1][0] for points in self.curves.values() if points]
        return max(steps, default=None)

    def newest(self, metric: str) -> float | None:
        points = self.curves.get(metric)
        return points[-1][1] if points else None


@dataclass
class RunView:
    run: str
    pipeline: str = ""
    command: str = ""
    user: str = ""
    host: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    status: str = "RUNNING"
    """RUNNING, then FINISHED, FAILED or KILLED."""
    text: str = ""
    started_ms: int | None = None
    ended_ms: int | None = None
    stages: dict[str, StageView] = field(default_factory=dict)
    """In the order in which the journal first names them."""

    def stage(self, name: str) -> StageView:
        return self.stages.setdefault(name, StageView(name))

    def add(self, event: Event) -> None:
        match event["type"]:
            case "run_started":
                self.pipeline, self.command = event["pipeline"], event.get("command") or ""
                self.user, self.host = event.get("user") or "", event.get("host") or ""
                self.versions = event.get("versions") or {}
                self.started_ms = event["time_ms"]
            case "stage_planned":
                stage = self.stage(event["stage"])
                stage.decision, stage.reason = event["decision"], event.get("reason") or ""
            case "stage_started":
                stage = self.stage(event["stage"])
                stage.status, stage.started_ms = "running", event["time_ms"]
                stage.decision, stage.reason = event["decision"], event.get("reason") or ""
                stage.key, stage.steps = event.get("key") or "", event.get("steps")
            case "progress":
                stage = self.stage(event["stage"])
                stage.done, stage.total, stage.unit = event["done"], event.get("total"), event.get("unit") or ""
            case "points":
                stage = self.stage(event["stage"])
                for metric, step, value, time_ms in event["points"]:
                    stage.curves.setdefault(metric, []).append((step, value, time_ms))
            case "note" if event.get("stage"):
                self.stage(event["stage"]).notes.append(event["text"])
            case "stage_ended":
                stage = self.stage(event["stage"])
                stage.status, stage.ended_ms = event["status"], event["time_ms"]
                stage.decision = event.get("decision") or stage.decision
                stage.reason = event.get("reason") or stage.reason
                stage.key, stage.number = event.get("key") or stage.key, event.get("number")
                stage.output, stage.seconds = event.get("output") or "", event.get("seconds")
                stage.error = event.get("error") or ""
            case "run_ended":
                self.status, self.text, self.ended_ms = event["status"], event.get("text") or "", event["time_ms"]
                for stage in self.stages.values():
                    stage.status = "killed" if stage.status == "running" else stage.status


def run_view(store: Store, run: str) -> RunView:
    view = RunView(run)
    for event in read_journal(store, run):
        view.add(event)
    return view


def share_done(stage: StageView) -> float | None:
    if stage.total:
        return min(1.0, stage.done / stage.total)
    if stage.steps and stage.step is not None:
        return min(1.0, stage.step / stage.steps)
    return None


def seconds_left(stage: StageView, now_ms: int) -> float | None:
    """From the pace between the first point and the newest: what came before (a gang's start) says nothing about steps.

    Points from before the stage's start were restored by a resume: of an attempt that may be days old.
    """
    if not stage.steps or stage.step is None:
        share = share_done(stage)
        if not share or share >= 1 or stage.started_ms is None:
            return None
        return (now_ms - stage.started_ms) / 1000 * (1 - share) / share
    curves = [[point for point in points if point[2] >= (stage.started_ms or 0)] for points in stage.curves.values()]
    times = [(points[0], points[-1]) for points in curves if len(points) > 1]
    if not times:
        return None
    first = min((one for one, _ in times), key=lambda point: point[0])
    last = max((other for _, other in times), key=lambda point: point[0])
    if last[0] <= first[0]:
        return None
    since_s = (now_ms - last[2]) / 1000
    return max(0.0, (last[2] - first[2]) / 1000 / (last[0] - first[0]) * (stage.steps - last[0]) - since_s)


class Progress:
    """Shows a run while it happens: `show` every event that the journal gets, `close` at the end.

    On a terminal each stage has a row that changes in place; elsewhere lines are only added, without control characters.
    """

    def __init__(self, out: TextIO | None = None, live: bool | None = None, clock: Callable[[], float] = time.time) -> None:
        self._out = sys.stdout if out is None else out
        self._clock = clock
        self.view = RunView("")
        self._said: dict[str, tuple[float, float]] = {}
        self._lock = threading.Lock()  # rich draws from a thread of its own
        self._live = self._start_live() if (self._out.isatty() if live is None else live) else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def show(self, event: Event) -> None:
        """An event of the journal, or {"type": "said", "text"}: a sentence for people that no journal keeps."""
        with self._lock:
            self.view.add(event)
        if event["type"] == "said":
            self.say(event["text"])
        elif event["type"] == "note":
            self.say(self._aligned(event.get("stage") or "", event["text"]))
        elif self._live is None:
            self._add_line(event)

    def say(self, text: str) -> None:
        """A sentence of its own, above the rows."""
        if self._live is None:
            self._line(text)
        else:
            from rich.text import Text

            self._live.console.print(Text(_printable(text)))

    def close(self) -> None:
        """Leave the terminal as it was found, the rows in their last state, and say what became of the run."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self.view.status != "RUNNING":
            for line in (tally(self.view), self.view.text):
                if line:
                    self._line(line)

    def _start_live(self) -> Live:
        from rich.console import Console
        from rich.live import Live

        live = Live(console=Console(file=self._out), get_renderable=self._rows, refresh_per_second=LIVE_PER_S, transient=False)
        live.start()
        return live

    def _rows(self) -> Any:
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2))
        colours = {
            "reuse": "blue",
            "run": "green",
            "resume": "green",
            "wait": "yellow",
            "blocked": "yellow",
            "failed": "red",
            "stopped": "yellow",
            "killed": "yellow",
        }
        with self._lock:
            for stage in self.view.stages.values():
                word = _word(stage)
                style = "dim" if stage.status == "planned" else colours.get(word, "")
                what = _running(stage, self._now_ms()) if stage.status == "running" else _outcome(stage)
                table.add_row(Text(stage.name, "bold" if stage.status == "running" else ""), Text(word, style), Text(_printable(what)))
        return table

    def _add_line(self, event: Event) -> None:
        if event["type"] == "stage_started":
            stage = self.view.stage(event["stage"])
            self._said[stage.name] = (self._clock(), 0.0)
            self._stage_line(stage, f"{_word(stage)}: {stage.reason}" if stage.reason else _word(stage))
        elif event["type"] in ("points", "progress"):
            stage = self.view.stage(event["stage"])
            said_s, said_share = self._said.setdefault(stage.name, (self._clock(), 0.0))
            share = share_done(stage)
            if self._clock() - said_s >= EVERY_S and (
                share is None or share - said_share >= EVERY_SHARE or self._clock() - said_s >= 6 * EVERY_S
            ):
                self._said[stage.name] = (self._clock(), share or 0.0)
                self._stage_line(stage, _running(stage, self._now_ms()))
        elif event["type"] == "stage_ended":
            stage = self.view.stage(event["stage"])
            word = "made" if stage.status == "done" else _word(stage)
            self._stage_line(stage, f"{word}: {_outcome(stage)}")

    def _stage_line(self, stage: StageView, text: str) -> None:
        self._line(self._aligned(stage.name, text))

    def _aligned(self, stage: str, text: str) -> str:
        width = max([10, *(len(name) for name in self.view.stages)])
        return f"{stage:<{width}}  {text}" if stage else text

    def _line(self, text: str) -> None:
        self._out.write(_printable(text) + "\n")
        self._out.flush()

    def _now_ms(self) -> int:
        return round(1000 * self._clock())


def tally(view: RunView) -> str:
    """`4 reused, 2 made in 1:35`"""
    counts: dict[str, int] = {}
    for stage in view.stages.values():
        word = {"done": "made"}.get(stage.status, stage.status)
        counts[word] = counts.get(word, 0) + 1
    took = "" if view.started_ms is None or view.ended_ms is None else f" in {_clock_time((view.ended_ms - view.started_ms) / 1000)}"
    return ", ".join(f"{count} {word}" for word, count in counts.items()) + took


def plan_lines(decisions: Sequence[Decision], about: str = "") -> list[str]:
    """A line for each stage, what goes with it below, and what it all comes to."""
    widths = [
        max((len(each) for each in column), default=0) for column in zip(*((each.stage, each.action) for each in decisions), strict=True)
    ]
    lines = []
    for each in decisions:
        lines.append(f"{each.stage:<{widths[0]}}  {each.action:<{widths[1]}}  {_printable(each.reason)}".rstrip())
        lines += [f"{'':<{sum(widths) + 4}}{_printable(note)}" for note in each.notes]
    return [*lines, "", *forecast(decisions, about)]


def forecast(decisions: Sequence[Decision], about: str = "") -> list[str]:
    """What there is to do; where no earlier run tells how long that takes, what the pipeline file says of itself goes first."""
    unknown = any(each.expected_s is None for each in decisions if each.action not in ("reuse", "blocked"))
    return [*([about] if about and unknown else []), work_to_do(decisions)]


def work_to_do(decisions: Sequence[Decision]) -> str:
    """How many stages there are to do, and about how long that takes."""
    working = [each for each in decisions if each.action not in ("reuse", "blocked")]
    blocked = sum(each.action == "blocked" for each in decisions)
    if not working:
        return f"nothing to do: {f'{blocked} blocked' if blocked else 'every stage is reused'}"
    known = [each.expected_s for each in working if each.expected_s is not None]
    unknown = len(working) - len(known)
    about = f", about {_clock_time(sum(known))}" if known else ""
    about += f" and {unknown} of unknown length" if known and unknown else ", how long nobody knows yet" if unknown else ""
    return f"{len(working)} of {len(decisions)} stages to do{about}" + (f"; {blocked} blocked" if blocked else "")


def _word(stage: StageView) -> str:
    """The decision, until something else became of the stage."""
    return stage.status if stage.status in ("failed", "stopped", "blocked", "killed") else stage.decision or stage.status


def _running(stage: StageView, now_ms: int) -> str:
    parts = []
    if stage.step is not None:
        parts.append(f"step {stage.step:,}/{stage.steps:,}" if stage.steps else f"step {stage.step:,}")
    elif stage.total:
        parts.append(f"{stage.done:,.0f}/{stage.total:,.0f} {stage.unit}".rstrip())
    for label, metric, form in RL_TOLD if stage.newest("reward/score_mean") is not None else TOLD:
        value = stage.newest(metric)
        if value is not None:
            parts.append(f"{label} {value:{form}}" if math.isfinite(value) else f"{label} {value}")
    left = seconds_left(stage, now_ms)
    if left is not None:
        parts.append(f"left {_clock_time(left)}")
    elif not parts and stage.started_ms is not None:
        parts.append(_clock_time((now_ms - stage.started_ms) / 1000))
    return "  ".join(parts)


def _outcome(stage: StageView) -> str:
    if stage.error:
        return stage.error
    if stage.status == "done":
        seconds = "" if stage.seconds is None else f"{stage.seconds:.1f} s  "
        return f"{seconds}{stage.output[:12]}"
    return "  ".join(part for part in (stage.output[:12] if stage.status == "reused" else "", stage.reason) if part)


def _clock_time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _printable(text: str) -> str:
    """Data may hold escape sequences; a terminal must not obey them."""
    return "".join(letter if letter.isprintable() else " " for letter in text)
