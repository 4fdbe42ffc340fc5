"""progress.py: plain lines in a pipe, rows on a terminal, and no error if either is lost."""

from __future__ import annotations

import io
import shlex
import subprocess
import sys
from typing import Any

import pytest

from cluster.events import Point
from pipelines.observe.progress import Progress
from pipelines.store.events import (
    Announcement,
    Note,
    RunEnded,
    RunStarted,
    StageEnded,
    StagePlanned,
    StagePoints,
    StageProgress,
    StageStarted,
)


def started(stage: str, **fields: Any) -> StageStarted:
    return StageStarted(**({"time_ms": 0, "stage": stage, "key": "k", "decision": "run", "reason": "lr: 0.1 -> 0.2"} | fields))


def ended(stage: str, **fields: Any) -> StageEnded:
    given = {"time_ms": 5000, "status": "done", "decision": "run", "key": "k", "number": 1, "output": "ab" * 32, "seconds": 2.5}
    return StageEnded(**({"stage": stage} | given | fields))


def points(stage: str, step: int, time_ms: int, **values: float) -> StagePoints:
    """One point of each curve; `train_loss` stands for train/loss."""
    return StagePoints(stage=stage, curves={name.replace("_", "/", 1): [Point(step, value, time_ms)] for name, value in values.items()})


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_a_pipe_gets_a_line_when_a_stage_starts_and_one_when_it_ends() -> None:
    out = io.StringIO()
    progress = Progress(out, clock=Clock())
    progress.show(StagePlanned(stage="documents", decision="run", reason="new"))
    progress.show(started("documents"))
    progress.show(ended("documents"))
    progress.show(ended("tokenizer", status="reused", decision="reuse", reason="nothing changed", seconds=0))
    progress.close()
    assert out.getvalue().splitlines() == [
        "documents   run: lr: 0.1 -> 0.2",
        "documents   made: 2.5 s  abababababab",
        "tokenizer   reuse: abababababab  nothing changed",
    ]


def test_the_line_of_a_stopped_stage_says_at_which_step_it_will_resume() -> None:
    out = io.StringIO()
    progress = Progress(out, clock=Clock())
    progress.show(started("pretrain", steps=100))
    progress.show(ended("pretrain", status="stopped", reason="saved at step 70", output=""))
    assert out.getvalue().splitlines()[-1] == "pretrain    stopped: saved at step 70"


def test_training_reports_at_most_every_ten_seconds() -> None:
    out, clock = io.StringIO(), Clock()
    progress = Progress(out, clock=clock)
    progress.show(started("pretrain", steps=800))
    for step in range(1, 801):  # ten steps a second: 80 s, a tenth of it every 8 s
        clock.now_s = step / 10
        progress.show(points("pretrain", step, step * 100, train_loss=8.0 - step / 200, train_tokens_per_s=41_200.0))
    lines = out.getvalue().splitlines()
    assert len(lines) == 1 + 8
    assert lines[2] == "pretrain    step 200/800  loss 7.000  tokens/s 41,200  left 1:00"


def test_reinforcement_learning_reports_its_score_and_not_its_loss() -> None:
    out, clock = io.StringIO(), Clock()
    progress = Progress(out, clock=clock)
    progress.show(started("rl", steps=24))
    clock.now_s = 60
    values = {"train_loss": -0.0, "reward_score_mean": 0.54, "rollout_kl_k1_nats_per_response": 0.031, "rollout_tokens_per_s": 2190.0}
    progress.show(points("rl", 12, 60_000, **values))
    assert out.getvalue().splitlines()[-1] == "rl          step 12/24  score 0.540  KL 0.03  tokens/s 2,190"


