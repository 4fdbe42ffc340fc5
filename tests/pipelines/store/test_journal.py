from __future__ import annotations

import math
from pathlib import Path

import pytest

from cluster import commit
from pipelines.store.journal import JournalReader, JournalWriter, Superseded, end_dead, last_event, read_journal
from pipelines.store.store import Store


def test_what_is_written_is_read_in_order_and_once(store: Store):
    writer = JournalWriter(store, "r")
    reader = JournalReader(store, "r")
    writer.write("run_started", pipeline="p")
    assert [event["type"] for event in reader.read()] == ["run_started"]
    writer.write("note", stage="s", text="ü")
    writer.write("run_ended", status="FINISHED")
    assert [event["type"] for event in reader.read()] == ["note", "run_ended"]
    assert list(reader.read()) == []
    assert read_journal(store, "r")[1]["text"] == "ü"


def test_an_event_that_is_no_json_is_refused_and_stands_in_nobodys_way(store: Store):
    writer = JournalWriter(store, "r")
    with pytest.raises(TypeError):
        writer.write("progress", done={1})
    writer.write("run_ended", status="FAILED")
    assert [event["type"] for event in read_journal(store, "r")] == ["run_ended"]


def test_points_that_a_resumed_gang_repeats_are_read_once(store: Store):
    writer = JournalWriter(store, "r")
    for step in (1, 2, 3, 2, 3, 4):  # resumed after step 1
        writer.write("points", stage="s", points=[["train/loss", step, step / 10, 0]])
    writer.flush()
    read = [point for event in read_journal(store, "r") for point in event["points"]]
    assert [point[1] for point in read] == [1, 2, 3, 4]


def test_points_wait_for_company_and_an_end_flushes_them(store: Store):
    writer = JournalWriter(store, "r")
    writer.write("run_started", pipeline="p")
    for step in range(50):
        writer.write("points", stage="s", points=[["train/loss", step, 1.0, 0]])
    writer.write("run_ended", status="FINISHED")
    assert len(store.backend.list("runs/r/journal")) < 10
    assert len(read_journal(store, "r")) == 52


def test_a_second_driver_fences_the_first(store: Store):
    first = JournalWriter(store, "r")
    first.write("run_started", pipeline="p")
    second = JournalWriter(store, "r")
    second.write("note", stage="s", text="taken over")
    with pytest.raises(Superseded, match="taken over by another driver"):
        first.write("note", stage="s", text="I am still here")
    assert [event.get("text") for event in read_journal(store, "r")] == [None, "taken over"]


def test_a_loss_that_is_no_number_is_kept_as_it_is(store: Store):
    JournalWriter(store, "r").write("points", stage="s", points=[["train/loss", 1, math.nan, 0]])
    writer = JournalWriter(store, "r2")
    writer.write("points", stage="s", points=[["train/loss", 1, math.nan, 0], ["train/loss", 2, math.inf, 0]])
    writer.flush()
    (event,) = read_journal(store, "r2")
    assert math.isnan(event["points"][0][2])
    assert event["points"][1][2] == math.inf


def test_the_last_point_before_a_pause_is_told_while_nothing_else_happens(store: Store, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pipelines.store.journal.FLUSH_S", 60.0)
    writer = JournalWriter(store, "r")
    writer.write("points", stage="s", points=[["train/loss", 1, 1.0, 0]])
    writer.keep_up()
    assert read_journal(store, "r") == []
    monkeypatch.setattr("pipelines.store.journal.FLUSH_S", 0.0)
    writer.keep_up()
    assert [event["points"][0][1] for event in read_journal(store, "r")] == [1]


@pytest.mark.parametrize("stopped_by", [OSError(5, "can't be flushed"), KeyboardInterrupt()], ids=["an error", "a second Ctrl-C"])
def test_a_segment_that_was_there_before_its_writer_knew_it_is_its_own(
    store: Store, monkeypatch: pytest.MonkeyPatch, stopped_by: BaseException
):
    writer = JournalWriter(store, "r")
    writer.write("run_started", pipeline="p")

    def stopped(folder: Path) -> None:
        raise stopped_by

    with monkeypatch.context() as patch:
        patch.setattr(commit, "fsync_folder", stopped)
        with pytest.raises(type(stopped_by)):
            writer.write("stage_ended", stage="s", status="stopped")
    assert len(store.backend.list("runs/r/journal")) == 2
    writer.write("run_ended", status="KILLED")
    assert [event["type"] for event in read_journal(store, "r")] == ["run_started", "stage_ended", "run_ended"]


def test_the_last_event_is_found_without_reading_those_before_it(store: Store, monkeypatch: pytest.MonkeyPatch):
    assert last_event(store, "r") is None
    writer = JournalWriter(store, "r")
    for text in ("one", "two", "three"):
        writer.write("note", stage="s", text=text)
    read: list[str] = []
    real = store.backend.get
    monkeypatch.setattr(store.backend, "get", lambda name: read.append(name) or real(name))
    last = last_event(store, "r")
    assert last is not None
    assert last["text"] == "three"
    assert read == ["runs/r/journal/00000003.jsonl"]
    store.backend.put("runs/r/journal/00000003.jsonl", b"{cut of")
    last = last_event(store, "r")
    assert last is not None
    assert last["text"] == "two"


def test_a_driver_that_is_gone_gets_one_last_word(store: Store):
    assert not end_dead(store, "never begun")
    JournalWriter(store, "r").write("run_started", pipeline="p")
    assert end_dead(store, "r")
    assert not end_dead(store, "r")
    events = read_journal(store, "r")
    assert [(event["type"], event.get("status"), event.get("text")) for event in events] == [
        ("run_started", None, None),
        ("run_ended", "KILLED", "its driver is gone"),
    ]


@pytest.mark.parametrize("listing", [0, 1, 2], ids=["before the look", "after the number was taken", "after the look"])
def test_a_driver_that_said_its_last_word_after_it_was_taken_for_dead_keeps_it(store: Store, monkeypatch: pytest.MonkeyPatch, listing: int):
    driver = JournalWriter(store, "r")
    driver.write("run_started", pipeline="p")
    listed = 0
    real = store.backend.list

    def ended_after(prefix: str) -> list[str]:
        nonlocal listed
        names = real(prefix)
        listed += 1
        if listed == listing:
            driver.write("run_ended", status="FINISHED")
        return names

    if not listing:
        driver.write("run_ended", status="FINISHED")
    monkeypatch.setattr(store.backend, "list", ended_after)
    assert not end_dead(store, "r")
    assert listed == 2  # for the number, and for the look
    assert [event.get("status") for event in read_journal(store, "r")] == [None, "FINISHED"]
