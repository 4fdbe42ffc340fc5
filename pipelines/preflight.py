"""Is there room for what will run? Asked before a stage starts: a shortage is said at once, and never waited for in silence."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipelines.config import Fault
from pipelines.graph import Stage
from pipelines.store import Store

NODE_DEADLINE_S = 60.0


def room_of(stage: Stage) -> dict[str, Any]:
    """What a stage holds of the machines: a gang's ranks, or one process; the fields of `cluster.room.Room`."""
    given = stage.resources
    where: dict[str, Any] = {"memory_gib": given.memory_gib, "labels": given.labels, "accelerator": given.accelerator}
    if stage.kind.trains():
        shape = {"ranks": given.ranks, "cpus_per_rank": given.cpus_per_rank, "gpus_per_rank": given.gpus_per_rank}
    else:
        shape = {"ranks": 1, "cpus_per_rank": given.cpus, "gpus_per_rank": given.gpus}
    return {"name": stage.name, **shape, **where}


def lacks_here(stages: Iterable[Stage]) -> list[Fault]:
    """What this machine can never hold; seen without starting anything."""
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
    """What the session that was opened, here or elsewhere, can never hold: Ray counts CPUs and memory in its own way, and knows labels."""
    from cluster.room import Room, shortfall

    rooms = [Room(**room_of(stage)) for stage in stages]
    return [Fault(f"stages.{room.name}.resources", sentence) for room in rooms if (sentence := shortfall(room))]


def waits_for(stage: Stage) -> str:
    """What a stage that has not begun waits for, as a sentence."""
    from cluster.room import Room, describe_wait

    return describe_wait(Room(**room_of(stage)))


def unshared(store: Store) -> list[Fault]:
    """The nodes of the cluster that was joined which do not share the store: any of them may be given a stage, or a gang's rank.

    A file is written here and looked for on each; it is gone afterwards.
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
        Fault("store.root", f"{store.root}: node {node} {answer}; wanted a folder on storage that every node has at this same path")
        for node, answer in answers.items()
    ]
