"""Why a gang's start ended without a result: exceptions, deaths and hangs, in words that name the rank to blame."""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class GangFailure(Exception):
    """A gang that ended without a result. The message is one paragraph for a person."""

    def __init__(self, message: str, rank: int | None = None, cause: str = "", traceback: str = "") -> None:
        super().__init__(message, rank, cause, traceback)
        self.message = message
        self.rank = rank
        """The rank to blame; None if no single rank is."""
        self.cause = cause
        """"exception", "death", "deadline", "connection", "checkpoint" or "resources"."""
        self.traceback = traceback

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class Loss:
    """Why one start ended early."""

    rank: int | None
    cause: str
    """As in GangFailure."""
    sentence: str
    """"rank 2 (pid 4711, node n1) was killed by SIGKILL at step 70"."""
    retriable: bool
    traceback: str = ""


@dataclass(frozen=True)
class Raised:
    """A rank's exception as text: the exception itself may not survive pickling."""

    summary: str
    traceback: str
    lost_connection: bool
    """True if it lost a peer, so another rank is to blame."""


def raised(error: Exception) -> Raised:
    """Describe an exception on the rank where it was raised."""
    from torch import distributed as dist

    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    lost_connection = any(isinstance(link, (dist.DistError, ConnectionError)) or _is_gloo_error(link) for link in chain)
    return Raised(_summary(error), "".join(traceback.format_exception(error)), lost_connection)


def answer_of(ref: Any) -> Any:
    """A rank's answer; Raised if its code raised; otherwise the exception by which Ray reports its death."""
    import ray

    try:
        return ray.get(ref)
    except Exception as error:
        return _raised_through_ray(error) or error


def loss_of(rank: int, label: str, outcome: Raised | Exception, *, step: int, crash_log: Path) -> Loss:
    """The loss that follows from what `answer_of` gave for one rank; `label` is "rank 2 (pid 4711, node n1)"."""
    if isinstance(outcome, Raised):
        if outcome.lost_connection:
            sentence = f"{label} lost its connection to the other ranks at step {step}: {outcome.summary}"
            return Loss(rank, "connection", sentence, True, outcome.traceback)
        return Loss(rank, "exception", f"{label} raised at step {step}: {outcome.summary}", False, outcome.traceback)
    return Loss(rank, "death", f"{label} {_describe_rank_death(outcome, crash_log)} at step {step}", True)


def hang_of(
    late: Sequence[int],
    stacks: Mapping[int, str],
    running: Sequence[int],
    labels: Sequence[str],
    section: str,
    deadline_s: float,
    step: int,
) -> Loss:
    """The loss that follows from ranks past their deadline; `section` and `deadline_s` are those of the first one."""
    blocking = blocking_ranks(late, {rank: stacks[rank] for rank in running})
    who = " and ".join(labels[rank] for rank in blocking)
    did = "did not finish" if blocking[0] in late else f"kept {labels[late[0]]} from finishing"
    sentence = f"{who} {did} section {section!r} within {deadline_s:g} s at step {step}"
    return Loss(blocking[0], "deadline", sentence, True, "\n".join(f"rank {rank}:\n{text}" for rank, text in stacks.items()))


def blocking_ranks(late: Sequence[int], stacks: Mapping[int, str]) -> list[int]:
    """Which of the running ranks keeps the late ones waiting.

    A rank blocked in a collective is waiting for the ranks that are not in it. Those may have entered their section a
    moment later, and so not be late yet.
    """
    elsewhere = [rank for rank, stack in stacks.items() if "distributed_c10d" not in stack]
    return [rank for rank in late if rank in elsewhere] or elsewhere or list(late)


def crash_log(folder: Path, rank: int) -> Path:
    """Where a rank's process leaves its stacks when a signal that Python can catch ends it."""
    return folder / f"rank-{rank:04d}.crash"


def stacks_log(folder: Path, rank: int) -> Path:
    """Where a rank's process writes its stacks on request."""
    return folder / f"rank-{rank:04d}.stacks"


def describe_death(error: Exception) -> str:
    """Why Ray lost a process, as the end of a sentence."""
    from ray import exceptions as rays

    if isinstance(error, rays.OutOfMemoryError):
        return f"was ended by Ray's memory monitor, as its node ran out of memory: use fewer ranks or set memory_gib ({_first_line(error)})"
    if isinstance(error, rays.NodeDiedError):
        return f"was lost with its node ({_first_line(error)})"
    if isinstance(error, rays.RuntimeEnvSetupError):
        return f"could not start: its environment could not be set up ({_first_line(error)})"
    if isinstance(error, rays.TaskCancelledError):
        return "was cancelled"
    if isinstance(error, (rays.WorkerCrashedError, rays.ActorDiedError)):
        return (
            "died without a message: it was killed (by SIGKILL, as the kernel does when memory runs out), "
            "it crashed in native code, or its code called os._exit"
        )
    return f"was lost: {type(error).__name__}: {_first_line(error)}"


def _describe_rank_death(error: Exception, crash_log: Path) -> str:
    from ray import exceptions as rays

    lines = crash_log.read_text(errors="replace").splitlines() if crash_log.exists() else []
    fatal = [line for line in lines if line.startswith("Fatal Python error")]
    if fatal:
        return f"crashed ({fatal[-1]})"
    # Python writes a crash log for every signal that it can catch, so an actor without one was killed by the one it can't.
    if type(error) is rays.ActorDiedError:
        return "was killed by SIGKILL"
    return describe_death(error)


def _raised_through_ray(error: Exception) -> Raised | None:
    """Code that raised where the actor could not report it: while importing the function or making the actor. None for a death."""
    from ray import exceptions as rays

    if isinstance(error, rays.RayActorError) and error.actor_init_failed:
        lines = str(error).splitlines()
        message = itertools.takewhile(lambda line: not line.startswith(" "), reversed(lines))  # the lines after the traceback
        return Raised(" ".join(reversed([*message])), str(error), False)
    if not isinstance(error, rays.RayTaskError):
        return None
    cause = error.cause.client_exc if isinstance(error.cause, rays.RaySystemError) else error.cause  # an argument that can't be unpickled
    if isinstance(cause, rays.RayError):
        return None  # an argument that was lost with a node
    return Raised(_summary(cause), str(error), False)


def _summary(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _is_gloo_error(error: BaseException) -> bool:
    # Gloo raises plain RuntimeErrors: "[.../gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:4711".
    return isinstance(error, RuntimeError) and "gloo" in str(error).lower()


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
