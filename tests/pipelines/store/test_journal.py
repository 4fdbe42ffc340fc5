from __future__ import annotations

import math
from pathlib import Path

import pytest

from cluster import commit
from cluster.events import Curves, Point
from pipelines.store.events import JournalEvent, Note, RunEnded, RunStarted, StageEnded, StagePoints, StageProgress
from pipelines.store.journal import JournalReader, JournalWriter, Superseded, end_dead_run, last_event, read_journal
from pipelines.store.store import Store

STARTED = RunStarted(run="r", pipeline="p")


def loss(*values: float, step: int = 1) -> Curves:
    """Points of train/loss with these values, from `step` on."""
    return {"train/loss": [Point(step + at, value, 0) for at, value in enumerate(values)]}


def kinds(events: list[JournalEvent]) -> list[type]:
    return [type(event) for event in events]


def test_what_is_written_is_read_in_order_and_once(store: Store):
    writer = JournalWriter(store, "r")
    reader = JournalReader(store, "r")
    writer.write(STARTED)
    assert list(reader.read()) == [STARTED]
    note, ended = Note(stage="s", text="ü"), RunEnded(status="FINISHED")
    writer.write(note)
    writer.write(ended)
    assert list(reader.read()) == [note, ended]
    assert list(reader.read()) == []
    assert read_journal(store, "r") == [STARTED, note, ended]


def test_an_event_that_cannot_be_json_is_refused_and_does_not_block_later_ones(store: Store):
    writer = JournalWriter(store, "r")
    with pytest.raises(TypeError):
        writer.write(StageProgress(stage="s", done={1}))  # type: ignore[arg-type]
    writer.write(RunEnded(status="FAILED"))
    assert kinds(read_journal(store, "r")) == [RunEnded]


def test_points_that_a_resumed_gang_repeats_are_read_once(store: Store):
    writer = JournalWriter(store, "r")
    for step in (1, 2, 3, 2, 3, 4):  # resumed after step 1
        writer.write(StagePoints(stage="s", curves=loss(step / 10, step=step)))
    writer.flush()
    read = [point for event in read_journal(store, "r") if isinstance(event, StagePoints) for point in event.curves["train/loss"]]
    assert [point.step for point in read] == [1, 2, 3, 4]


def test_points_share_segments_and_the_last_event_flushes_them(store: Store):
    writer = JournalWriter(store, "r")
    writer.write(STARTED)
    for step in range(50):
        writer.write(StagePoints(stage="s", curves=loss(1.0, step=step)))
    writer.write(RunEnded(status="FINISHED"))
    assert len(store.backend.list("runs/r/journal/")) < 10
    assert len(read_journal(store, "r")) == 52


def test_a_second_driver_fences_the_first(store: Store):
    first = JournalWriter(store, "r")
    first.write(STARTED)
    second = JournalWriter(store, "r")
    taken_over = Note(stage="s", text="taken over")
    second.write(taken_over)
    with pytest.raises(Superseded, match="taken over by another driver"):
        first.write(Note(stage="s", text="I am still here"))
    assert read_journal(store, "r") == [STARTED, taken_over]


def test_a_nan_loss_is_kept(store: Store):
    writer = JournalWriter(store, "r")
    writer.write(StagePoints(stage="s", curves=loss(math.nan, math.inf)))
    writer.flush()
    (event,) = read_journal(store, "r")
    assert isinstance(event, StagePoints)
    first, second = event.curves["train/loss"]
    assert math.isnan(first.value)
    assert second.value == math.inf


