"""Run one function on every rank of a gang, and restart the gang if it loses a rank.

    run_gang (a thread of the stage's task)            RankProcess (one actor per rank)
    ---------------------------------------            ---------------------------------------------
    room.py         reserve resources                  prepare: threads, environment variables
    gang_launch.py  start actors, assign ranks         run:     process group, function(rank, *arguments)
    gang_start.py   every 0.2 s: events, heartbeats <- poll:    a second thread, drains the queue
    failures.py     a death, an exception, a hang   -> stop:    sets the flag that should_stop() reads
    -> end all ranks, restart from the newest checkpoint that verifies

A rank waits for its peers in collectives, and is unblocked by them or by being ended.
`run_inline` runs the function as a single rank in this process, for a debugger. Leaves out elastic sizes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cluster import checkpoint as checkpoints
from cluster import commit
from cluster.events import Notice, Restart, StageEvent
from cluster.failures import GangFailure, Loss
from cluster.gang_spec import GangResult, GangSpec, StartSpec
from cluster.gang_start import GangStart
from cluster.rank_process import Finished
from cluster.room import shortfall


def run_gang(
    function: Callable[..., Any],
    arguments: Sequence[Any],
    *,
    spec: GangSpec,
    on_event: Callable[[StageEvent], None],
    should_stop: Callable[[], bool],
) -> GangResult:
    """Run `function(rank, *arguments)` on every rank and return rank 0's value. `function` is module-level and shipped by reference.

    A rank that dies, hangs or loses its connection ends the gang, which is restarted up to `max_restarts` times. An exception
    of the function itself would only recur, so it is a GangFailure at once. A stop is sent to the ranks once.
    """
    if problem := shortfall(spec):
        raise GangFailure(problem, cause="resources")
    stop_requested = _Latch(should_stop)
    starts = spec.max_restarts + 1
    loss: Loss | None = None
    for number in range(1, starts + 1):
        resume_from, folder = _next_start(spec, spec.ranks, on_event)
        if loss is not None:
            resumes = f"resumes at step {resume_from.step}" if resume_from else "begins at step 0, since there is no checkpoint yet"
            on_event(Restart(f"{loss.sentence}; start {number} of {starts} {resumes}", number))
        start = StartSpec(spec, function, tuple(arguments), folder, resume_from)
        outcome = GangStart(start, on_event, stop_requested).run()
        if isinstance(outcome, Finished):
            return _result(spec.name, outcome, number - 1, resume_from, stop_requested.seen)
        loss = outcome
        if not loss.retriable:
            break
    assert loss is not None, "a gang is started at least once"
    raise GangFailure(
        f"{spec.name}: {loss.sentence}{_out_of_starts(spec, starts) if loss.retriable else ''}", loss.rank, loss.cause, loss.traceback
    )


def run_inline(
    function: Callable[..., Any],
    arguments: Sequence[Any],
    *,
    spec: GangSpec,
    on_event: Callable[[StageEvent], None],
    should_stop: Callable[[], bool],
) -> GangResult:
    """Run one rank in this process. Exceptions pass through unchanged, so that a debugger stops where they are raised."""
    import torch

    from cluster.rank import ProcessRank

    resume_from, folder = _next_start(spec, 1, on_event)
    stop_requested = _Latch(should_stop)
    rank = ProcessRank(
        rank=0,
        world_size=1,
        device=torch.device("cuda:0" if spec.gpus_per_rank else "cpu"),
        make_engine=spec.make_engine,
        checkpoints=folder,
        resume_from=resume_from,
        on_event=on_event,
        stop_requested=stop_requested,
        identity=spec.full_identity(1),
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(spec.cpus_per_rank)
    try:
        value = function(rank, *arguments)
    finally:
        torch.set_num_threads(threads)
    return _result(spec.name, Finished(value, rank.history), 0, resume_from, stop_requested.seen)


class _Latch:
    """Asks whether to stop until the answer is yes, and remembers that."""

    def __init__(self, should_stop: Callable[[], bool]) -> None:
        self.seen = False
        self._should_stop = should_stop

    def __call__(self) -> bool:
        self.seen = self.seen or self._should_stop()
        return self.seen


def _next_start(spec: GangSpec, world_size: int, on_event: Callable[[StageEvent], None]) -> tuple[checkpoints.Checkpoint | None, Path]:
    """The checkpoint to resume from and the folder of a new start. GangFailure if there are checkpoints and none is usable."""
    earlier = checkpoints.attempts(spec.work, spec.series)
    for leftover in itertools.chain.from_iterable(commit.leftovers(folder) for folder in earlier):
        commit.remove(leftover)
    newest, skipped = checkpoints.newest_checkpoint(earlier)
    for text in skipped:
        on_event(Notice(text))
    problem = newest.fits(spec.full_identity(world_size)) if newest else None
    if newest is None and skipped:
        problem = f"no checkpoint can be read ({'; '.join(skipped)}); run again with --fresh {spec.name} to begin at step 0"
    if problem:
        raise GangFailure(f"{spec.name}: {problem}", cause="checkpoint")
    return newest, checkpoints.new_attempt(spec.work, spec.series)


def _result(name: str, finished: Finished, restarts: int, resumed_from: checkpoints.Checkpoint | None, stop_requested: bool) -> GangResult:
    if finished.value is None and not stop_requested:
        raise GangFailure(
            f"{name}: the function returned None on rank 0, which means that it was stopped, but no stop was requested; return a dict",
            0,
            "exception",
        )
    step = resumed_from.step if resumed_from else 0
    return GangResult(finished.value, finished.history, restarts, step, stopped=finished.value is None)


def _out_of_starts(spec: GangSpec, starts: int) -> str:
    newest, _ = checkpoints.newest_checkpoint(checkpoints.attempts(spec.work, spec.series), verify=False)
    resumes = f"to resume at step {newest.step}" if newest else "to begin at step 0, since there is no checkpoint yet"
    return f"; that was start {starts} of {starts}: run again {resumes}"
