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


def test_a_page_that_cannot_be_made_takes_nothing_along(small: Small, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pipelines.run.ending.render", full)
    assert small.run() == (1, {"words": "done", "cut": "done", "report": "done"})
    assert small.ending().status == "FINISHED"
    assert small.announced()[1:] == ["could not write the run's page: OSError: [Errno 28] No space left on device"]


def test_what_a_full_disk_cannot_record_has_failed_and_the_run_says_how_to_go_on(small: Small, monkeypatch: pytest.MonkeyPatch):
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


def test_a_disk_that_is_full_in_the_middle_ends_the_run_with_its_last_words(small: Small, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Recorder, "forward", lambda *_: monkeypatch.setattr(FolderBackend, "put_if_absent", full))
    code, status = small.run()
    assert (code, status) == (1, {"words": "done"})  # then `cut` had something to tell, and the disk was full
    assert small.announced()[1] == "can't go on: [Errno 28] No space left on device"
    last = small.ending()  # on the screen, where the journal can't have it
    assert (last.status, last.exit_code) == ("FAILED", 1)
    assert last.text == "cut failed; the other results are kept. Fix the cause, then resume with: gptline run small.toml"


def test_a_store_that_is_deleted_while_a_run_uses_it_fails_the_run_and_nothing_worse(small: Small):
    small.write(
        "kinds.py",
        KINDS.replace("    text = (documents.path", "    import shutil; shutil.rmtree(stage._store.root)\n    text = (documents.path"),
    )
    code, _ = small.run()
    assert code == 1
    last = small.ending()
    assert last.text.startswith("cut failed; ")


def test_whatever_fails_in_the_driver_the_run_has_its_last_word(small: Small, monkeypatch: pytest.MonkeyPatch):
    def unheard(*_: object) -> None:
        raise TypeError("Object of type int64 is not JSON serializable")

    monkeypatch.setattr(Supervisor, "_attend", unheard)
    assert small.run() == (1, {"words": "stopped"})
    said = "TypeError: Object of type int64 is not JSON serializable"
    assert small.announced()[1] == f"can't go on: {said}"
    last = small.ending()
    assert (last.status, last.exit_code) == ("FAILED", 1)
    assert last.text == f"the driver failed ({said}); what the store has is kept. Fix the cause, then resume with: gptline run small.toml"
