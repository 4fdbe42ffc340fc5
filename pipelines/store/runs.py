"""A run's folder in the store: its paths, its records, its stop mark, and which runs have lost their driver.

runs/<run>/run.json                     what was run, by whom, with which config: written when the run begins
runs/<run>/job.json, submitted/         what `gptline submit` sent
runs/<run>/journal/00000001.jsonl ...   what happened, see `journal.py`
runs/<run>/stop                         the run was asked to stop
runs/<run>/<stage>.traceback.txt        why a stage failed, in full
runs/<run>/page.html                    the run for people
runs/<run>/tracking-<digest>.json       how much of the journal an MLflow server has
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
import time
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from pipelines.store.store import Store

STOP_LOOK_S = 0.3


class _Record(BaseModel):
    """Versions of gptline read each other's: unknown fields are ignored, missing ones have defaults."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class RunRecord(_Record):
    """What `run.json` holds."""

    run: str = ""
    pipeline: str = ""
    config: dict[str, Any] = {}
    """The whole config, with every default filled in."""
    config_path: str = ""
    command: str = ""
    """As the person typed it."""
    tracking: dict[str, Any] = {}
    started_ms: int | None = None
    user: str = ""
    host: str = ""
    snapshot: str = ""
    """Digest of the code that the workers import."""
    git: dict[str, Any] | None = None


class JobRecord(_Record):
    """What `job.json` holds: a run that was submitted to a cluster."""

    run: str = ""
    address: str
    config: str = ""
    """The frozen config file, relative to the run's folder."""
    use: dict[str, str] = {}
    """The command line's --use, as typed."""
    options: dict[str, Any] = {}
    snapshot: str = ""
    submitted_ms: int = 0
    user: str = ""


class RunFolder:
    """`RunFolder(store, "20261122-192002-quickstart-3fa1b2")`."""

    def __init__(self, store: Store, run: str) -> None:
        self.run = run
        self._store = store

    def name(self, *parts: str) -> str:
        """The object name of something in this folder: `name("page.html")`."""
        return "/".join(("runs", self.run, *parts))

    def path(self, *parts: str) -> Path:
        """Where this machine keeps it: for what processes on one machine share, such as logs and submitted files."""
        return self._store.machine_file(self.name(*parts))

    def remove(self) -> None:
        """Delete a folder whose run never began."""
        shutil.rmtree(self.path(), ignore_errors=True)

    # ---- records ----

    def record(self) -> RunRecord:
        """What `run.json` says; all defaults if it does not exist."""
        return RunRecord.model_validate_json(self._store.backend.get(self.name("run.json")) or b"{}")

    def write_record(self, record: RunRecord) -> None:
        self._store.backend.put_if_absent(self.name("run.json"), _json(record))

    def job(self) -> JobRecord | None:
        """What was submitted; None for a run that was not submitted."""
        data = self._store.backend.get(self.name("job.json"))
        return None if data is None else JobRecord.model_validate_json(data)

    def write_job(self, record: JobRecord) -> None:
        self._store.backend.put(self.name("job.json"), _json(record))

    # ---- stopping ----

    def request_stop(self) -> None:
        """Ask the run to stop, from this process or any other."""
        self._store.backend.put(self.name("stop"), b"")

    def stop_requested(self) -> bool:
        return self._store.backend.get(self.name("stop")) is not None

    # ---- what a run leaves for people ----

    def write_page(self, html: str) -> str:
        """Write the run's page; its object name."""
        self._store.backend.put(self.name("page.html"), html.encode(errors="backslashreplace"))
        return self.name("page.html")

    def write_traceback(self, stage: str, text: str) -> None:
        self._store.backend.put(self.name(f"{stage}.traceback.txt"), text.encode(errors="backslashreplace"))

    # ---- journal and delivery ----

    def segment(self, number: int) -> str:
        """The object name of a segment of the journal."""
        return self.name("journal", f"{number:08d}.jsonl")

    def last_segment(self) -> int:
        """The number of the journal's newest segment, 0 if there is none."""
        names = self._store.backend.list(f"{self.name('journal')}/")
        return int(names[-1].rsplit("/", 1)[1].removesuffix(".jsonl")) if names else 0

    def tracking(self, uri: str) -> str:
        """The object name, without an ending, of what is known about the delivery to one MLflow."""
        return self.name(f"tracking-{hashlib.sha256(uri.encode()).hexdigest()[:12]}")


class StopMark:
    """Whether a run was asked to stop, looked up at most every `STOP_LOOK_S`: how a stop reaches a worker, wherever it runs."""

    def __init__(self, store: Store, run: str) -> None:
        self._folder = RunFolder(store, run)
        self._looked_at_s = 0.0
        self._requested = False

    def __call__(self) -> bool:
        if not self._requested and time.monotonic() - self._looked_at_s > STOP_LOOK_S:
            self._requested = self._folder.stop_requested()
            self._looked_at_s = time.monotonic()
        return self._requested


def new_run_id(pipeline: str) -> str:
    """An id for a run that begins now. Its last part begins with the 256th of the second, which orders runs of the same second."""
    now_s = time.time()
    return f"{time.strftime('%Y%m%d-%H%M%S', time.localtime(now_s))}-{pipeline}-{int(now_s % 1 * 256):02x}{secrets.token_hex(2)}"


def _json(record: _Record) -> bytes:
    return json.dumps(record.model_dump(mode="json"), ensure_ascii=False).encode()
