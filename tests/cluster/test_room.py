"""What a stage's resources are called, what a cluster lacks for them, and what is free on each node."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.room import Room, describe_wait, shortfall

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
    assert describe_wait(Room(name="words", cpus_per_rank=2)) == "waiting for 2 CPUs; free now: 1 of 2 CPUs on n0, 1 of 2 CPUs on n1"


def test_a_wait_names_memory_and_gpus_only_if_requested(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster(monkeypatch, ({"CPU": 8.0, "GPU": 2.0, "memory": 16 * GIB}, {"CPU": 8.0, "memory": 4 * GIB}))
    assert describe_wait(Room(name="pretrain", ranks=2, gpus_per_rank=1, memory_gib=4)) == (
        "waiting for 2 ranks of 1 CPU and 1 GPU and 4 GiB; free now: 8 of 8 CPUs and 0 of 2 GPUs and 4.0 of 16.0 GiB on n0"
    )


def test_a_wait_for_what_looks_free_says_that_it_should_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster(monkeypatch, ({"CPU": 2.0}, {"CPU": 2.0}))
    assert describe_wait(Room(name="pretrain", ranks=2)) == (
        "waiting for Ray to place 2 ranks of 1 CPU, which should fit; free now: 2 of 2 CPUs on n0"
    )


def test_a_wait_lists_eight_nodes_and_counts_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes: list[Any] = [({"CPU": 2.0}, {})] * 10
    cluster(monkeypatch, *nodes)
    text = describe_wait(Room(name="words", cpus_per_rank=2))
    assert text.endswith("0 of 2 CPUs on n7, and 2 more nodes")
    assert "n8" not in text
