"""What a journal's events add up to, and how a person follows them: live rows on a terminal, plain lines in a pipe.

`RunView` is the fold that the progress, the run's page and MLflow's sender share: give it the events in order.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from pipelines.observe.view import RunView, StageView, seconds_left, share_done
from pipelines.store.events import Announcement, JournalEvent, Note, StageEnded, StagePoints, StageProgress, StageStarted

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

    def show(self, event: JournalEvent | Announcement) -> None:
        """Show an event of the journal, or an announcement, which no journal keeps."""
        with self._lock:
            self.view.add(event)
        match event:
            case Announcement(text):
                self.say(text)
            case Note():
                self.say(self._aligned(event.stage, event.text))
            case _ if self._live is None:
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

    def _add_line(self, event: JournalEvent | Announcement) -> None:
        match event:
            case StageStarted():
                stage = self.view.stage(event.stage)
                self._said[stage.name] = (self._clock(), 0.0)
                self._stage_line(stage, f"{_word(stage)}: {stage.reason}" if stage.reason else _word(stage))
            case StagePoints() | StageProgress():
                stage = self.view.stage(event.stage)
                said_s, said_share = self._said.setdefault(stage.name, (self._clock(), 0.0))
                share = share_done(stage)
                if self._clock() - said_s >= EVERY_S and (
                    share is None or share - said_share >= EVERY_SHARE or self._clock() - said_s >= 6 * EVERY_S
                ):
                    self._said[stage.name] = (self._clock(), share or 0.0)
                    self._stage_line(stage, _running(stage, self._now_ms()))
            case StageEnded():
                stage = self.view.stage(event.stage)
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
