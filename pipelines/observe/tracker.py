"""The process that sends a run to MLflow while it happens, and the driver's hold on it.

The driver starts `python -m pipelines.observe.tracker STORE RUN URI` and does not wait for it: importing mlflow (2 s) and migrating a fresh
database (4 s) overlap with the stages, and the process outlives the driver until everything is delivered.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from pipelines.observe.delivery import DeliveryState, Sender
from pipelines.observe.mlflow_address import resolve_uri, run_uri, short_uri, unreachable
from pipelines.plan.environment import ROOT
from pipelines.store.runs import RunFolder
from pipelines.store.store import Store

POLL_S = 0.5
LONGEST_WAIT_S = 10.0
"""Pauses double up to this while MLflow can't be reached."""


class Tracker:
    """The driver's hold on the sending process. Only `finish` waits for it."""

    def __init__(self, store: Store, run: str, uri: str, process: subprocess.Popen[bytes]) -> None:
        self._store = store
        self._run = run
        self._uri = uri
        self._process = process
        self._reported: str | None = None

    def news(self) -> str | None:
        """A sentence for people when MLflow can't be reached, once; otherwise None."""
        error = self._state().error
        if error is None or error == self._reported:
            return None
        self._reported = error
        return error

    def finish(self, deadline_s: float) -> str | None:
        """Wait for everything to be delivered, but no longer than this. A sentence about what happens to the rest, or None.

        Call it after the journal has ended.
        """
        until_s = time.monotonic() + deadline_s
        while True:
            state = self._state()
            if state.is_complete(self._store, self._run):
                return None
            ended = self._process.poll() is not None
            if state.error is not None:
                return state.error if state.error != self._reported else None
            if ended:
                log = _log_name(self._store, self._run, self._uri)
                return f"MLflow {self._uri} does not have all of this run (see {log} in the store); `gptline sync` sends the rest"
            if time.monotonic() >= until_s:
                return f"MLflow {self._uri}: process {self._process.pid} is still sending this run; `gptline sync` sends what it may leave"
            time.sleep(0.05)

    def _state(self) -> DeliveryState:
        return DeliveryState.read(self._store, self._run, self._uri)


def start_tracking(store: Store, run: str, uri: str) -> Tracker:
    """Start the process that sends a run. It ends by itself, with the run or with this process."""
    uri = short_uri(uri, store)
    path = os.pathsep.join(each for each in (str(ROOT), os.environ.get("PYTHONPATH")) if each)
    log = store.machine_file(_log_name(store, run, uri))
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "pipelines.observe.tracker", str(store), run, uri, "--driver", str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C at the terminal is for the driver, whose last events must still be sent
        )
    return Tracker(store, run, uri, process)


def follow(store: Store, run: str, uri: str, alive: Callable[[], bool]) -> None:
    """Send a run until all of it is delivered, or until its driver is gone and nothing more can be done.

    Then deliver what the MLflows of other runs lack.
    """
    sender = Sender(store, run, uri)
    wait_s = POLL_S
    while True:
        driver_lives = alive()  # before reading, so that the last events of a driver that ends now are read below
        delivery = sender.deliver()
        if delivery.error is None:
            wait_s = POLL_S
            if sender.view.status != "RUNNING" or not driver_lives:
                break
        elif not driver_lives:
            return
        else:
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)
        until_s = time.monotonic() + wait_s
        while time.monotonic() < until_s and alive():
            time.sleep(min(0.1, wait_s))
    uris = {other: run_uri(store, other) for other in store.runs() if other != run}
    behind = {other: its_uri for other, its_uri in uris.items() if not DeliveryState.read(store, other, its_uri).is_complete(store, other)}
    down = {its_uri for its_uri in set(behind.values()) if unreachable(resolve_uri(its_uri, store)) is not None}
    for other, its_uri in behind.items():
        if its_uri not in down:
            Sender(store, other, its_uri).deliver()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pipelines.observe.tracker", description="Send one run to MLflow while it happens.")
    parser.add_argument("store", type=Path)
    parser.add_argument("run")
    parser.add_argument("uri")
    parser.add_argument("--driver", type=int, required=True, help="process id of the run's driver, the parent of this process")
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(5)  # training comes first
    store = Store(arguments.store)
    follow(store, arguments.run, arguments.uri, alive=lambda: os.getppid() == arguments.driver)
    log = store.machine_file(_log_name(store, arguments.run, arguments.uri))
    if log.exists() and not log.stat().st_size:
        log.unlink()


def _log_name(store: Store, run: str, uri: str) -> str:
    return f"{RunFolder(store, run).tracking(uri)}.log"


if __name__ == "__main__":
    main()
