"""The actor that runs one rank: it joins the process group, runs the function, and answers the stage's task meanwhile.

`run` has a thread of its own. `poll`, `stop` and `dump_stacks` are called in the actor's second group of threads, WATCH.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import queue
import secrets
import signal
import socket
import sys
import threading
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.events import Curves, StageEvent
from cluster.failures import Raised, crash_log, raised, stacks_log
from cluster.gang_spec import StartSpec

if TYPE_CHECKING:
    from cluster.rank import Heartbeat, ProcessRank

WATCH = "watch"
"""Name of the actor's group of threads that answers while `run` runs."""
STACKS_SIGNAL = signal.SIGUSR1
_COLLECTIVE_TIMEOUT_S = 1800
"""Limit for collectives outside any section; a section's deadline is usually shorter."""


@dataclass(frozen=True)
class ProcessLocation:
    """Where Ray put a rank's process."""

    node: str
    node_id: str
    address: str
    pid: int
    gpus: tuple[str, ...]


@dataclass(frozen=True)
class Assignment:
    """A rank's position in the gang, from which its environment variables are set."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    gpus: tuple[str, ...]
    """Those of all ranks of the node by local rank, so that LOCAL_RANK is the device's index and peers can reach each other's."""
    master: str
    port: int
    one_node: bool


@dataclass(frozen=True)
class Finished:
    """The function's return value; only rank 0 has one, and a history."""

    value: Any
    history: Curves


class RankProcess:
    def __init__(self, rank: int, folder: str) -> None:
        self._events: queue.SimpleQueue[StageEvent] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._rank: ProcessRank | None = None
        # Open for the life of the process: a crashing process can't open files any more.
        self._crash_log = crash_log(Path(folder), rank).open("w")
        self._stacks_log = stacks_log(Path(folder), rank).open("w")
        faulthandler.enable(self._crash_log)
        faulthandler.register(STACKS_SIGNAL, self._stacks_log, all_threads=True)

    def location(self) -> ProcessLocation:
        import ray

        context = ray.get_runtime_context()
        gpus = tuple(str(gpu) for gpu in ray.get_gpu_ids())
        return ProcessLocation(socket.gethostname(), context.get_node_id(), ray.util.get_node_ip_address(), os.getpid(), gpus)

    def free_port(self) -> int:
        """A port below the kernel's ephemeral range, since torch is imported before it binds the port."""
        while True:
            with socket.socket() as probe, contextlib.suppress(OSError):
                probe.bind(("", 20_000 + secrets.randbelow(12_000)))
                return probe.getsockname()[1]

    def prepare(self, assignment: Assignment, threads: int) -> None:
        """Set the variables that libraries read when they are first imported; unpickling the arguments of `run` imports them."""
        os.environ |= {
            "OMP_NUM_THREADS": str(threads),
            "MASTER_ADDR": assignment.master,
            "MASTER_PORT": str(assignment.port),
            "RANK": str(assignment.rank),
            "WORLD_SIZE": str(assignment.world_size),
            "LOCAL_RANK": str(assignment.local_rank),
            "LOCAL_WORLD_SIZE": str(assignment.local_world_size),
        }
        if assignment.gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(assignment.gpus)
        if assignment.one_node:
            os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"

    def run(self, start: StartSpec, assignment: Assignment) -> Finished | Raised:
        try:
            self._rank = self._join(start, assignment)
            value = start.function(self._rank, *start.arguments)
        except Exception as error:
            return raised(error)
        return Finished(value, self._rank.history) if assignment.rank == 0 else Finished(None, {})

    def _join(self, start: StartSpec, assignment: Assignment) -> ProcessRank:
        """Enter the process group."""
        import torch
        from torch import distributed as dist

        from cluster.rank import ProcessRank

        torch.set_num_threads(start.gang.cpus_per_rank)
        device = torch.device("cpu")
        if assignment.gpus:
            device = torch.device("cuda", assignment.local_rank)
            torch.cuda.set_device(device)
        if assignment.world_size > 1:
            dist.init_process_group(
                "nccl" if assignment.gpus else "gloo",
                init_method=f"tcp://{assignment.master}:{assignment.port}",
                rank=assignment.rank,
                world_size=assignment.world_size,
                timeout=timedelta(seconds=_COLLECTIVE_TIMEOUT_S),
            )
        return ProcessRank(
            rank=assignment.rank,
            world_size=assignment.world_size,
            device=device,
            make_engine=start.gang.make_engine,
            checkpoints=start.folder,
            resume_from=start.resume_from,
            on_event=self._events.put,
            stop_requested=self._stop.is_set,
            identity=start.gang.full_identity(assignment.world_size),
        )

    def poll(self) -> tuple[list[StageEvent], Heartbeat | None]:
        """The events since the last poll, and what the rank is doing; None before it has joined."""
        events = []
        with contextlib.suppress(queue.Empty):
            while True:
                events.append(self._events.get_nowait())
        return events, self._rank.heartbeat() if self._rank is not None else None

    def stop(self) -> None:
        """Set the flag that the rank's `should_stop` reads."""
        self._stop.set()

    def dump_stacks(self) -> None:
        faulthandler.dump_traceback(self._stacks_log, all_threads=True)
