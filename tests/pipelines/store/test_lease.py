from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from pipelines.store import lease as module
from pipelines.store.backend import FolderBackend
from pipelines.store.lease import Watch, free_leases
from pipelines.store.processes import Holder, user_name
from pipelines.store.store import Store


def me() -> dict[str, Any]:
    """This process as a lease records it."""
    return asdict(Holder.this_process())


class Interrupted(FolderBackend):
    """A backend on which something happens right after the first call of one kind."""

    def __init__(self, store: Store, call: str, then: Callable[[], Any]) -> None:
        super().__init__(store.root)
        real = getattr(self, call)

        def once(*arguments: Any) -> Any:
            answer = real(*arguments)
            setattr(self, call, real)
            then()
            return answer

        setattr(self, call, once)


def test_a_lease_has_one_holder_and_is_free_after_its_release(store: Store):
    held = Watch(store, "k").take(run="one")
    assert held is not None
    holder = Watch(store, "k").holder()
    assert holder is not None
    assert str(holder).endswith(f"process {os.getpid()}, run one")
    assert Watch(store, "k").take(run="two") is None
    held.release()
    again = Watch(store, "k").take(run="two")
    assert again is not None
    assert held.is_lost()
    again.release()


def test_a_process_of_this_machine_that_no_longer_exists_holds_nothing(store: Store):
    script = "import os,sys;from pathlib import Path;from pipelines.store.lease import Watch;from pipelines.store.store import Store;"
    script += "Watch(Store(Path(sys.argv[1])),'k').take(run='dead');os.kill(os.getpid(),9)"
    subprocess.run([sys.executable, "-c", script, str(store.root)], check=False)
    assert store.backend.get("leases/k/000001.json") is not None
    assert Watch(store, "k").holder() is None


@pytest.mark.parametrize(
    "who",
    [{"host": "elsewhere", "boot": "other"}, {"boot": "other", "pid": 2**22 - 1}, {"space": "4026530000", "pid": 2**22 - 1}],
    ids=["another machine", "another machine of this name", "another container"],
)
def test_a_lease_of_another_machine_or_container_expires_after_30_seconds_without_renewal_by_the_waiters_clock(
    store: Store, who: dict[str, str]
):
    now = [100.0]
    foreign = me() | who | {"run": "far"}
    store.backend.put("leases/k/000001.json", json.dumps(foreign).encode())
    watch = Watch(store, "k", clock=lambda: now[0])
    assert watch.holder() is not None
    now[0] += module.DEAD_AFTER_S - 1
    assert watch.holder() is not None
    store.backend.put("leases/k/000001.json", json.dumps(foreign | {"beat": 1}).encode())  # it lives
    assert watch.holder() is not None
    now[0] += module.DEAD_AFTER_S + 1
    assert watch.holder() is None


def test_when_two_find_a_dead_lease_one_takes_it_over(store: Store, tmp_path: Path):
    store.backend.put("leases/k/000001.json", json.dumps(me() | {"pid": 2**22 - 1, "born": "1"}).encode())
    first, second = Watch(store, "k").take(run="a"), Watch(store, "k").take(run="b")
    assert first is not None
    assert second is None
    first.release()


def test_a_holder_that_lost_its_lease_notices_and_leaves_the_new_one_untouched(store: Store):
    mine = Watch(store, "k").take(run="a")
    assert mine is not None
    store.backend.put("leases/k/000002.json", json.dumps(me() | {"run": "b"}).encode())
    assert mine.is_lost()
    mine.release()
    holder = Watch(store, "k").holder()
    assert holder is not None
    assert holder.run == "b"


def test_when_two_examined_the_same_free_lease_only_the_first_to_take_it_holds_it(store: Store):
    store.backend.put("leases/k/000001.json", json.dumps(me() | {"released": True}).encode())
    slow, won = Store(store.root), []
    slow.backend = Interrupted(store, "get", lambda: won.append(Watch(store, "k").take(run="quick")))
    assert Watch(slow, "k").take(run="slow") is None
    assert not won[0].is_lost()
    won[0].release()


def test_a_taker_that_is_a_whole_generation_late_does_not_take_a_held_lease(store: Store):
    store.backend.put("leases/k/000001.json", json.dumps(me() | {"released": True}).encode())
    slow, won = Store(store.root), []

    def taken_and_given_back_and_taken() -> None:
        passing = Watch(store, "k").take(run="passing")
        assert passing is not None
        passing.release()
        won.append(Watch(store, "k").take(run="quick"))

    slow.backend = Interrupted(store, "get", taken_and_given_back_and_taken)
    assert Watch(slow, "k").take(run="slow") is None
    assert not won[0].is_lost()
    assert store.backend.list("leases/k/") == ["leases/k/000003.json"]
    won[0].release()


def test_a_generation_deleted_between_list_and_get_does_not_look_like_a_free_lease(store: Store):
    store.backend.put("leases/k/000001.json", json.dumps(me() | {"released": True}).encode())
    slow, won = Store(store.root), []
    slow.backend = Interrupted(store, "list", lambda: won.append(Watch(store, "k").take(run="quick")))
    holder = Watch(slow, "k").holder()
    assert holder is not None
    assert holder.run == "quick"
    won[0].release()


def test_renewing_survives_storage_that_is_briefly_unavailable(store: Store, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "RENEW_EVERY_S", 0.01)
    faults, renewed = [OSError(116, "stale"), OSError(28, "full")], threading.Event()
    real = store.backend.put

    def put(name: str, data: bytes | Path) -> None:
        if faults:
            raise faults.pop()
        real(name, data)
        renewed.set()

    monkeypatch.setattr(store.backend, "put", put)
    lease = Watch(store, "k").take(run="a")
    assert lease is not None
    assert renewed.wait(20)
    lease.release()


def test_free_leases_among_many_are_found_in_one_common_wait(store: Store):
    now, paused_s = [0.0], []
    far = me() | {"host": "elsewhere", "boot": "other"}
    holders = {"far-dead": far, "far-alive": far, "far-gone": far, "here": me(), "here-gone": me() | {"born": "1"}}
    for name, holder in holders.items():
        store.backend.put(f"leases/{name}/000001.json", json.dumps(holder).encode())

    def pause(seconds: float) -> None:
        now[0] += seconds
        paused_s.append(seconds)
        if now[0] == 5:
            store.backend.put("leases/far-alive/000001.json", json.dumps(far | {"beat": 1}).encode())

    found = free_leases(store, [*holders, "never-taken"], clock=lambda: now[0], pause=pause)
    assert found == ["far-dead", "far-gone", "here-gone", "never-taken"]
    assert module.DEAD_AFTER_S < sum(paused_s) <= module.DEAD_AFTER_S + module.LOOK_EVERY_S


def test_a_user_without_a_name_is_identified_by_number(monkeypatch: pytest.MonkeyPatch):
    def nameless() -> str:
        raise KeyError("getpwuid(): uid not found: 4711")

    monkeypatch.setattr("getpass.getuser", nameless)
    assert user_name() == str(os.getuid())
