"""Which held-out records are trained on all the same, for `gptline overlap`: an evaluation on them measures memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pipelines.artifacts import Records
from pipelines.plan.environment import ROOT
from pipelines.plan.graph import Graph
from pipelines.plan.planner import Planner
from pipelines.stage import StageFailure
from pipelines.store.store import Store

if TYPE_CHECKING:
    from pipelines.ingest.overlap import Overlap


def overlap_lines(graph: Graph, store: Store) -> list[str]:
    """For each stage that holds records out, and each stage whose records are trained on: how many of them stand in both.

    StageFailure if no artifact of records exists yet.
    """
    from pipelines.ingest.overlap import overlap

    outputs = {each.stage: each.output for each in Planner(graph, store, ROOT).plan() if each.output}
    records = {name: artifact for name, digest in outputs.items() if isinstance(artifact := store.artifact(digest), Records)}
    if not records:
        raise StageFailure("no stage's records exist yet; `gptline run` builds them")
    readers = training_readers(graph)
    trained_on = [name for name in records if readers.get(name)]
    lines: list[str] = []
    for name, artifact in records.items():
        found = dict(zip(trained_on, overlap(artifact, [records[each] for each in trained_on]), strict=True))
        lines += _lines(name, found, readers)
    missing = [name for name in graph.stages if issubclass(graph.stages[name].kind.output, Records) and name not in records]
    if missing:
        lines.append(f"not compared, since they are not built yet: {', '.join(missing)}")
    return lines or ["no stage holds records out"]


def training_readers(graph: Graph) -> dict[str, list[str]]:
    """Each stage of records to the training stages that read it, directly or through others."""
    readers: dict[str, list[str]] = {}
    for stage in graph.stages.values():
        if stage.kind.trains():
            for name in graph.needed([stage.name]) - {stage.name}:
                if issubclass(graph.stages[name].kind.output, Records):
                    readers.setdefault(name, []).append(stage.name)
    return readers


def _lines(name: str, found: dict[str, Overlap], readers: dict[str, list[str]]) -> Iterator[str]:
    held_out = max((each.held_out for each in found.values()), default=0)
    if not held_out:
        return
    overlapping = {other: each for other, each in found.items() if each.equal + each.contained}
    if not overlapping:
        yield f"{name}: none of its {held_out:,} held-out records is in the training records of {', '.join(found)}"
    for other, each in overlapping.items():
        count = each.equal + each.contained
        yield (
            f"{name}: {count:,} of its {held_out:,} held-out records ({each.share:.1%}) are in the training records of {other}, "
            f"which {' and '.join(readers[other])} read{'s' if len(readers[other]) == 1 else ''} "
            f"({each.equal:,} as a whole, {each.contained:,} inside another text)"
        )
        yield from (f"    {example!r}" for example in each.examples)
