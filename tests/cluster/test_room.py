"""What a stage's resources are called, what a cluster lacks for them, and what is free on each node."""

from __future__ import annotations

import importlib
import itertools
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.events import StageEvent, Waiting
from cluster.failures import GangFailure
from cluster.room import Room, describe_wait, reserve, shortfall

GIB = 2.0**30
Node = tuple[dict[str, float], dict[str, float]]
"""A node's resources, all and free."""


def cluster(monkeypatch: pytest.MonkeyPatch, *nodes: Node, labels: dict[str, str] | None = None) -> None:
    """Make Ray report nodes n0, n1, ...; only n0 has labels."""
    listed = [
        {"Alive": True, "NodeID": f"id-{n}", "NodeManagerHostname": f"n{n}", "Resources": total, "Labels": (labels or {}) if n == 0 else {}}
        for n, (total, _) in enumerate(nodes)
    ]
    monkeypatch.setattr("ray.nodes", lambda: [*listed, {"Alive": False, "Resources": {"CPU": 100.0}}])
    monkeypatch.setattr("ray._private.state.available_resources_per_node", lambda: {f"id-{n}": free for n, (_, free) in enumerate(nodes)})


def test_a_room_is_described_per_rank() -> None:
    assert str(Room(name="pretrain", ranks=2, cpus_per_rank=1, memory_gib=8)) == "2 ranks of 1 CPU and 8 GiB"
    assert str(Room(name="words", cpus_per_rank=4, gpus_per_rank=1)) == "4 CPUs and 1 GPU"


def test_four_cpus_on_two_nodes_hold_two_ranks_of_two_cpus_but_no_rank_of_three(monkeypatch: pytest.MonkeyPatch) -> None:
    node: Node = ({"CPU": 2.0, "memory": GIB}, {})
    cluster(monkeypatch, node, node)
    assert shortfall(Room(name="pretrain", ranks=2, cpus_per_rank=2)) is None
    assert shortfall(Room(name="pretrain", ranks=3, cpus_per_rank=2)) == (
        "pretrain asks for 3 ranks of 2 CPUs, but the cluster has room for only 2 of them (4 CPUs, 0 GPUs and 2.0 GiB on 2 nodes); "
        "lower the stage's resources or use a larger cluster"
    )
    text = str(shortfall(Room(name="words", cpus_per_rank=3)))
    assert text.startswith("words asks for 3 CPUs, but no node of the cluster has that (4 CPUs, 0 GPUs and 2.0 GiB on 2 nodes)")


def test_only_nodes_with_the_labels_count(monkeypatch: pytest.MonkeyPatch) -> None:
    node: Node = ({"CPU": 2.0}, {})
    cluster(monkeypatch, node, node, labels={"tier": "a100"})
    assert shortfall(Room(name="pretrain", ranks=2, labels={"tier": "a100"})) is None
    assert "on 2 nodes, 1 with these labels)" in str(shortfall(Room(name="pretrain", ranks=3, labels={"tier": "a100"})))


def test_a_wait_shows_that_two_free_cpus_lie_on_two_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster(monkeypatch, ({"CPU": 2.0}, {"CPU": 1.0}), ({"CPU": 2.0}, {"CPU": 1.0}))
    assert describe_wait(Room(name="words", cpus_per_rank=2)) == "waiting for 2 CPUs (free now: 1 of 2 CPUs on n0; 1 of 2 CPUs on n1)"


