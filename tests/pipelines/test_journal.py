from __future__ import annotations

import math

import pytest

from pipelines.journal import JournalReader, JournalWriter, Superseded, read_journal
from pipelines.store import Store


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
    writer = JournalWriter(store, "r")
    writer.write("points", stage="s", points=[["train/loss", 1, 1.0, 0]])
    writer.keep_up()
    assert read_journal(store, "r") == []
    monkeypatch.setattr("pipelines.journal.FLUSH_S", 0.0)
    writer.keep_up()
    assert [event["points"][0][1] for event in read_journal(store, "r")] == [1]
