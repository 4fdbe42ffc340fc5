"""Shows a run while it happens: rows that change in place on a terminal, plain lines everywhere else.

The output is only a view. When it is lost (a closed pipe, a full disk), the progress goes quiet and the run continues.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TextIO

from pipelines.observe.notation import clock_time, printable
from pipelines.observe.view import RunView, StageView, seconds_left, share_done
from pipelines.store.events import Announcement, JournalEvent, Note, StageEnded, StagePoints, StageProgress, StageStarted

if TYPE_CHECKING:
    from rich.live import Live

EVERY_S = 10.0
"""In plain lines, a running stage reports again after this time ..."""
EVERY_SHARE = 0.1
"""... and after this share of its work, whichever comes later."""
QUIET_S = 60.0
"""In plain lines, a running stage that reports nothing is mentioned again after this time."""
LIVE_PER_S = 4
NARROWEST_NAME = 10
FIGURES = (("loss", "train/loss", ".3f"), ("val", "val/loss", ".3f"), ("tokens/s", "train/tokens_per_s", ",.0f"))
"""What is shown of a running stage's newest points: label, metric, number format."""
RL_FIGURES = (
    ("score", "reward/score_mean", ".3f"),
    ("KL", "rollout/kl_k1_nats_per_response", ".2f"),
    ("tokens/s", "rollout/tokens_per_s", ",.0f"),
)
"""The same for reinforcement learning, whose loss does not say how it goes."""
COLOURS = {
    "reuse": "blue",
    "run": "green",
    "resume": "green",
    "wait": "yellow",
    "blocked": "yellow",
    "failed": "red",
    "stopped": "yellow",
    "killed": "yellow",
}


class Progress:
    """Call `show` with every event of the run and `close` at the end.

    `summarize` gives what an artifact holds by its digest, such as "760 pairs": it is shown when a stage is done.
    """

    def __init__(
        self,
        out: TextIO | None = None,
        live: bool | None = None,
        clock: Callable[[], float] = time.time,
        summarize: Callable[[str], str] | None = None,
    ) -> None:
        self._out = LossyOutput(sys.stdout if out is None else out)
        self._clock = clock
        self._summarize = summarize or (lambda digest: "")
        self.view = RunView("")
        self._summaries: dict[str, str] = {}
        self._reported: dict[str, tuple[float, float]] = {}
        """Stage to when it reported last, and the share of its work that was done then."""
        self._lock = threading.Lock()  # rich draws from a thread of its own, and so do we after a quiet minute
        self._closed = threading.Event()
        self._live = self._start_live() if (self._out.can_redraw() if live is None else live) else None

    def __enter__(self) -> Progress:
        if self._live is None:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def show(self, event: JournalEvent | Announcement) -> None:
        """Show what happened."""
        if isinstance(event, StageEnded) and event.status == "done":
            with contextlib.suppress(OSError):
                self._summaries[event.stage] = self._summarize(event.output)
        with self._lock:
            self.view.add(event)
        match event:
            case Announcement(text):
                self.say(text)
            case Note():
                self.say(self._aligned(event.stage, event.text))
            case _ if self._live is None:
                with self._lock:
                    self._add_line(event)

    def say(self, text: str) -> None:
        """Print a sentence of its own, above the rows."""
        if self._live is None:
            self._line(text)
        else:
            from rich.text import Text

            self._live.console.print(Text(printable(text)))

    def mention_quiet_stages(self) -> None:
        """Print a line for each running stage that has had none for a minute, so that a log shows what the run is waiting for."""
        with self._lock:
            for stage in self.view.stages.values():
                reported_s, share = self._reported.get(stage.name, (self._clock(), 0.0))
                if stage.status == "running" and self._clock() - reported_s >= QUIET_S:
                    self._reported[stage.name] = (self._clock(), share)
                    self._stage_line(stage, _under_way(stage, self._now_ms()))

    def close(self) -> None:
        """Leave the rows in their last state, and print what became of the run."""
        self._closed.set()
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self.view.status != "RUNNING":
            for line in (tally(self.view), self.view.text):
                if line:
                    self._line(line)

    # ---- rows ----

    def _start_live(self) -> Live:
        from rich.console import Console
        from rich.live import Live

        console = Console(file=self._out)  # type: ignore[arg-type]
        live = Live(console=console, get_renderable=self._rows, refresh_per_second=LIVE_PER_S, transient=False)
        live.start()
        console.show_cursor(True)  # rich hides it, and a driver that is killed could not bring it back
        return live

    def _rows(self) -> Any:
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2))
        with self._lock:
            for stage in self.view.stages.values():
                state = _state(stage)
                style = "dim" if stage.status == "planned" else COLOURS.get(state, "")
                details = _under_way(stage, self._now_ms()) if stage.status == "running" else self._outcome(stage)
                name = Text(stage.name, "bold" if stage.status == "running" else "")
                table.add_row(name, Text(state, style), Text(self._out.encodable(printable(details))))
        return table

    # ---- lines ----

    def _add_line(self, event: JournalEvent) -> None:
        match event:
            case StageStarted():
                stage = self.view.stage(event.stage)
                self._reported[stage.name] = (self._clock(), 0.0)
                self._stage_line(stage, f"{_state(stage)}: {stage.reason}" if stage.reason else _state(stage))
            case StagePoints() | StageProgress():
                stage = self.view.stage(event.stage)
                reported_s, reported_share = self._reported.setdefault(stage.name, (self._clock(), 0.0))
                share, waited_s = share_done(stage), self._clock() - reported_s
                if waited_s >= EVERY_S and (share is None or share - reported_share >= EVERY_SHARE or waited_s >= 6 * EVERY_S):
                    self._reported[stage.name] = (self._clock(), share or 0.0)
                    self._stage_line(stage, _under_way(stage, self._now_ms()))
            case StageEnded():
                stage = self.view.stage(event.stage)
                self._stage_line(stage, f"{'made' if stage.status == 'done' else _state(stage)}: {self._outcome(stage)}")

    def _outcome(self, stage: StageView) -> str:
        if stage.error:
            return stage.error
        if stage.status == "done":
            seconds = "" if stage.seconds is None else f"{stage.seconds:.1f} s"
            return "  ".join(part for part in (seconds, self._summaries.get(stage.name, ""), stage.output[:12]) if part)
        return "  ".join(part for part in (stage.output[:12] if stage.status == "reused" else "", stage.reason) if part)

    def _stage_line(self, stage: StageView, text: str) -> None:
        self._line(self._aligned(stage.name, text))

    def _watch(self) -> None:
        while not self._closed.wait(1.0):
            self.mention_quiet_stages()

    def _aligned(self, stage: str, text: str) -> str:
        width = max([NARROWEST_NAME, *(len(name) for name in self.view.stages)])
        return f"{stage:<{width}}  {text}" if stage else text

    def _line(self, text: str) -> None:
        self._out.write(printable(text) + "\n")
        self._out.flush()

    def _now_ms(self) -> int:
        return round(1000 * self._clock())