def test_a_wait_names_memory_and_gpus_only_if_requested(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster(monkeypatch, ({"CPU": 8.0, "GPU": 2.0, "memory": 16 * GIB}, {"CPU": 8.0, "memory": 4 * GIB}))
    assert describe_wait(Room(name="pretrain", ranks=2, gpus_per_rank=1, memory_gib=4)) == (
        "waiting for 2 ranks of 1 CPU, 1 GPU and 4 GiB (free now: 8 of 8 CPUs, 0 of 2 GPUs and 4.0 of 16.0 GiB on n0)"
    )


def test_a_wait_for_what_looks_free_says_that_it_should_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster(monkeypatch, ({"CPU": 2.0}, {"CPU": 2.0}))
    assert describe_wait(Room(name="pretrain", ranks=2)) == (
        "waiting for Ray to place 2 ranks of 1 CPU, which should fit (free now: 2 of 2 CPUs on n0)"
    )


def test_a_wait_lists_eight_nodes_and_counts_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes: list[Any] = [({"CPU": 2.0}, {})] * 10
    cluster(monkeypatch, *nodes)
    text = describe_wait(Room(name="words", cpus_per_rank=2))
    assert text.endswith("0 of 2 CPUs on n7; and 2 more nodes)")
    assert "n8" not in text


class PendingGroup:
    """A placement group that Ray places at the n-th look; half a second passes between looks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, placed_at: int) -> None:
        self.looks = 0
        self.removed = False
        self._placed_at = placed_at
        clock = itertools.count()
        monkeypatch.setattr("cluster.room.time", SimpleNamespace(monotonic=lambda: next(clock) / 2))
        monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(get_worker_id=lambda: "ab12"))
        groups = importlib.import_module("ray.util.placement_group")  # `ray.util` has a function of the same name
        monkeypatch.setattr(groups, "placement_group", lambda bundles, **options: self)
        monkeypatch.setattr(groups, "remove_placement_group", self._remove)

    def wait(self, timeout_s: float) -> bool:
        self.looks += 1
        return self.looks == self._placed_at

    def _remove(self, group: Any) -> None:
        self.removed = True


def wait_events(room: Room, *, deadline_s: float = 60, stop_at: int | None = None) -> list[StageEvent]:
    events: list[StageEvent] = []
    looks = itertools.count(1)
    with reserve(room, "1.1", deadline_s, on_event=events.append, should_stop=lambda: next(looks) == stop_at) as group:
        assert (group is None) is (stop_at is not None)
    return events


def test_a_wait_for_cpus_in_use_is_reported_once_after_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster(monkeypatch, ({"CPU": 2.0}, {"CPU": 1.0}))
    short = PendingGroup(monkeypatch, placed_at=3)
    assert wait_events(Room(name="pretrain", ranks=2)) == []
    assert short.removed
    PendingGroup(monkeypatch, placed_at=100)
    assert wait_events(Room(name="pretrain", ranks=2)) == [Waiting("waiting for 2 ranks of 1 CPU (free now: 1 of 2 CPUs on n0)")]


def test_a_wait_while_enough_is_free_is_reported_only_after_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster(monkeypatch, ({"CPU": 2.0}, {"CPU": 2.0}))
    PendingGroup(monkeypatch, placed_at=21)
    assert wait_events(Room(name="pretrain", ranks=2)) == []
    PendingGroup(monkeypatch, placed_at=22)
    assert [type(event) for event in wait_events(Room(name="pretrain", ranks=2))] == [Waiting]


def test_a_stop_ends_the_wait_and_frees_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster(monkeypatch, ({"CPU": 2.0}, {}))
    group = PendingGroup(monkeypatch, placed_at=100)
    assert wait_events(Room(name="pretrain"), stop_at=2) == []
    assert (group.looks, group.removed) == (2, True)


def test_resources_in_use_are_waited_for_beyond_the_deadline_and_lost_ones_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster(monkeypatch, ({"CPU": 2.0}, {}))
    PendingGroup(monkeypatch, placed_at=100)
    assert len(wait_events(Room(name="pretrain", ranks=2), deadline_s=5)) == 1
    lost = PendingGroup(monkeypatch, placed_at=100)
    with pytest.raises(GangFailure, match=r"a node was lost; none replaced it within start_deadline_s = 5$"):
        wait_events(Room(name="pretrain", ranks=3), deadline_s=5)
    assert lost.removed
