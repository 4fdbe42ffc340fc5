"""Every rank's position in the gang, from where Ray put the processes."""

from __future__ import annotations

from cluster.gang_launch import assign
from cluster.rank_process import ProcessLocation


def location(node: str, gpu: str = "") -> ProcessLocation:
    return ProcessLocation(node, f"id of {node}", f"address of {node}", 4711, (gpu,) if gpu else ())


def test_ranks_of_one_node_meet_on_its_loopback_interface() -> None:
    first, second = assign([location("a"), location("a")], 20_001)
    assert (first.rank, first.local_rank, first.world_size, first.local_world_size) == (0, 0, 2, 2)
    assert (second.rank, second.local_rank) == (1, 1)
    assert (second.master, second.port, second.one_node) == ("127.0.0.1", 20_001, True)


def test_ranks_of_two_nodes_meet_at_rank_0_and_count_locally_on_each() -> None:
    assignments = assign([location("a", "3"), location("b", "0"), location("a", "5")], 20_001)
    assert [each.local_rank for each in assignments] == [0, 0, 1]
    assert [each.local_world_size for each in assignments] == [2, 1, 2]
    assert [each.gpus for each in assignments] == [("3", "5"), ("0",), ("3", "5")]
    assert {(each.master, each.one_node) for each in assignments} == {("address of a", False)}
