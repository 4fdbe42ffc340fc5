"""The resources a stage holds while it runs: what it requests, what the cluster lacks, and the placement group that reserves them.

A gang holds one bundle of resources per rank, all or none; a stage that doesn't train counts as one rank.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.events import StageEvent, Waiting
from cluster.failures import GangFailure

POLL_S = 0.2
_REPORTED_AFTER_S = 1.0
"""A wait shorter than this is not worth a notice."""
_PLACED_WITHIN_S = 10.0
"""Ray's usual time to place what fits; a longer wait is reported although the resources look free."""
_LISTED_NODES = 8
_GROUP_PREFIX = "gptline-gang"


@dataclass(frozen=True, kw_only=True)
class Room:
    """The resources a gang holds while it runs: `Room(name="pretrain", ranks=2, cpus_per_rank=8, gpus_per_rank=1)`."""

    name: str
    """The stage's name, for messages."""
    ranks: int = 1
    cpus_per_rank: int = 1
    gpus_per_rank: int = 0
    memory_gib: float | None = None
    """Host memory that each rank reserves."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Node labels that every rank's node must have, e.g. {"tier": "a100"}."""
    accelerator: str | None = None
    """Ray's accelerator type, e.g. "A100"."""

    def bundle(self) -> dict[str, float]:
        """One rank's resources, as Ray names them."""
        bundle: dict[str, float] = {"CPU": self.cpus_per_rank}
        if self.gpus_per_rank:
            bundle["GPU"] = self.gpus_per_rank
        if self.memory_gib:
            bundle["memory"] = int(self.memory_gib * 2**30)
        if self.accelerator:
            # Ray's way to require a node of this type: each such node has 1 of it, and a rank requests a sliver.
            bundle[f"accelerator_type:{self.accelerator}"] = 0.001
        return bundle

    def __str__(self) -> str:
        """ "2 ranks of 1 CPU and 8 GiB"; for a single rank only "1 CPU and 8 GiB"."""
        parts = [_counted(self.cpus_per_rank, "CPU")]
        parts += [_counted(self.gpus_per_rank, "GPU")] if self.gpus_per_rank else []
        parts += [f"{self.memory_gib:g} GiB"] if self.memory_gib else []
        parts += [f"accelerator {self.accelerator}"] if self.accelerator else []
        parts += [f"labels {dict(self.labels)}"] if self.labels else []
        each = _listed(parts)
        return f"{self.ranks} ranks of {each}" if self.ranks > 1 else each


def shortfall(room: Room) -> str | None:
    """What the whole cluster lacks for this room, as a sentence; None when it has enough, in use or not."""
    nodes = _nodes()
    fit = _ranks_that_fit(room, ((node, node["Resources"]) for node in nodes))
    if fit >= room.ranks:
        return None
    cpus, gpus, memory = (sum(node["Resources"].get(name, 0) for node in nodes) for name in ("CPU", "GPU", "memory"))
    labelled = f", {sum(_has_labels(node, room) for node in nodes)} with these labels" if room.labels else ""
    lacks = f"the cluster has room for only {fit} of them" if room.ranks > 1 else "no node of the cluster has that"
    return (
        f"{room.name} asks for {room}, but {lacks} ({_counted(cpus, 'CPU')}, {_counted(gpus, 'GPU')} and {memory / 2**30:.1f} GiB "
        f"on {_counted(len(nodes), 'node')}{labelled}); lower the stage's resources or use a larger cluster"
    )


def describe_wait(room: Room) -> str:
    """Why a room that the cluster has can't be reserved yet, with what is free on each node; Ray's figures may be seconds old."""
    nodes, free = _nodes(), _free_by_node()
    shown = [f"{_free_of_total(room, free.get(node['NodeID'], {}), node)} on {node['NodeManagerHostname']}" for node in nodes]
    more = [f"and {len(nodes) - _LISTED_NODES} more nodes"] if len(nodes) > _LISTED_NODES else []
    listed = "; ".join([*shown[:_LISTED_NODES], *more])
    if _fits_now(room):
        return f"waiting for Ray to place {room}, which should fit (free now: {listed})"
    return f"waiting for {room} (free now: {listed})"


