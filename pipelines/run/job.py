"""What a driver sends to a stage's process and what comes back: plain data, which can be pickled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cluster.events import Curves
from pipelines.plan.config import Resources
from pipelines.plan.graph import Graph, Stage
from pipelines.plan.planner import Decision, identity
from pipelines.plan.snapshot import Snapshot
from pipelines.stage import Source


@dataclass(frozen=True)
class Job:
    """Everything that the process of a stage needs."""

    run: str
    stage: str
    uses: str
    user_folder: Path
    """The folder that a `uses` which names a file is relative to."""
    functions: Mapping[str, str]
    """The user's functions: as the config names them, to where they are, relative to `user_folder`."""
    config: dict[str, Any]
    inputs: dict[str, list[str]]
    """Parameter name to the digests of its artifacts."""
    sources: list[Source]
    seed: int
    store: Path
    key: str
    series: int
    resources: Resources
    identity: dict[str, Any]
    """What a checkpoint must have in common with the gang that loads it; empty for stages that do not train."""
    inline: bool


@dataclass(frozen=True)
class Outcome:
    """How a stage ended: with an output, stopped, or with an error."""

    output: str | None = None
    output_kind: str | None = None
    stopped: bool = False
    error: str | None = None
    """One paragraph for people."""
    traceback: str | None = None
    figures: dict[str, float] = field(default_factory=dict)
    curves: Curves = field(default_factory=dict)
    restarts: int = 0
    resumed_from_step: int | None = None
    host: str | None = None
    """Where it ran, with which pid and which versions; None and empty if its process never got that far."""
    pid: int | None = None
    versions: dict[str, str] = field(default_factory=dict)


def make_job(run: str, graph: Graph, stage: Stage, decision: Decision, store: Path, snapshot: Snapshot | None) -> Job:
    """The job of a decided stage. Its code comes from the snapshot; None: from the working tree, for a stage that runs inline."""
    assert decision.key is not None
    inline = snapshot is None
    planned = {name.removeprefix("source."): digest for name, digest in decision.leaves.items() if name.startswith("source.")}
    moved = {} if snapshot is None else snapshot.references
    return Job(
        run=run,
        stage=stage.name,
        uses=moved.get(stage.kind.uses, stage.kind.uses),
        user_folder=graph.loaded.folder(stage.name) if snapshot is None else snapshot.user,
        functions={each.reference: moved.get(each.reference, each.reference) for each in stage.user_code},
        config=stage.config.model_dump(mode="json"),
        inputs=decision.inputs,
        sources=[replace(source, sha256=planned[source.name]) for source in stage.sources],
        seed=graph.loaded.file.seed,
        store=store,
        key=decision.key,
        series=decision.series,
        resources=stage.resources,
        identity=identity(stage, inline=inline) if stage.kind.trains() else {},
        inline=inline,
    )
