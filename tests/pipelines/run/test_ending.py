"""The last steps of a run when the disk is full, the store is gone or the driver fails."""

from __future__ import annotations

import errno
import os

import pytest

from pipelines.run.recorder import Recorder
from pipelines.run.supervisor import Supervisor
from pipelines.store.backend import FolderBackend
from pipelines.store.store import Store
from tests.pipelines.run.small import KINDS, TOML, Small


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_page_that_cannot_be_written_does_not_undo_the_run(small: Small, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pipelines.run.ending.render", full)
    assert small.run() == (1, {"words": "done", "cut": "done", "report": "done"})
    assert small.ending().status == "FINISHED"
    assert small.announced()[1:] == ["could not write the run's page: OSError: [Errno 28] No space left on device"]


def test_a_stage_whose_result_a_full_disk_cannot_record_fails_and_the_run_says_how_to_resume(small: Small, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Store, "record", full)
    assert small.run() == (1, {"words": "failed", "cut": "blocked", "report": "blocked"})
    assert small.error() == "its result can't be recorded: [Errno 28] No space left on device"
    assert small.ending().text.endswith("Fix the cause, then resume with: gptline run small.toml")


def test_a_full_disk_does_not_hide_why_a_stage_failed(small: Small, monkeypatch: pytest.MonkeyPatch):
    put = FolderBackend.put
    monkeypatch.setattr(FolderBackend, "put", lambda self, name, data: full() if "traceback" in name else put(self, name, data))
    small.write("small.toml", TOML.replace("./kinds.py:cut", "./kinds.py:broken").replace('["words", "cut"]', '["words"]'))
    assert small.run() == (1, {"words": "done", "cut": "failed", "report": "done"})
    assert small.error().startswith("KeyError: 'no such word'")


def test_a_disk_that_fills_up_during_the_run_ends_it_with_a_full_report(small: Small, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Recorder, "forward", lambda *_: monkeypatch.setattr(FolderBackend, "put_if_absent", full))
    code, status = small.run()
    assert (code, status) == (1, {"words": "done"})  # the disk was full when `cut` reported its first event
    assert small.announced()[1] == "can't go on: [Errno 28] No space left on device"
    last = small.ending()  # shown on the screen, since the journal can't be written
    assert (last.status, last.exit_code) == ("FAILED", 1)
    assert last.text == "cut failed; the other results are kept. Fix the cause, then resume with: gptline run small.toml"


def test_a_store_that_is_deleted_during_a_run_only_fails_the_run(small: Small):
    small.write(
        "kinds.py",
        KINDS.replace("    text = (documents.path", "    import shutil; shutil.rmtree(stage._store.root)\n    text = (documents.path"),
    )
    code, _ = small.run()
    assert code == 1
    last = small.ending()
    assert last.text.startswith("cut failed; ")


def test_an_error_in_the_driver_still_ends_the_run_with_a_report(small: Small, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise TypeError("Object of type int64 is not JSON serializable")

    monkeypatch.setattr(Supervisor, "_attend", fail)
    assert small.run() == (1, {"words": "stopped"})
    error = "TypeError: Object of type int64 is not JSON serializable"
    assert small.announced()[1] == f"can't go on: {error}"
    last = small.ending()
    assert (last.status, last.exit_code) == ("FAILED", 1)
    assert last.text == f"the driver failed ({error}); what the store has is kept. Fix the cause, then resume with: gptline run small.toml"
