"""Run one function on every rank of a gang, and start the gang again when it loses a rank.

    run_gang (a thread of the stage's task)            _RankProcess (one actor a rank)
    ---------------------------------------            ---------------------------------------------
    placement group  -> wait for room                   prepare: threads, environment, process group
    start actors     -> wait for all to be prepared     run:     function(rank, *arguments)
    every 0.2 s      <- events, heartbeats              poll:    a second thread, drains the queue
    a death, an exception, a missed deadline            stop:    sets the flag that should_stop() reads
    -> end all at once, start again from the newest checkpoint that verifies

The loop of `run_gang` waits for a rank's answer, and is unblocked by it, by a rank's death (Ray tells) or by 0.2 s passing.
A rank waits for its peers in collectives, and is unblocked by them or by being ended.
`run_inline` does the same with one rank in this process, for a debugger. Leaves out elastic sizes.
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import os
import queue
import secrets
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from cluster import checkpoint as checkpoints
from cluster import commit
from cluster.events import Curves, GangStarted, Notice, Restart, Stacks, StageEvent, Waiting

_POLL_S = 0.2
_BLAME_S = 10.0
"""When one rank loses its connection, the rank that is to blame is known to Ray within this time."""
_DRAIN_S = 2.0
_STACKS_S = 5.0
_STACKS_SIGNAL = signal.SIGUSR1
_COLLECTIVE_TIMEOUT_S = 1800
"""A bound for what no section watches; a section's deadline is usually shorter."""
_WATCH = "watch"
"""The actor's second group of threads: answers while `run` runs."""


@dataclass(frozen=True, kw_only=True)
class Room:
    """What a gang holds of the machines while it runs: `Room(name="pretrain", ranks=2, cpus_per_rank=8, gpus_per_rank=1)`."""

    name: str
    """The stage, as messages call it."""
    ranks: int = 1
    cpus_per_rank: int = 1
    gpus_per_rank: int = 0
    memory_gib: float | None = None
    """Host memory that each rank reserves."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Node labels that every rank's node must have, e.g. {"tier": "a100"}."""
    accelerator: str | None = None
    """Ray's accelerator type, e.g. "A100"."""


@dataclass(frozen=True, kw_only=True)
class GangSpec(Room):
    """A gang's room, and what its ranks are given.

    `GangSpec(name="pretrain", ranks=2, make_engine=DeepSpeedEngine, work=Path("work/ab12"), series=1, identity={})`
    """

    make_engine: Callable[..., Any]
    """Module-level: `make_engine(model, parameter_groups, settings, *, device, world_size)`."""
    work: Path
    """The stage's work folder, on storage that all nodes share."""
    series: int = 1
    """Which attempt that a person asked for; checkpoints of other series are not read."""
    identity: Mapping[str, Any]
    """Goes into each checkpoint's manifest: engine, zero_stage, precision, versions. `world_size` is added."""
    max_restarts: int = 2
    start_deadline_s: float = 300
    """From the moment the gang has its room until the function's first section; and how long it waits for room that no node has."""

    def full_identity(self, world_size: int) -> dict[str, Any]:
        return {**self.identity, "world_size": world_size}


@dataclass(frozen=True)
class GangResult:
    value: Any
    """What rank 0's function returned."""
    history: Curves
    """Every point of the curves, those before a resume included."""
    restarts: int
    resumed_from_step: int
    """Where the last start went on from; 0: from the beginning."""
    stopped: bool
    """True: the function returned None after it was asked to stop; its checkpoint is there to go on from."""


class GangFailure(Exception):
    """A gang that ended without a result. The message is one paragraph for a person."""

    def __init__(self, message: str, rank: int | None = None, cause: str = "", traceback: str = "") -> None:
        super().__init__(message, rank, cause, traceback)
        self.message = message
        self.rank = rank
        """The rank that is to blame; None where no single one is."""
        self.cause = cause
        """"exception", "death", "deadline", "connection", "checkpoint" or "resources"."""
        self.traceback = traceback

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class _Done:
    value: Any
    history: Curves


@dataclass(frozen=True)
class _Loss:
    """Why a start ended early."""

    rank: int | None
    cause: str
    sentence: str
    """"rank 2 (pid 4711, node n1) killed by SIGKILL at step 70"."""
    retried: bool
    traceback: str = ""


