"""One start of a gang: reserve its resources, launch its ranks, and watch them until all have finished or one is lost.

The loop waits for a rank's outcome; it is unblocked by that, by a rank's death, which Ray reports, or after 0.2 s.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable
from typing import Any

from cluster.checkpoint import newest_checkpoint
from cluster.events import Stacks, StageEvent
from cluster.failures import Loss, Raised, answer_of, crash_log, hang_of, loss_of, stacks_log
from cluster.gang_launch import LostAtStart, Member, call_while_running, launch, start_actors
from cluster.gang_spec import StartSpec
from cluster.rank_process import STACKS_SIGNAL, Finished
from cluster.room import POLL_S, reserve

_BLAME_S = 10.0
"""When one rank loses its connection, Ray reports the rank that caused it within this time."""
_DRAIN_S = 2.0
_STACKS_S = 5.0


class GangStart:
    def __init__(self, start: StartSpec, on_event: Callable[[StageEvent], None], stop_requested: Callable[[], bool]) -> None:
        self._start = start
        self._on_event = on_event
        self._stop_requested = stop_requested
        self._step = start.first_step
        self._members: list[Member] = []

    def run(self) -> Finished | Loss:
        """Rank 0's value and history, or why there are none. No process of the gang is left when it returns."""
        import ray

        start = self._start
        deadline_s = start.gang.start_deadline_s
        with reserve(start.gang, start.folder.name, deadline_s, on_event=self._on_event, should_stop=self._stop_requested) as group:
            if group is None:
                return Finished(None, {})
            self._members = start_actors(group, start)
            try:
                return self._watch(launch(start, self._members, self._on_event))
            except LostAtStart as lost:
                return lost.loss
            finally:
                # All at once: a rank that waits for a dead peer in a collective would stay there until its timeout.
                for member in self._members:
                    ray.kill(member.actor, no_restart=True)

    def _watch(self, outcomes: list[Any]) -> Finished | Loss:
        import ray

        running = dict(zip(outcomes, self._members, strict=True))
        finished: dict[int, Finished] = {}
        stop_sent = False
        while running:
            if not stop_sent and self._stop_requested():
                stop_sent = True
                for member in self._members:
                    call_while_running(member.actor.stop)
            ready, _ = ray.wait(list(running), timeout=POLL_S)
            for ref in ready:
                member = running.pop(ref)
                outcome = answer_of(ref)
                if not isinstance(outcome, Finished):
                    self._drain(running.values())
                    return self._blame(member, outcome, running)
                finished[member.rank] = outcome
            self._collect(running.values())
            late = [member for member in running.values() if time.monotonic() > member.due_at_s]
            if late:
                return self._hang(late, running.values())
        self._drain(self._members)
        return finished[0]

    def _collect(self, members: Iterable[Member]) -> None:
        """Take the poll answers that have arrived and poll those members again; never blocks."""
        import ray

        for member in members:
            if member.poll is None:
                member.poll = call_while_running(member.actor.poll)
        polled = [member for member in self._members if member.poll is not None]
        answered, _ = ray.wait([member.poll for member in polled], num_returns=len(polled), timeout=0) if polled else ([], [])
        for member in [member for member in polled if member.poll in answered]:
            ref, member.poll = member.poll, None
            # A dead rank's poll fails; its outcome reports the death.
            with contextlib.suppress(ray.exceptions.RayError):
                self._take(member, *ray.get(ref))

    def _drain(self, members: Iterable[Member]) -> None:
        """Take the last events of those of these members that answer at once."""
        import ray

        members = list(members)
        for _ in ("the poll under way", "one sent after it", "what happened since"):
            self._collect(members)
            pending = [member.poll for member in members if member.poll is not None]
            if pending:
                ray.wait(pending, num_returns=len(pending), timeout=_DRAIN_S)
        self._collect(members)

    def _take(self, member: Member, events: list[StageEvent], heartbeat: Any) -> None:
        for event in events:
            self._on_event(event)
        if heartbeat is None:
            return
        self._step = max(self._step, heartbeat.step)
        if heartbeat.section is not None:
            member.section, member.deadline_s = heartbeat.section, heartbeat.deadline_s
            member.due_at_s = time.monotonic() + heartbeat.deadline_s - heartbeat.elapsed_s

    def _last_known_step(self) -> int:
        """The last step that was reported or committed; a killed rank may have done a few more."""
        committed, _ = newest_checkpoint([self._start.folder], verify=False)
        return max(self._step, committed.step if committed else 0)

    def _blame(self, member: Member, outcome: Raised | Exception, running: dict[Any, Member]) -> Loss:
        """The loss behind the first bad outcome. A lost connection means that another rank ended: wait briefly to learn which."""
        import ray

        if isinstance(outcome, Raised) and outcome.lost_connection:
            until_s = time.monotonic() + _BLAME_S
            others = dict(running)
            while others and (left_s := until_s - time.monotonic()) > 0:
                ready, _ = ray.wait(list(others), timeout=left_s)
                for ref in ready:
                    other, its = others.pop(ref), answer_of(ref)
                    if isinstance(its, Exception) or (isinstance(its, Raised) and not its.lost_connection):
                        return self._loss(other, its)
        return self._loss(member, outcome)

    def _loss(self, member: Member, outcome: Raised | Exception) -> Loss:
        log = crash_log(self._start.folder, member.rank)
        return loss_of(member.rank, member.label, outcome, step=self._last_known_step(), crash_log=log)

    def _hang(self, late: list[Member], running: Iterable[Member]) -> Loss:
        stacks = self._stacks()
        for member in self._members:
            self._on_event(Stacks(f"{member.label}:\n{stacks[member.rank]}", member.rank))
        return hang_of(
            [member.rank for member in late],
            stacks,
            [member.rank for member in running],
            [member.label for member in self._members],
            late[0].section,
            late[0].deadline_s,
            self._last_known_step(),
        )

    def _stacks(self) -> dict[int, str]:
        """Every rank's stacks, written by its second thread; if that is stuck as well, by a signal handler in C."""
        import ray

        requests = [call_while_running(member.actor.dump_stacks) for member in self._members]
        answered, _ = ray.wait(requests, num_returns=len(requests), timeout=_STACKS_S)
        this_node = ray.get_runtime_context().get_node_id()
        for member, ref in zip(self._members, requests, strict=True):
            if ref not in answered and member.location and member.location.node_id == this_node:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(member.location.pid, STACKS_SIGNAL)
                    time.sleep(POLL_S)
        logs = {member.rank: stacks_log(self._start.folder, member.rank) for member in self._members}
        return {rank: log.read_text(errors="replace") if log.exists() else "did not answer" for rank, log in logs.items()}
