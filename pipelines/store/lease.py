"""One lease per piece of work: who makes a key, who drives a run. A second one waits, and says whom it waits for.

A lease is a row of generations, `leases/<name>/<generation>.json`. Taking it means writing the next number put-if-absent, so that of
two takers one wins; the newest generation holds. The holder renews its own object; a waiter calls a lease dead when that object has not
changed for `DEAD_AFTER_S` of the waiter's own clock, or at once when the holder was a process of this machine that is gone. A process of
another machine or container can't be looked up: only its renewing tells. So it is with one of this machine before it was started anew,
which looks like another machine of the same name.
"""

from __future__ import annotations

import getpass
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from pipelines.store.store import Store, boot_id, born, pid_space

RENEW_EVERY_S = 5.0
DEAD_AFTER_S = 30.0
LOOK_EVERY_S = 1.0


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
            beat += 1
            try:
                if self.lost():
                    return
                self._store.backend.put(_object(self._name, self._generation), json.dumps(self._holder | {"beat": beat}).encode())
            except OSError:
                continue  # a full disk or a file system that is away for a moment: the next beat may get through


class Watch:
    """A waiter's view of a lease: `taken_by()` is None as soon as it is free."""

    def __init__(self, store: Store, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.changes = 0
        """How many states of the lease this watch has seen, the first included: with the second one its holder lives."""
        self._store = store
        self._name = name
        self._clock = clock
        self._seen: tuple[int, bytes] | None = None
        self._seen_at_s = 0.0

    def taken_by(self) -> dict[str, Any] | None:
        """Who holds the lease and is alive, as far as can be told: {"user", "host", "pid", "run", ...}."""
        return self._examine()[1]

    def _examine(self) -> tuple[int, dict[str, Any] | None]:
        """The newest generation, 0 for none, and who holds it and is alive."""
        data = None
        while data is None:  # an object that is gone since it was listed gave way to a newer one
            generation = _newest(self._store, self._name)
            if not generation:
                return 0, None
            data = self._store.backend.get(_object(self._name, generation))
        holder = json.loads(data)
        if holder.get("released") or _known_dead(holder):
            return generation, None
        if (generation, data) != self._seen:
            self._seen = (generation, data)
            self._seen_at_s = self._clock()
            self.changes += 1
        return generation, None if self._clock() - self._seen_at_s > DEAD_AFTER_S else holder

    def take(self, **about: Any) -> Lease | None:
        """The lease, or None while someone holds it. `about` is told to those who wait."""
        examined, holder = self._examine()
        if holder is not None:
            return None
        generation = examined + 1  # and no other: what came after the one that was examined may be held
        holder = {**me(), **about}
        if not self._store.backend.put_if_absent(_object(self._name, generation), json.dumps(holder).encode()):
            return None
        if _newest(self._store, self._name) != generation:  # others took it, gave it back and took it again meanwhile
            self._store.backend.delete(_object(self._name, generation))
            return None
        for older in range(1, generation):
            self._store.backend.delete(_object(self._name, older))
        return Lease(self._store, self._name, generation, holder)


def me() -> dict[str, Any]:
    """This process, so that another one of the same machine can tell whether it lives."""
    pid = os.getpid()
    return {"user": user_name(), "host": socket.gethostname(), "boot": boot_id(), "space": pid_space(), "pid": pid, "born": born(pid)}


def user_name() -> str:
    """Who runs this, or the bare number of a user without a name, as containers have them."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def dead(
    store: Store, names: list[str], *, clock: Callable[[], float] = time.monotonic, pause: Callable[[float], None] = time.sleep
) -> list[str]:
    """Which of these leases are held by nobody alive.

    Holders that can't be looked up from here are watched all together: until each has renewed its lease, or for DEAD_AFTER_S.
    """
    watches = {name: Watch(store, name, clock) for name in names}
    found = set()
    while watches:
        for name, watch in list(watches.items()):
            holder = watch.taken_by()
            if holder is None:
                found.add(name)
            if holder is None or _can_be_looked_up(holder) or watch.changes > 1:
                del watches[name]
        if watches:
            pause(LOOK_EVERY_S)
    return [name for name in names if name in found]


def describe(holder: dict[str, Any]) -> str:
    """`ada on node7, process 4711, run 20261122-...`"""
    run = f", run {holder['run']}" if "run" in holder else ""
    return f"{holder['user']} on {holder['host']}, process {holder['pid']}{run}"


def _known_dead(holder: dict[str, Any]) -> bool:
    return _can_be_looked_up(holder) and born(holder["pid"]) != holder["born"]


def _can_be_looked_up(holder: dict[str, Any]) -> bool:
    return (holder["host"], holder["boot"], holder.get("space")) == (socket.gethostname(), boot_id(), pid_space())


def _object(name: str, generation: int) -> str:
    return f"leases/{name}/{generation:06d}.json"


def _newest(store: Store, name: str) -> int:
    names = store.backend.list(f"leases/{name}")
    return int(names[-1].rsplit("/", 1)[1].removesuffix(".json")) if names else 0
