"""From a reserved placement group to ranks that run: start the actors, collect where they are, and give each its assignment."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.events import GangStarted, StageEvent
from cluster.failures import Loss, Raised, answer_of, crash_log, loss_of
from cluster.gang_spec import StartSpec
from cluster.rank_process import WATCH, Assignment, ProcessLocation, RankProcess


@dataclass
class Member:
    """One rank of the gang, as the stage's task sees it."""

    rank: int
    actor: Any
    section: str
    """The section nearest to its deadline when the rank was last polled."""
    deadline_s: float
    due_at_s: float
    """When that section must have ended, by this process's monotonic clock."""
    location: ProcessLocation | None = None
    poll: Any = None
    """The poll under way, as Ray's reference to its answer."""

    @property
    def label(self) -> str:
        """ "rank 2 (pid 4711, node n1)"."""
        return f"rank {self.rank} (pid {self.location.pid}, node {self.location.node})" if self.location else f"rank {self.rank}"


def call_while_running(method: Any) -> Any:
    """Call an actor's method in the group of threads that answers while the function runs."""
    return method.options(concurrency_group=WATCH).remote()


class LostAtStart(Exception):
    """A rank that never began to run the function."""

    def __init__(self, loss: Loss) -> None:
        super().__init__(loss)
        self.loss = loss


def start_actors(group: Any, start: StartSpec) -> list[Member]:
    """Start one actor per bundle of the placement group, without waiting for any."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    spec = start.gang
    # Ray's annotations know this form of remote() only as a decorator without options.
    actors = ray.remote(concurrency_groups={WATCH: 2})(RankProcess)  # type: ignore[call-overload]
    due_at_s = time.monotonic() + spec.start_deadline_s
    members = []
    for rank in range(spec.ranks):
        actor = actors.options(
            num_cpus=spec.cpus_per_rank,
            num_gpus=spec.gpus_per_rank,
            memory=int(spec.memory_gib * 2**30) if spec.memory_gib else None,
            accelerator_type=spec.accelerator,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank),
        )
        members.append(Member(rank, actor.remote(rank, str(start.folder)), "start", spec.start_deadline_s, due_at_s))
    return members


def launch(start: StartSpec, members: Sequence[Member], on_event: Callable[[StageEvent], None]) -> list[Any]:
    """Wait until all actors are up, then call the function on each; Ray's references to its outcomes, by rank."""
    import ray

    locations = _answers([member.actor.location.remote() for member in members], start, members)
    for member, location in zip(members, locations, strict=True):
        member.location = location
    labels = ", ".join(member.label for member in members)
    on_event(GangStarted(f"started {labels}", tuple(location.pid for location in locations)))
    # Rank 0 listens on the port.
    ports = _answers([members[0].actor.free_port.remote()], start, members) if len(members) > 1 else [0]
    assignments = assign(locations, ports[0])
    shared = ray.put(start)
    for member, assignment in zip(members, assignments, strict=True):
        member.actor.prepare.remote(assignment, start.gang.cpus_per_rank)
    return [member.actor.run.remote(shared, assignment) for member, assignment in zip(members, assignments, strict=True)]


def assign(locations: Sequence[ProcessLocation], port: int) -> list[Assignment]:
    """Every rank's position, from where the processes are."""
    one_node = len({location.node_id for location in locations}) == 1
    master = "127.0.0.1" if one_node else locations[0].address
    assignments = []
    for rank, location in enumerate(locations):
        on_node = [other for other in range(len(locations)) if locations[other].node_id == location.node_id]
        gpus = tuple(gpu for other in on_node for gpu in locations[other].gpus)
        assignments.append(Assignment(rank, len(locations), on_node.index(rank), len(on_node), gpus, master, port, one_node))
    return assignments


def _answers(refs: Sequence[Any], start: StartSpec, members: Sequence[Member]) -> list[Any]:
    """The answers of ranks 0, 1, ... in this order; LostAtStart if one dies, raises, or doesn't answer before the start's deadline."""
    import ray

    answers: dict[int, Any] = {}
    waiting = {ref: rank for rank, ref in enumerate(refs)}
    while waiting:
        left_s = min(member.due_at_s for member in members) - time.monotonic()
        ready, _ = ray.wait(list(waiting), timeout=max(0.0, left_s))
        if not ready:
            late = sorted(waiting.values())
            who = " and ".join(members[rank].label for rank in late)
            sentence = f"{who} did not start within start_deadline_s = {start.gang.start_deadline_s:g}"
            raise LostAtStart(Loss(late[0], "deadline", sentence, True))
        for ref in ready:
            rank = waiting.pop(ref)
            answer = answer_of(ref)
            if isinstance(answer, (Raised, Exception)):
                log = crash_log(start.folder, rank)
                raise LostAtStart(loss_of(rank, members[rank].label, answer, step=start.first_step, crash_log=log))
            answers[rank] = answer
    return [answers[rank] for rank in range(len(refs))]