@contextlib.contextmanager
def reserve(
    room: Room, label: str, deadline_s: float, *, on_event: Callable[[StageEvent], None], should_stop: Callable[[], bool]
) -> Iterator[Any]:
    """Hold a placement group for the `with` block; yields None if a stop is requested before it is free.

    Waits without limit for resources that are in use, and `deadline_s` for resources that the cluster no longer has.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    # Named after this process, so that its group can be freed when it dies.
    name = f"{_GROUP_PREFIX}-{ray.get_runtime_context().get_worker_id()}-{label}"
    selectors = [dict(room.labels)] * room.ranks if room.labels else None
    group = placement_group([room.bundle()] * room.ranks, strategy="PACK", name=name, bundle_label_selector=selectors)
    started_at_s = time.monotonic()
    reported = False
    try:
        while not group.wait(POLL_S):
            if should_stop():
                yield None
                return
            waited_s = time.monotonic() - started_at_s
            if not reported and (waited_s > _PLACED_WITHIN_S or (waited_s > _REPORTED_AFTER_S and not _fits_now(room))):
                on_event(Waiting(describe_wait(room)))
                reported = True
            if waited_s > deadline_s and (problem := shortfall(room)):
                raise GangFailure(
                    f"{problem}. The cluster had room when the stage started, so a node was lost; none replaced it within "
                    f"start_deadline_s = {deadline_s:g}",
                    cause="resources",
                )
        yield group
    finally:
        remove_placement_group(group)


def remove_groups_of(worker_id: str) -> None:
    """Free the placement groups of a dead process: Ray removes a group with its job, not with the task that made it."""
    import ray
    from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

    for group_id, group in placement_group_table().items():
        if group["name"].startswith(f"{_GROUP_PREFIX}-{worker_id}-") and group["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group_id))))


def _nodes() -> list[dict[str, Any]]:
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def _free_by_node() -> dict[str, Mapping[str, float]]:
    # `ray.available_resources` is the sum over nodes, which hides that no single node has enough.
    from ray._private.state import available_resources_per_node

    return dict(available_resources_per_node())


def _fits_now(room: Room) -> bool:
    free = _free_by_node()
    return _ranks_that_fit(room, ((node, free.get(node["NodeID"], {})) for node in _nodes())) >= room.ranks


def _ranks_that_fit(room: Room, nodes: Iterable[tuple[Mapping[str, Any], Mapping[str, float]]]) -> int:
    """How many ranks these resources of these nodes hold; a rank lies on one node."""
    bundle = room.bundle()
    return sum(
        min(int(resources.get(name, 0) // amount) for name, amount in bundle.items())
        for node, resources in nodes
        if _has_labels(node, room)
    )


def _has_labels(node: Mapping[str, Any], room: Room) -> bool:
    return all(node.get("Labels", {}).get(key) == value for key, value in room.labels.items())


def _free_of_total(room: Room, free: Mapping[str, float], node: Mapping[str, Any]) -> str:
    """ "1 of 2 CPUs and 1.0 of 7.5 GiB": only the resources that the room names."""
    total = node["Resources"]
    parts = [f"{free.get('CPU', 0):g} of {_counted(total.get('CPU', 0), 'CPU')}"]
    parts += [f"{free.get('GPU', 0):g} of {_counted(total.get('GPU', 0), 'GPU')}"] if room.gpus_per_rank else []
    parts += [f"{free.get('memory', 0) / 2**30:.1f} of {total.get('memory', 0) / 2**30:.1f} GiB"] if room.memory_gib else []
    return _listed(parts)


def _listed(parts: list[str]) -> str:
    return f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else parts[0]


def _counted(count: float, unit: str) -> str:
    return f"{count:g} {unit}{'' if count == 1 else 's'}"