def run_inline(
    function: Callable[..., Any],
    arguments: Sequence[Any],
    *,
    spec: GangSpec,
    on_event: Callable[[StageEvent], None],
    should_stop: Callable[[], bool],
) -> GangResult:
    """One rank in this process: exceptions come through as they are, so that a debugger stops where they are raised."""
    import torch

    from cluster.rank import ProcessRank

    start, attempt = _next_start(spec, 1, on_event)
    asked = _Latch(should_stop)
    rank = ProcessRank(
        rank=0,
        world_size=1,
        device=torch.device("cuda:0" if spec.gpus_per_rank else "cpu"),
        make_engine=spec.make_engine,
        checkpoints=attempt,
        resume_from=start,
        on_event=on_event,
        stop_requested=asked,
        identity=spec.full_identity(1),
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(spec.cpus_per_rank)
    try:
        value = function(rank, *arguments)
    finally:
        torch.set_num_threads(threads)
    return _result(spec.name, _Done(value, rank.history), 0, start, asked.seen)


def run_gang(
    function: Callable[..., Any],
    arguments: Sequence[Any],
    *,
    spec: GangSpec,
    on_event: Callable[[StageEvent], None],
    should_stop: Callable[[], bool],
) -> GangResult:
    """`function(rank, *arguments)` on every rank; what rank 0 returned. `function` is module-level and shipped by reference.

    A rank that dies, hangs or loses its connection ends the gang, which starts again up to `max_restarts` times. An exception
    of the function's own would come again, so it is a GangFailure at once. A stop is told to the ranks once.
    """
    if problem := shortfall(spec):
        raise GangFailure(problem, cause="resources")
    asked = _Latch(should_stop)
    starts = spec.max_restarts + 1
    loss: _Loss | None = None
    for number in range(1, starts + 1):
        resume_from, attempt = _next_start(spec, spec.ranks, on_event)
        if loss is not None:
            goes_on = f"resumes at step {resume_from.step}" if resume_from else "begins at step 0, there being no checkpoint"
            on_event(Restart(f"{spec.name}: {loss.sentence}; start {number} of {starts} {goes_on}", number))
        outcome = _Start(function, arguments, spec, attempt, resume_from, on_event, asked).run()
        if isinstance(outcome, _Done):
            return _result(spec.name, outcome, number - 1, resume_from, asked.seen)
        loss = outcome
        if not loss.retried:
            break
    assert loss is not None, "a gang is started at least once"
    used_up = f"; that was start {starts} of {starts}: run again to go on from the newest checkpoint" if loss.retried else ""
    raise GangFailure(f"{spec.name}: {loss.sentence}{used_up}", loss.rank, loss.cause, loss.traceback)


def shortfall(spec: Room) -> str | None:
    """What the whole cluster lacks for this gang, as a sentence; None when its room exists, in use or not."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    fitting = [node for node in nodes if all(node.get("Labels", {}).get(key) == value for key, value in spec.labels.items())]
    room = sum(_ranks_that_fit(node["Resources"], _bundle(spec)) for node in fitting)
    if room >= spec.ranks:
        return None
    cpus, gpus, memory = (sum(node["Resources"].get(name, 0) for node in nodes) for name in ("CPU", "GPU", "memory"))
    labelled = f", {len(fitting)} of them with these labels" if spec.labels else ""
    return (
        f"{spec.name} asks for {_ask(spec)}: the cluster has room for {room} of them "
        f"({cpus:g} CPUs, {gpus:g} GPUs and {memory / 2**30:.1f} GiB on {len(nodes)} node{'s' * (len(nodes) != 1)}{labelled}); "
        f"lower the stage's resources or use a larger cluster"
    )


def waits_for(spec: Room) -> str:
    """What somebody waits for whose room exists and is in use, as the end of a sentence."""
    import ray

    free = ray.available_resources()
    memory = f" and {free.get('memory', 0) / 2**30:.1f} GiB" if spec.memory_gib else ""
    return f"waits for room for {_ask(spec)}; free now: {free.get('CPU', 0):g} CPUs, {free.get('GPU', 0):g} GPUs{memory}"


class _Latch:
    """Remembers that a stop was asked for."""

    def __init__(self, ask: Callable[[], bool]) -> None:
        self.seen = False
        self._ask = ask

    def __call__(self) -> bool:
        self.seen = self.seen or self._ask()
        return self.seen


def _next_start(spec: GangSpec, world_size: int, on_event: Callable[[StageEvent], None]) -> tuple[checkpoints.Checkpoint | None, Path]:
    """The checkpoint to go on from, and the folder of a new start. GangFailure where there are checkpoints and none can be used."""
    earlier = checkpoints.attempts(spec.work, spec.series)
    for leftover in itertools.chain.from_iterable(commit.leftovers(folder) for folder in earlier):
        commit.remove(leftover)
    start, skipped = checkpoints.newest_checkpoint(earlier)
    for text in skipped:
        on_event(Notice(f"{spec.name}: {text}"))
    problem = start.fits(spec.full_identity(world_size)) if start else None
    if start is None and skipped:
        problem = f"no checkpoint can be read ({'; '.join(skipped)}); make the stage afresh to begin at step 0"
    if problem:
        raise GangFailure(f"{spec.name}: {problem}", cause="checkpoint")
    return start, checkpoints.new_attempt(spec.work, spec.series)


def _result(name: str, done: _Done, restarts: int, resumed_from: checkpoints.Checkpoint | None, asked: bool) -> GangResult:
    if done.value is None and not asked:
        raise GangFailure(f"{name}: the function returned None on rank 0 though nobody asked it to stop; it returns a dict", 0, "exception")
    step = resumed_from.step if resumed_from else 0
    return GangResult(done.value, done.history, restarts, step, stopped=done.value is None)


@dataclass(frozen=True)
class _Where:
    """Where Ray put an actor."""

    node: str
    node_id: str
    address: str
    pid: int
    gpus: tuple[str, ...]


@dataclass(frozen=True)
class _Place:
    """Where a rank stands among the others: what its environment is made of."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    gpus: tuple[str, ...]
    """Of all ranks of the node, in the order of local ranks, so that LOCAL_RANK is the device's index and peers can be reached."""
    master: str
    port: int
    one_node: bool


@dataclass(frozen=True)
class _Raised:
    """An exception of the function, in words: the exception itself may not survive pickling."""

    summary: str
    traceback: str
    connection: bool
    """A peer was lost: someone else is to blame."""


class _LostAtStart(Exception):
    """A rank that never came to run its function."""

    def __init__(self, loss: _Loss) -> None:
        super().__init__(loss)
        self.loss = loss


class _Start:
    """One start of a gang: its placement group, its actors, and the loop that watches them."""

    def __init__(
        self,
        function: Callable[..., Any],
        arguments: Sequence[Any],
        spec: GangSpec,
        attempt: Path,
        resume_from: checkpoints.Checkpoint | None,
        on_event: Callable[[StageEvent], None],
        asked: _Latch,
    ) -> None:
        self._function = function
        self._arguments = tuple(arguments)
        self._spec = spec
        self._attempt = attempt
        self._resume_from = resume_from
        self._on_event = on_event
        self._asked = asked
        self._step = resume_from.step if resume_from else 0
        self._actors: list[Any] = []
        self._where: dict[int, _Where] = {}
        self._polls: dict[int, Any] = {}
        self._sections: dict[int, tuple[str, float]] = {}
        self._due_s: dict[int, float] = {}

    def run(self) -> _Done | _Loss:
        """Rank 0's value and history, or why there are none. Nothing of the gang is left when it returns."""
        import ray

        with self._room() as group:
            if group is None:
                return _Done(None, {})
            try:
                return self._watch(self._launch(group))
            except _LostAtStart as lost:
                return lost.loss
            finally:
                # All at once: a rank that waits for a dead peer in a collective would sit there until its timeout.
                for actor in self._actors:
                    ray.kill(actor, no_restart=True)

    @contextlib.contextmanager
    def _room(self) -> Iterator[Any]:
        """The placement group, once it is free; None when a stop was asked for meanwhile."""
        import ray
        from ray.util.placement_group import placement_group, remove_placement_group

        from cluster.ray_session import GROUP_PREFIX

        spec = self._spec
        # Named after this process: whoever sees it die can free its room.
        name = f"{GROUP_PREFIX}-{ray.get_runtime_context().get_worker_id()}-{self._attempt.name}"
        selectors = [dict(spec.labels)] * spec.ranks if spec.labels else None
        group = placement_group([_bundle(spec)] * spec.ranks, strategy="PACK", name=name, bundle_label_selector=selectors)
        try:
            if not group.wait(1):
                self._on_event(Waiting(f"{spec.name}: {waits_for(spec)}"))
            due_s = time.monotonic() + spec.start_deadline_s
            while not group.wait(_POLL_S):
                if self._asked():
                    yield None
                    return
                if time.monotonic() > due_s and (problem := shortfall(spec)):  # a node was lost, and no other came in its place
                    raise GangFailure(f"{problem} (waited {spec.start_deadline_s:g} s of start_deadline_s)", cause="resources")
            yield group
        finally:
            remove_placement_group(group)

    def _launch(self, group: Any) -> list[Any]:
        """Start the actors, introduce them to each other, and set the function going on each."""
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        spec = self._spec
        # Ray's annotations know this form of remote() as a decorator without the option.
        actors = ray.remote(concurrency_groups={_WATCH: 2})(_RankProcess)  # type: ignore[call-overload]
        for index in range(spec.ranks):
            actor = actors.options(
                num_cpus=spec.cpus_per_rank,
                num_gpus=spec.gpus_per_rank,
                memory=int(spec.memory_gib * 2**30) if spec.memory_gib else None,
                accelerator_type=spec.accelerator,
                max_restarts=0,
                max_task_retries=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
            )
            self._actors.append(actor.remote(index, str(self._attempt)))
        now_s = time.monotonic()
        self._due_s = dict.fromkeys(range(spec.ranks), now_s + spec.start_deadline_s)
        self._sections = dict.fromkeys(range(spec.ranks), ("start", spec.start_deadline_s))
        places = self._introduce()
        function = ray.put((self._function, self._arguments, spec))
        for actor, place in zip(self._actors, places, strict=True):
            actor.prepare.remote(place, spec.cpus_per_rank)
        return [actor.run.remote(function, place, self._resume_from) for actor, place in zip(self._actors, places, strict=True)]

    def _introduce(self) -> list[_Place]:
        spec = self._spec
        self._hear([actor.where.remote() for actor in self._actors], self._where)
        ranks = ", ".join(self._called(index) for index in range(spec.ranks))
        self._on_event(GangStarted(f"{spec.name}: {ranks}", tuple(self._where[index].pid for index in range(spec.ranks))))
        one_node = len({where.node_id for where in self._where.values()}) == 1
        master = "127.0.0.1" if one_node else self._where[0].address
        ports = {0: 0}
        if spec.ranks > 1:
            self._hear([self._actors[0].free_port.remote()], ports)
        places = []
        for index in range(spec.ranks):
            where = self._where[index]
            together = [other for other in range(spec.ranks) if self._where[other].node_id == where.node_id]
            gpus = tuple(gpu for other in together for gpu in self._where[other].gpus)
            places.append(_Place(index, spec.ranks, together.index(index), len(together), gpus, master, ports[0], one_node))
        return places

    def _hear(self, asked: list[Any], heard: dict[int, Any]) -> None:
        """Fill in what ranks 0, 1, ... answer before the start's deadline; _LostAtStart where one dies, raises or stays silent."""
        import ray

        waiting = {ref: index for index, ref in enumerate(asked)}
        while waiting:
            ready, _ = ray.wait(list(waiting), timeout=max(0.0, min(self._due_s.values()) - time.monotonic()))
            if not ready:
                late = sorted(waiting.values())
                who = " and ".join(self._called(index) for index in late)
                sentence = f"{who} did not come up within the {self._spec.start_deadline_s:g} s of start_deadline_s"
                raise _LostAtStart(_Loss(late[0], "deadline", sentence, True))
            for ref in ready:
                index = waiting.pop(ref)
                answer = self._outcome(ref)
                if isinstance(answer, (_Raised, Exception)):
                    raise _LostAtStart(self._blame(index, answer, {}))
                heard[index] = answer

    def _watch(self, runs: list[Any]) -> _Done | _Loss:
        import ray

        running = {ref: index for index, ref in enumerate(runs)}
        done: dict[int, _Done] = {}
        told = False
        while running:
            if not told and self._asked():
                told = True
                for actor in self._actors:
                    actor.stop.options(concurrency_group=_WATCH).remote()
            ready, _ = ray.wait(list(running), timeout=_POLL_S)
            for ref in ready:
                index = running.pop(ref)
                outcome = self._outcome(ref)
                if not isinstance(outcome, _Done):
                    self._drain(running.values())
                    return self._blame(index, outcome, running)
                done[index] = outcome
            self._collect(running.values())
            late = [index for index in running.values() if time.monotonic() > self._due_s[index]]
            if late:
                return self._hang(late, running.values())
        self._drain(range(len(runs)))
        return done[0]

    @staticmethod
    def _outcome(ref: Any) -> Any:
        """A rank's answer, or the exception that tells its death."""
        import ray

        try:
            return ray.get(ref)
        except Exception as error:
            return _raised_by_ray(error) or error

    def _collect(self, ranks: Iterable[int]) -> None:
        """Take the answers that are there, and ask again those that answered; never wait."""
        import ray

        for index in ranks:
            if index not in self._polls:
                self._polls[index] = self._actors[index].poll.options(concurrency_group=_WATCH).remote()
        answered, _ = ray.wait(list(self._polls.values()), num_returns=len(self._polls), timeout=0) if self._polls else ([], [])
        for index in [index for index, ref in self._polls.items() if ref in answered]:
            # A rank that is gone answers with its death, which its run tells as well.
            with contextlib.suppress(ray.exceptions.RayError):
                self._take(index, *ray.get(self._polls.pop(index)))

    def _drain(self, ranks: Iterable[int]) -> None:
        """Take what these ranks still have to say, as far as they answer at once."""
        import ray

        ranks = list(ranks)
        for _ in ("an answer under way", "one asked for since", "what came after them"):
            self._collect(ranks)
            pending = [self._polls[index] for index in ranks if index in self._polls]
            if pending:
                ray.wait(pending, num_returns=len(pending), timeout=_DRAIN_S)
        self._collect(ranks)

    def _take(self, index: int, events: list[StageEvent], heartbeat: Any) -> None:
        for event in events:
            self._on_event(event)
        if heartbeat is None:
            return
        self._step = max(self._step, heartbeat.step)
        if heartbeat.section is not None:
            self._due_s[index] = time.monotonic() + heartbeat.deadline_s - heartbeat.elapsed_s
            self._sections[index] = (heartbeat.section, heartbeat.deadline_s)

    def _reached(self) -> int:
        """The last step that is known of; a rank that was killed may have done a few more."""
        committed, _ = checkpoints.newest_checkpoint([self._attempt], verify=False)
        return max(self._step, committed.step if committed else 0)

    def _called(self, index: int) -> str:
        if index not in self._where:
            return f"rank {index}"
        return f"rank {index} (pid {self._where[index].pid}, node {self._where[index].node})"

    def _blame(self, index: int, outcome: _Raised | Exception, running: dict[Any, int]) -> _Loss:
        """The loss that the first bad outcome tells of. A lost connection is somebody else's end: wait a moment for who it was."""
        import ray

        if isinstance(outcome, _Raised) and outcome.connection:
            until_s = time.monotonic() + _BLAME_S
            others = dict(running)
            while others and (left_s := until_s - time.monotonic()) > 0:
                ready, _ = ray.wait(list(others), timeout=left_s)
                for ref in ready:
                    other = others.pop(ref)
                    theirs = self._outcome(ref)
                    if isinstance(theirs, Exception) or (isinstance(theirs, _Raised) and not theirs.connection):
                        return self._blame(other, theirs, {})
            sentence = f"{self._called(index)} lost its connection to the others at step {self._reached()}: {outcome.summary}"
            return _Loss(index, "connection", sentence, True, outcome.traceback)
        if isinstance(outcome, _Raised):
            return _Loss(
                index, "exception", f"{self._called(index)} raised at step {self._reached()}: {outcome.summary}", False, outcome.traceback
            )
        return _Loss(index, "death", f"{self._called(index)} {self._death(index, outcome)} at step {self._reached()}", True)

    def _death(self, index: int, error: Exception) -> str:
        from ray import exceptions as rays

        from cluster.ray_session import death_in_words

        crash = _crash_file(self._attempt, index)
        last_words = crash.read_text(errors="replace").splitlines() if crash.exists() else []
        fatal = [line for line in last_words if line.startswith("Fatal Python error")]
        if fatal:
            return f"crashed ({fatal[-1]})"
        # Python writes its last words for every signal that it can catch.
        if type(error) is rays.ActorDiedError:
            return "killed by SIGKILL"
        return death_in_words(error)

    def _hang(self, late: list[int], running: Iterable[int]) -> _Loss:
        stacks = self._stacks()
        for index, text in stacks.items():
            self._on_event(Stacks(f"{self._called(index)}:\n{text}", index))
        stuck = held_up_by(late, {index: stacks[index] for index in running})
        section, deadline_s = self._sections[late[0]]
        who = " and ".join(self._called(index) for index in stuck)
        did = "did not finish" if stuck[0] in late else f"kept {self._called(late[0])} from finishing"
        sentence = f"{who} {did} section {section!r} within its {deadline_s:g} s at step {self._reached()}"
        return _Loss(stuck[0], "deadline", sentence, True, "\n".join(f"rank {index}:\n{text}" for index, text in stacks.items()))

    def _stacks(self) -> dict[int, str]:
        """What every rank is doing, from its second thread; where that is stuck as well, from a signal handler in C."""
        import ray

        asked = [actor.dump_stacks.options(concurrency_group=_WATCH).remote() for actor in self._actors]
        answered, _ = ray.wait(asked, num_returns=len(asked), timeout=_STACKS_S)
        here = ray.get_runtime_context().get_node_id()
        for index, ref in enumerate(asked):
            if ref not in answered and self._where[index].node_id == here:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._where[index].pid, _STACKS_SIGNAL)
                    time.sleep(_POLL_S)
        files = [_stacks_file(self._attempt, index) for index in range(len(self._actors))]
        return {index: file.read_text(errors="replace") if file.exists() else "did not answer" for index, file in enumerate(files)}


