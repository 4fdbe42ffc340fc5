"""One lease per piece of work: who makes a key, who drives a run. A second one waits, and says whom it waits for.

A lease is a row of generations, `leases/<name>/<generation>.json`. Taking it means writing the next number put-if-absent, so that of
two takers one wins; the newest generation holds. The holder renews its own object; a waiter calls a lease dead when that object has not
changed for `DEAD_AFTER_S` of the waiter's own clock, or at once when the holder was a process of this machine that is gone.
"""

from __future__ import annotations

import getpass
import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from pipelines.store import Store, born

RENEW_EVERY_S = 5.0
DEAD_AFTER_S = 30.0


class Lease:
    """Held from `take` until `release`; renewed by a thread in between."""

    def __init__(self, store: Store, name: str, generation: int, holder: dict[str, Any]) -> None:
        self._store = store
        self._name = name
        self._generation = generation
        self._holder = holder
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._renew, name=f"lease {name}", daemon=True)
        self._thread.start()

    def lost(self) -> bool:
        """True when another took the lease over, having taken this process for dead: publish nothing under it."""
        return _newest(self._store, self._name) != self._generation

    def release(self) -> None:
        self._released.set()
        self._thread.join()
        if not self.lost():
            self._store.backend.put(_object(self._name, self._generation), json.dumps(self._holder | {"released": True}).encode())

    def _renew(self) -> None:
        beat = 0
        while not self._released.wait(RENEW_EVERY_S):
            if self.lost():
                return
            beat += 1
            self._store.backend.put(_object(self._name, self._generation), json.dumps(self._holder | {"beat": beat}).encode())


class Watch:
    """A waiter's view of a lease: `taken_by()` is None as soon as it is free."""

    def __init__(self, store: Store, name: str) -> None:
        self._store = store
        self._name = name
        self._seen: tuple[int, bytes | None] | None = None
        self._seen_at_s = 0.0

    def taken_by(self) -> dict[str, Any] | None:
        """Who holds the lease and is alive, as far as can be told: {"user", "host", "pid", "run", ...}."""
        generation = _newest(self._store, self._name)
        data = self._store.backend.get(_object(self._name, generation)) if generation else None
        if data is None:
            return None
        holder = json.loads(data)
        if holder.get("released") or _known_dead(holder):
            return None
        if (generation, data) != self._seen:
            self._seen = (generation, data)
            self._seen_at_s = time.monotonic()
        return None if time.monotonic() - self._seen_at_s > DEAD_AFTER_S else holder

    def take(self, **about: Any) -> Lease | None:
        """The lease, or None while someone holds it. `about` is told to those who wait."""
        if self.taken_by() is not None:
            return None
        generation = _newest(self._store, self._name) + 1
        holder = {**me(), **about}
        if not self._store.backend.put_if_absent(_object(self._name, generation), json.dumps(holder).encode()):
            return None
        for older in range(1, generation):
            self._store.backend.delete(_object(self._name, older))
        return Lease(self._store, self._name, generation, holder)


def me() -> dict[str, Any]:
    """This process, so that another one of the same machine can tell whether it lives."""
    pid = os.getpid()
    return {"user": getpass.getuser(), "host": socket.gethostname(), "boot": _boot_id(), "pid": pid, "born": born(pid)}


def describe(holder: dict[str, Any]) -> str:
    """`ada on node7, process 4711, run 20261122-...`"""
    run = f", run {holder['run']}" if "run" in holder else ""
    return f"{holder['user']} on {holder['host']}, process {holder['pid']}{run}"


def _known_dead(holder: dict[str, Any]) -> bool:
    if holder["boot"] != _boot_id() or holder["host"] != socket.gethostname():
        return False
    return born(holder["pid"]) != holder["born"]


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _object(name: str, generation: int) -> str:
    return f"leases/{name}/{generation:06d}.json"


def _newest(store: Store, name: str) -> int:
    names = store.backend.list(f"leases/{name}")
    return int(names[-1].rsplit("/", 1)[1].removesuffix(".json")) if names else 0