def test_training_reports_how_far_it_has_encoded_its_records_before_the_first_step() -> None:
    out, clock = io.StringIO(), Clock()
    progress = Progress(out, clock=clock)
    progress.show(started("sft", steps=100))
    for second in (5, 12, 26):
        clock.now_s = second
        done = 2_000 * second
        progress.show(StageProgress(time_ms=1000 * second, stage="sft", done=done, total=52_000, unit="conversations encoded"))
    clock.now_s = 37
    progress.show(points("sft", 10, 37_000, train_loss=3.0))
    assert out.getvalue().splitlines()[1:] == [
        "sft         24,000/52,000 conversations encoded  0:12",
        "sft         52,000/52,000 conversations encoded  0:26",
        "sft         step 10/100  loss 3.000",
    ]


def test_a_log_mentions_a_stage_that_has_reported_nothing_for_a_minute() -> None:
    out, clock = io.StringIO(), Clock()
    progress = Progress(out, clock=clock)
    progress.show(started("tokenizer"))
    progress.show(StageProgress(time_ms=0, stage="tokenizer", done=9, total=9, unit="documents read, learning merges"))
    for second in range(1, 150):
        clock.now_s = float(second)
        progress.mention_quiet_stages()
    progress.show(ended("tokenizer"))
    clock.now_s = 500.0
    progress.mention_quiet_stages()
    assert out.getvalue().splitlines()[1:] == [
        "tokenizer   9/9 documents read, learning merges  1:00",
        "tokenizer   9/9 documents read, learning merges  2:00",
        "tokenizer   made: 2.5 s  abababababab",
    ]


def test_a_slow_stage_reports_once_a_minute_even_before_a_tenth_is_done() -> None:
    out, clock = io.StringIO(), Clock()
    progress = Progress(out, clock=clock)
    progress.show(started("pretrain", steps=100_000))
    for step in range(1, 121):
        clock.now_s = float(step)
        progress.show(points("pretrain", step, step * 1000, train_loss=1.0))
    assert len(out.getvalue().splitlines()) == 1 + 2


def test_no_control_character_of_a_message_reaches_a_pipe_or_a_terminal() -> None:
    for live in (False, True):
        out = io.StringIO()
        progress = Progress(out, live=live)
        progress.show(Note(stage="pretrain", text="rank 1 \x1b[2J died\r\n"))
        progress.close()
        assert "rank 1  [2J died" in out.getvalue()
        assert "\x1b[2J" not in out.getvalue()


def test_an_announcement_is_a_line_of_its_own() -> None:
    out = io.StringIO()
    with Progress(out) as progress:
        progress.show(Announcement("MLflow can't be reached"))
    assert out.getvalue() == "MLflow can't be reached\n"


def test_a_terminal_has_a_row_for_each_stage() -> None:
    out = io.StringIO()
    progress = Progress(out, live=True, clock=Clock())
    progress.show(StagePlanned(stage="pretrain", decision="run", reason="new"))
    progress.show(started("evaluate"))
    progress.close()
    assert "pretrain  run  new" in out.getvalue()
    assert "evaluate  run  0:00" in out.getvalue()


def test_the_outcome_of_a_run_is_printed_when_the_progress_closes() -> None:
    out = io.StringIO()
    with Progress(out) as progress:
        progress.show(RunStarted(time_ms=0, pipeline="line"))
        progress.show(ended("documents"))
        progress.show(RunEnded(time_ms=2000, status="FAILED", text="pretrain failed"))
    assert out.getvalue().splitlines()[-2:] == ["1 made in 0:02", "pretrain failed"]


def test_rich_is_imported_only_for_a_terminal() -> None:
    code = "import io, sys; from pipelines.observe.progress import Progress; Progress(io.StringIO()); assert 'rich' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_finished_stage_shows_what_its_output_holds() -> None:
    out = io.StringIO()
    progress = Progress(out, clock=Clock(), summarize={"ab" * 32: "760 pairs (73 held out; 163 bad, 76 duplicates)"}.__getitem__)
    progress.show(ended("pairs", seconds=4.5))
    progress.show(ended("pairs", status="failed", error="no space left", output=""))
    assert out.getvalue().splitlines() == [
        "pairs       made: 4.5 s  760 pairs (73 held out; 163 bad, 76 duplicates)  abababababab",
        "pairs       failed: no space left",
    ]