def held_up_by(late: Sequence[int], stacks: Mapping[int, str]) -> list[int]:
    """Which of the running ranks, each with its stack, keeps those waiting that are past their deadline.

    Who waits in a collective waits for the ones that do something else. These may have begun a moment later, and not be late yet.
    """
    elsewhere = [index for index, stack in stacks.items() if "distributed_c10d" not in stack]
    return [index for index in late if index in elsewhere] or elsewhere or list(late)


class _RankProcess:
    """The actor: one process, one rank. `run` has its own thread; the methods of the second group answer meanwhile."""

    def __init__(self, rank: int, attempt: str) -> None:
        self._attempt = Path(attempt)
        self._events: queue.SimpleQueue[StageEvent] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._rank: Any = None
        # Kept open for the life of the process: a crash has no time to open files.
        self._crash = _crash_file(self._attempt, rank).open("w")
        self._stacks = _stacks_file(self._attempt, rank).open("w")
        faulthandler.enable(self._crash)
        faulthandler.register(_STACKS_SIGNAL, self._stacks, all_threads=True)

    def where(self) -> _Where:
        import ray

        context = ray.get_runtime_context()
        gpus = tuple(str(gpu) for gpu in ray.get_gpu_ids())
        return _Where(socket.gethostname(), context.get_node_id(), ray.util.get_node_ip_address(), os.getpid(), gpus)

    def free_port(self) -> int:
        """Below those that the kernel gives to whoever asks for any: torch is imported before it is used."""
        while True:
            with socket.socket() as probe, contextlib.suppress(OSError):
                probe.bind(("", 20_000 + secrets.randbelow(12_000)))
                return probe.getsockname()[1]

    def prepare(self, place: _Place, threads: int) -> None:
        """Set what libraries read when they are first imported; `run`'s arguments import them."""
        os.environ |= {
            "OMP_NUM_THREADS": str(threads),
            "MASTER_ADDR": place.master,
            "MASTER_PORT": str(place.port),
            "RANK": str(place.rank),
            "WORLD_SIZE": str(place.world_size),
            "LOCAL_RANK": str(place.local_rank),
            "LOCAL_WORLD_SIZE": str(place.local_world_size),
        }
        if place.gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(place.gpus)
        if place.one_node:
            os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"

    def run(
        self, task: tuple[Callable[..., Any], tuple[Any, ...], GangSpec], place: _Place, resume_from: checkpoints.Checkpoint | None
    ) -> _Done | _Raised:
        function, arguments, spec = task
        try:
            self._rank = self._join(spec, place, resume_from)
            value = function(self._rank, *arguments)
        except Exception as error:
            return _raised(error)
        return _Done(value, self._rank.history) if place.rank == 0 else _Done(None, {})

    def _join(self, spec: GangSpec, place: _Place, resume_from: checkpoints.Checkpoint | None) -> Any:
        import torch
        from torch import distributed as dist

        from cluster.rank import ProcessRank

        torch.set_num_threads(spec.cpus_per_rank)
        device = torch.device("cpu")
        if place.gpus:
            device = torch.device("cuda", place.local_rank)
            torch.cuda.set_device(device)
        if place.world_size > 1:
            dist.init_process_group(
                "nccl" if place.gpus else "gloo",
                init_method=f"tcp://{place.master}:{place.port}",
                rank=place.rank,
                world_size=place.world_size,
                timeout=timedelta(seconds=_COLLECTIVE_TIMEOUT_S),
            )
        return ProcessRank(
            rank=place.rank,
            world_size=place.world_size,
            device=device,
            make_engine=spec.make_engine,
            checkpoints=self._attempt,
            resume_from=resume_from,
            on_event=self._events.put,
            stop_requested=self._stop.is_set,
            identity=spec.full_identity(place.world_size),
        )

    def poll(self) -> tuple[list[StageEvent], Any]:
        events = []
        with contextlib.suppress(queue.Empty):
            while True:
                events.append(self._events.get_nowait())
        return events, self._rank.heartbeat() if self._rank is not None else None

    def stop(self) -> None:
        self._stop.set()

    def dump_stacks(self) -> None:
        faulthandler.dump_traceback(self._stacks, all_threads=True)


