"""Whether the machines can hold what will run. Asked before a stage starts, so that a shortage is reported at once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipelines.plan.config import Fault
from pipelines.plan.graph import Stage
from pipelines.store.store import Store

NODE_DEADLINE_S = 60.0


def room_of(stage: Stage) -> dict[str, Any]:
    """What a stage holds of the machines, a gang's ranks or one process, as the fields of `cluster.room.Room`."""
    resources = stage.resources
    where: dict[str, Any] = {"memory_gib": resources.memory_gib, "labels": resources.labels, "accelerator": resources.accelerator}
    if stage.kind.trains():
        shape = {"ranks": resources.ranks, "cpus_per_rank": resources.cpus_per_rank, "gpus_per_rank": resources.gpus_per_rank}
    else:
        shape = {"ranks": 1, "cpus_per_rank": resources.cpus, "gpus_per_rank": resources.gpus}
    return {"name": stage.name, **shape, **where}


def lacks_here(stages: Iterable[Stage]) -> list[Fault]:
    """What stages ask for that this machine does not have, found without starting anything."""
    has = {
        "CPUs": len(os.sched_getaffinity(0)),
        "GPUs": len(list(Path("/dev").glob("nvidia[0-9]*"))),
        "GiB of memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
    }
    faults = []
    for stage in stages:
        room = room_of(stage)
        each = {"CPUs": room["cpus_per_rank"], "GPUs": room["gpus_per_rank"], "GiB of memory": room["memory_gib"] or 0}
        for what, asked in each.items():
            if asked * room["ranks"] > has[what]:
                shape = f"{room['ranks']} ranks of {asked:g} {what}" if stage.kind.trains() else f"{asked:g} {what}"
                sentence = f"asks for {shape}; this machine has {has[what]:.3g}: ask for fewer, or set cluster.address"
                faults.append(Fault(f"stages.{stage.name}.resources", sentence))
    return faults


def lacks_in_cluster(stages: Iterable[Stage]) -> list[Fault]:
    """What stages ask for that the open session does not have. Ray counts CPUs and memory in its own way, and knows labels."""
    from cluster.room import Room, shortfall

    rooms = [Room(**room_of(stage)) for stage in stages]
    return [Fault(f"stages.{room.name}.resources", sentence) for room in rooms if (sentence := shortfall(room))]


def waits_for(stage: Stage) -> str:
    """What a stage that has not started is waiting for, as a sentence."""
    from cluster.room import Room, describe_wait

    return describe_wait(Room(**room_of(stage)))


def unshared(store: Store) -> list[Fault]:
    """The nodes of the joined cluster that do not share the store; a stage or a rank may be placed on any node.

    A file is written here, looked for on each node, and removed again.
    """
    from cluster.ray_session import ask_nodes

    folder = store.new_folder()
    probe = str(folder / "probe")

    def look() -> str | None:
        import os
        import tempfile

        if not os.path.exists(probe):
            return "does not see what is written there"
        try:
            with tempfile.TemporaryFile(dir=os.path.dirname(probe)):
                return None
        except OSError as error:
            return f"can't write there ({error})"

    try:
        Path(probe).touch()
        answers = ask_nodes(look, NODE_DEADLINE_S)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return [
        Fault("store.root", f"{store}: node {node} {answer}; expected a folder on storage that every node has at this same path")
        for node, answer in answers.items()
    ]