def test_rows_show_what_an_output_holds_too() -> None:
    out = io.StringIO()
    progress = Progress(out, live=True, clock=Clock(), summarize=lambda digest: "760 pairs")
    progress.show(ended("pairs"))
    progress.close()
    assert "pairs  run  2.5 s  760 pairs  abababababab" in out.getvalue()


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("term", ["dumb", "unknown", None])
def test_a_terminal_that_cannot_redraw_gets_plain_lines(monkeypatch: pytest.MonkeyPatch, term: str | None) -> None:
    monkeypatch.delenv("TERM", raising=False) if term is None else monkeypatch.setenv("TERM", term)
    out = Terminal()
    with Progress(out, clock=Clock()) as progress:
        progress.show(started("pretrain"))
        progress.show(ended("pretrain"))
    assert out.getvalue() == "pretrain    run: lr: 0.1 -> 0.2\npretrain    made: 2.5 s  abababababab\n"


@pytest.mark.parametrize("live", [False, True])
def test_an_ascii_terminal_gets_escapes_for_other_characters(live: bool) -> None:
    data = io.BytesIO()
    out = io.TextIOWrapper(data, encoding="ascii")
    with Progress(out, live=live, clock=Clock()) as progress:
        progress.show(ended("pairs", status="failed", error="no file \u8bd7.csv", output=""))
        progress.show(Note(stage="pairs", text="\u2192"))
    out.flush()
    assert b"no file \\u8bd7.csv" in data.getvalue()
    assert b"\\u2192" in data.getvalue()


class Lost(io.StringIO):
    """An output whose reader has gone away."""

    attempts = 0

    def write(self, text: str) -> int:
        self.attempts += 1
        raise BrokenPipeError


@pytest.mark.parametrize("live", [False, True])
def test_a_lost_output_is_given_up_after_one_attempt(live: bool) -> None:
    out = Lost()
    with Progress(out, live=live, clock=Clock()) as progress:
        progress.show(started("pretrain"))
        progress.show(Announcement("stopping"))
        progress.show(ended("pretrain"))
    assert out.attempts == 1
    assert progress.view.stages["pretrain"].status == "done"


@pytest.mark.parametrize("output", ["a closed pipe", "a full device", "nothing"])
def test_a_process_that_loses_its_standard_output_exits_cleanly(output: str) -> None:
    code = (
        "from pipelines.observe.progress import Progress; from pipelines.store.events import Announcement\n"
        "with Progress() as progress:\n"
        "    for _ in range(3000): progress.show(Announcement('a line of some length, so that the buffer fills up'))\n"
        "open('/dev/stderr', 'w').write('done')"
    )
    shell = {"a closed pipe": "| true; exit ${PIPESTATUS[0]}", "a full device": "> /dev/full", "nothing": ">&-"}[output]
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} {shell}"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "done")


def test_the_cursor_is_visible_while_rows_change_so_that_a_killed_run_cannot_leave_it_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    progress = Progress(out, clock=Clock())
    shown, hidden = out.getvalue().rfind("\x1b[?25h"), out.getvalue().rfind("\x1b[?25l")
    progress.close()
    assert shown > hidden


def test_a_duration_that_another_machines_clock_makes_negative_is_not_shown() -> None:
    out = io.StringIO()
    with Progress(out, clock=Clock()) as progress:
        progress.show(RunStarted(time_ms=4_382_000, pipeline="line"))
        progress.show(started("pretrain", time_ms=4_382_000))
        progress.show(RunEnded(time_ms=0, status="KILLED", text="its driver is gone"))
    assert out.getvalue().splitlines()[-2:] == ["1 killed", "its driver is gone"]