def _raised(error: Exception) -> _Raised:
    from torch import distributed as dist

    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    connection = any(isinstance(link, (dist.DistError, ConnectionError)) or _from_gloo(link) for link in chain)
    text = " ".join(str(error).split())
    return _Raised(f"{type(error).__name__}: {text}", "".join(traceback.format_exception(error)), connection)


def _raised_by_ray(error: Exception) -> _Raised | None:
    """Code that raised where the actor could not say so itself: importing the function, or making the actor. None: a death."""
    from ray import exceptions as rays

    if isinstance(error, rays.RayActorError) and error.actor_init_failed:
        lines = str(error).splitlines()
        words = itertools.takewhile(lambda line: not line.startswith(" "), reversed(lines))  # what follows the traceback
        return _Raised(" ".join(reversed([*words])), str(error), False)
    if not isinstance(error, rays.RayTaskError):
        return None
    cause = error.cause.client_exc if isinstance(error.cause, rays.RaySystemError) else error.cause  # an argument that can't be unpickled
    if isinstance(cause, rays.RayError):
        return None  # an argument that went with a node
    return _Raised(f"{type(cause).__name__}: {' '.join(str(cause).split())}", str(error), False)


def _from_gloo(error: BaseException) -> bool:
    # Gloo raises plain RuntimeErrors: "[.../gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:4711".
    return isinstance(error, RuntimeError) and "gloo" in str(error).lower()


