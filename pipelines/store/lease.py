"""One lease per piece of work: who makes a key, who drives a run. Others wait, and report whom they wait for.

A lease is a series of generations, `leases/<name>/<generation>.json`. To take it, a process writes the next number with put_if_absent, so
that only one of two takers succeeds; the newest generation holds. The holder renews its own object. A waiter considers a lease dead when
that object has not changed for `DEAD_AFTER_S` by the waiter's own clock, or at once when its holder was a process on this machine that no
longer exists. A process on another machine, in another container, or from before this machine's last boot can't be looked up; only its
renewals show that it is alive.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from pipelines.store.processes import Holder
from pipelines.store.store import Store

RENEW_EVERY_S = 5.0
DEAD_AFTER_S = 30.0
LOOK_EVERY_S = 1.0


class Lease:
    """Held until `release`; a thread renews it."""

    def __init__(self, store: Store, name: str, generation: int, holder: Holder) -> None:
        self._store = store
        self._name = name
        self._generation = generation
        self._holder = holder
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._renew, name=f"lease {name}", daemon=True)
        self._thread.start()

    def is_lost(self) -> bool:
        """Whether another process took the lease over because it considered this one dead. Publish nothing under a lost lease."""
        return _newest(self._store, self._name) != self._generation

    def release(self) -> None:
        self._released.set()
        self._thread.join()
        if not self.is_lost():
            self._store.backend.put(_object(self._name, self._generation), self._holder.to_json(released=True))

    def _renew(self) -> None:
        beat = 0
        while not self._released.wait(RENEW_EVERY_S):
            beat += 1
            try:
                if self.is_lost():
                    return
                self._store.backend.put(_object(self._name, self._generation), self._holder.to_json(beat=beat))
            except OSError:
                continue  # a full disk, or storage that is briefly unavailable: the next renewal may succeed


class Watch:
    """A waiter's view of a lease."""

    def __init__(self, store: Store, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.changes = 0
        """How many states of the lease were seen, the first included: a second one shows that its holder is alive."""
        self._store = store
        self._name = name
        self._clock = clock
        self._seen: tuple[int, bytes] | None = None
        self._seen_at_s = 0.0

    def holder(self) -> Holder | None:
        """Who holds the lease and is alive, as far as can be known; None when it is free."""
        return self._examine()[1]

    def _examine(self) -> tuple[int, Holder | None]:
        """The newest generation, 0 if there is none, and its living holder."""
        data = None
        while data is None:  # an object that vanished after it was listed was replaced by a newer one
            generation = _newest(self._store, self._name)
            if not generation:
                return 0, None
            data = self._store.backend.get(_object(self._name, generation))
        holder = Holder.from_json(data)
        if holder.released or holder.is_known_dead():
            return generation, None
        if (generation, data) != self._seen:
            self._seen = (generation, data)
            self._seen_at_s = self._clock()
            self.changes += 1
        return generation, None if self._clock() - self._seen_at_s > DEAD_AFTER_S else holder

    def take(self, *, run: str = "", stage: str = "") -> Lease | None:
        """The lease, or None while another process holds it. Waiters see `run` and `stage`."""
        examined, current = self._examine()
        if current is not None:
            return None
        generation = examined + 1  # only this one: a generation after the examined one may be held
        holder = Holder.this_process(run, stage)
        if not self._store.backend.put_if_absent(_object(self._name, generation), holder.to_json()):
            return None
        if _newest(self._store, self._name) != generation:  # meanwhile others took it, released it and took it again
            self._store.backend.delete(_object(self._name, generation))
            return None
        for older in range(1, generation):
            self._store.backend.delete(_object(self._name, older))
        return Lease(self._store, self._name, generation, holder)


def free_leases(
    store: Store, names: list[str], *, clock: Callable[[], float] = time.monotonic, pause: Callable[[float], None] = time.sleep
) -> list[str]:
    """The leases among these that no living process holds.

    Holders that can't be looked up from here are watched together, until each has renewed its lease, or for DEAD_AFTER_S.
    """
    watches = {name: Watch(store, name, clock) for name in names}
    found = set()
    while watches:
        for name, watch in list(watches.items()):
            holder = watch.holder()
            if holder is None:
                found.add(name)
            if holder is None or holder.is_visible() or watch.changes > 1:
                del watches[name]
        if watches:
            pause(LOOK_EVERY_S)
    return [name for name in names if name in found]


def _object(name: str, generation: int) -> str:
    return f"leases/{name}/{generation:06d}.json"


def _newest(store: Store, name: str) -> int:
    names = store.backend.list(f"leases/{name}/")
    return int(names[-1].rsplit("/", 1)[1].removesuffix(".json")) if names else 0
