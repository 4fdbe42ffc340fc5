from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines import lease as module
from pipelines.lease import Watch, describe, me
from pipelines.store import Store


def test_a_lease_is_held_by_one_and_free_again_after_release(store: Store):
    held = Watch(store, "k").take(run="one")
    assert held is not None
    holder = Watch(store, "k").taken_by()
    assert holder is not None
    assert describe(holder).endswith(f"process {os.getpid()}, run one")
    assert Watch(store, "k").take(run="two") is None
    held.release()
    again = Watch(store, "k").take(run="two")
    assert again is not None
    assert held.lost()
    again.release()


def test_a_process_of_this_machine_that_is_gone_holds_nothing(store: Store):
    script = "import os,sys;from pathlib import Path;from pipelines.lease import Watch;from pipelines.store import Store;"
    script += "Watch(Store(Path(sys.argv[1])),'k').take(run='dead');os.kill(os.getpid(),9)"
    subprocess.run([sys.executable, "-c", script, str(store.root)], check=False)
    assert store.backend.get("leases/k/000001.json") is not None
    assert Watch(store, "k").taken_by() is None


def test_another_machines_lease_dies_when_it_was_not_renewed_for_the_waiters_own_30_seconds(store: Store, monkeypatch: pytest.MonkeyPatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    foreign = me() | {"host": "elsewhere", "boot": "other", "run": "far"}
    store.backend.put("leases/k/000001.json", json.dumps(foreign).encode())
    watch = Watch(store, "k")
    assert watch.taken_by() is not None
    now[0] += module.DEAD_AFTER_S - 1
    assert watch.taken_by() is not None
    store.backend.put("leases/k/000001.json", json.dumps(foreign | {"beat": 1}).encode())  # it lives
    assert watch.taken_by() is not None
    now[0] += module.DEAD_AFTER_S + 1
    assert watch.taken_by() is None


def test_of_two_who_find_a_dead_lease_one_takes_it_over(store: Store, tmp_path: Path):
    store.backend.put("leases/k/000001.json", json.dumps(me() | {"pid": 2**22 - 1, "born": "1"}).encode())
    first, second = Watch(store, "k").take(run="a"), Watch(store, "k").take(run="b")
    assert first is not None
    assert second is None
    first.release()


def test_who_lost_the_lease_knows_it_and_leaves_the_others_alone(store: Store):
    mine = Watch(store, "k").take(run="a")
    assert mine is not None
    store.backend.put("leases/k/000002.json", json.dumps(me() | {"run": "b"}).encode())
    assert mine.lost()
    mine.release()
    holder = Watch(store, "k").taken_by()
    assert holder is not None
    assert holder["run"] == "b"