class LossyOutput:
    """An output that may be lost or unable to show a character: the first write that fails is the last one that is tried."""

    def __init__(self, out: TextIO | None) -> None:
        self._out = out
        """None from the start if the process was started with a closed standard output."""

    @property
    def encoding(self) -> str:
        return getattr(self._out, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        return self._out is not None and self._out.isatty()

    def fileno(self) -> int:
        if self._out is None:
            raise OSError("the output was lost")
        return self._out.fileno()

    def can_redraw(self) -> bool:
        """Whether it is a terminal on which rows can change in place."""
        return self.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown", "")

    def encodable(self, text: str) -> str:
        """The text with escapes for what the terminal's encoding lacks: `\\u4e2d` in ASCII."""
        return text.encode(self.encoding, errors="backslashreplace").decode(self.encoding)

    def write(self, text: str) -> int:
        self._attempt(lambda out: out.write(self.encodable(text)))
        return len(text)

    def flush(self) -> None:
        self._attempt(lambda out: out.flush())

    def _attempt(self, call: Callable[[TextIO], object]) -> None:
        if self._out is None:
            return
        try:
            call(self._out)
        except (OSError, ValueError):  # ValueError: it was closed
            lost, self._out = self._out, None
            if lost in (sys.stdout, sys.__stdout__):
                _discard(lost)


def tally(view: RunView) -> str:
    """`4 reused, 2 made in 1:35`"""
    counts: dict[str, int] = {}
    for stage in view.stages.values():
        state = {"done": "made"}.get(stage.status, stage.status)
        counts[state] = counts.get(state, 0) + 1
    took_s = view.seconds()
    return ", ".join(f"{count} {state}" for state, count in counts.items()) + ("" if took_s is None else f" in {clock_time(took_s)}")


def _discard(out: TextIO) -> None:
    """Send what is still buffered for an output to nowhere, or Python would fail on it when it exits."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, out.fileno())
        os.close(nowhere)


def _state(stage: StageView) -> str:
    """The decision about a stage, or how it ended if it has no output."""
    return stage.status if stage.status in ("failed", "stopped", "blocked", "killed") else stage.decision or stage.status


def _under_way(stage: StageView, now_ms: int) -> str:
    """`step 200/800  loss 7.000  tokens/s 41,200  left 1:00`"""
    parts = []
    if stage.step is not None:
        parts.append(f"step {stage.step:,}/{stage.steps:,}" if stage.steps else f"step {stage.step:,}")
    if stage.total:
        parts.append(f"{stage.done:,.0f}/{stage.total:,.0f} {stage.unit}".rstrip())
    for label, metric, form in RL_FIGURES if stage.newest("reward/score_mean") is not None else FIGURES:
        value = stage.newest(metric)
        if value is not None:
            parts.append(f"{label} {value:{form}}" if math.isfinite(value) else f"{label} {value}")
    left = seconds_left(stage, now_ms)
    if left is not None:
        parts.append(f"left {clock_time(left)}")
    elif stage.step is None and stage.started_ms is not None:
        parts.append(clock_time((now_ms - stage.started_ms) / 1000))
    return "  ".join(parts)