def _crash_file(attempt: Path, rank: int) -> Path:
    return attempt / f"rank-{rank:04d}.crash"


def _stacks_file(attempt: Path, rank: int) -> Path:
    return attempt / f"rank-{rank:04d}.stacks"


def _bundle(spec: Room) -> dict[str, float]:
    bundle: dict[str, float] = {"CPU": spec.cpus_per_rank}
    if spec.gpus_per_rank:
        bundle["GPU"] = spec.gpus_per_rank
    if spec.memory_gib:
        bundle["memory"] = int(spec.memory_gib * 2**30)
    if spec.accelerator:
        # Ray's way of saying "on a node of this type": each such node has 1 of it, and a sliver is asked for.
        bundle[f"accelerator_type:{spec.accelerator}"] = 0.001
    return bundle


def _ranks_that_fit(resources: Mapping[str, float], bundle: Mapping[str, float]) -> int:
    return min(int(resources.get(name, 0) // amount) for name, amount in bundle.items())


def _ask(spec: Room) -> str:
    """ "2 ranks of 1 CPU and 8 GiB"."""
    parts = [f"{spec.cpus_per_rank} CPU" + "s" * (spec.cpus_per_rank != 1)]
    parts += [f"{spec.gpus_per_rank} GPU" + "s" * (spec.gpus_per_rank != 1)] if spec.gpus_per_rank else []
    parts += [f"{spec.memory_gib:g} GiB"] if spec.memory_gib else []
    parts += [f"accelerator {spec.accelerator}"] if spec.accelerator else []
    parts += [f"labels {dict(spec.labels)}"] if spec.labels else []
    return f"{spec.ranks} rank{'s' * (spec.ranks != 1)} of {' and '.join(parts)}"