def test_the_last_point_before_a_pause_is_written_during_the_pause(store: Store, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pipelines.store.journal.FLUSH_S", 60.0)
    writer = JournalWriter(store, "r")
    points = StagePoints(stage="s", curves=loss(1.0))
    writer.write(points)
    writer.flush_due()
    assert read_journal(store, "r") == []
    monkeypatch.setattr("pipelines.store.journal.FLUSH_S", 0.0)
    writer.flush_due()
    assert read_journal(store, "r") == [points]


@pytest.mark.parametrize("stopped_by", [OSError(5, "can't be flushed"), KeyboardInterrupt()], ids=["an error", "a second Ctrl-C"])
def test_a_segment_that_was_written_before_its_writer_noticed_is_recognised_as_its_own(
    store: Store, monkeypatch: pytest.MonkeyPatch, stopped_by: BaseException
):
    writer = JournalWriter(store, "r")
    writer.write(STARTED)

    def stopped(folder: Path) -> None:
        raise stopped_by

    with monkeypatch.context() as patch:
        patch.setattr(commit, "fsync_folder", stopped)
        with pytest.raises(type(stopped_by)):
            writer.write(StageEnded(stage="s", status="stopped"))
    assert len(store.backend.list("runs/r/journal/")) == 2
    writer.write(RunEnded(status="KILLED"))
    assert kinds(read_journal(store, "r")) == [RunStarted, StageEnded, RunEnded]


def test_the_last_event_is_found_without_reading_the_earlier_segments(store: Store, monkeypatch: pytest.MonkeyPatch):
    assert last_event(store, "r") is None
    writer = JournalWriter(store, "r")
    notes = [Note(stage="s", text=text) for text in ("one", "two", "three")]
    for note in notes:
        writer.write(note)
    read: list[str] = []
    real = store.backend.get
    monkeypatch.setattr(store.backend, "get", lambda name: read.append(name) or real(name))
    assert last_event(store, "r") == notes[2]
    assert read == ["runs/r/journal/00000003.jsonl"]
    store.backend.put("runs/r/journal/00000003.jsonl", b"{cut of")
    assert last_event(store, "r") == notes[1]


def test_the_journal_of_a_dead_driver_is_ended_once(store: Store):
    assert not end_dead_run(store, "never begun")
    JournalWriter(store, "r").write(STARTED)
    assert end_dead_run(store, "r")
    assert not end_dead_run(store, "r")
    _, ended = read_journal(store, "r")
    assert isinstance(ended, RunEnded)
    assert (ended.status, ended.text) == ("KILLED", "its driver is gone")


@pytest.mark.parametrize("listing", [0, 1, 2], ids=["before the look", "after the number was taken", "after the look"])
def test_a_driver_considered_dead_that_ends_its_run_after_all_keeps_its_own_ending(
    store: Store, monkeypatch: pytest.MonkeyPatch, listing: int
):
    driver = JournalWriter(store, "r")
    driver.write(STARTED)
    finished = RunEnded(status="FINISHED")
    listed = 0
    real = store.backend.list

    def ended_after(prefix: str) -> list[str]:
        nonlocal listed
        names = real(prefix)
        listed += 1
        if listed == listing:
            driver.write(finished)
        return names

    if not listing:
        driver.write(finished)
    monkeypatch.setattr(store.backend, "list", ended_after)
    assert not end_dead_run(store, "r")
    assert listed == 2  # for the number, and for the look
    assert read_journal(store, "r") == [STARTED, finished]


def test_a_journal_of_an_earlier_version_is_read(store: Store):
    lines = (
        '{"type": "run_started", "time_ms": 1, "pipeline": "p", "run": "r", "config": "p.toml", "command": null, "snapshot": "ab",'
        ' "user": "ada", "host": "node7", "versions": {"torch": "2.13.0"}, "forecast_s": null}\n'
        '{"type": "points", "time_ms": 2, "stage": "s", "points": [["train/loss", 1, 0.5, 2], ["train/lr", 1, 0.1, 2]]}\n'
    )
    store.backend.put("runs/r/journal/00000001.jsonl", lines.encode())
    started, points = read_journal(store, "r")
    assert started == RunStarted(
        time_ms=1, pipeline="p", run="r", config="p.toml", snapshot="ab", user="ada", host="node7", versions={"torch": "2.13.0"}
    )
    assert points == StagePoints(time_ms=2, stage="s", curves={"train/loss": [Point(1, 0.5, 2)], "train/lr": [Point(1, 0.1, 2)]})
