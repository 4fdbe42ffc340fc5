"""The graph of actions in both directions: what an artifact was made from, down to the outside files, and what was made from it.

    lineage = trace(store, digest)      # `gptline lineage model:line@newest`

An artifact may have several makers: a `rerun` can come to the same bytes. The newest stands first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from cluster.commit import canonical_json
from pipelines.store.action import Action
from pipelines.store.store import Store


@dataclass(frozen=True)
class Node:
    """One artifact."""

    digest: str
    kind: str
    """Its type, as the manifest has it."""
    metadata: dict[str, Any]
    makers: tuple[Action, ...]
    """Newest first; empty when no action of this store made it."""
    present: bool = True
    """False if its files are gone and only records of it are left."""

    @property
    def stage(self) -> str:
        """The stage that made it last."""
        return self.makers[0].stage if self.makers else ""

    @property
    def title(self) -> str:
        """Its type, and a model's role: `reward model`."""
        return f"{self.metadata['role']} {self.kind}" if "role" in self.metadata else self.kind


@dataclass(frozen=True)
class Lineage:
    roots: tuple[str, ...]
    """The digests that were asked for."""
    nodes: dict[str, Node]
    inputs: dict[str, tuple[tuple[str, str], ...]]
    """Digest to the (parameter, digest) pairs that its makers were given, each once."""
    uses: dict[str, tuple[str, ...]]
    """Digest to the digests of what was made from it."""


def code_digest(action: Action) -> str:
    """One digest for all the definitions in an action's key."""
    return hashlib.sha256(canonical_json(leaves(action, "code."))).hexdigest()


def leaves(action: Action, area: str) -> dict[str, Any]:
    """The leaves of an action's key whose names begin with `area`, without it: `leaves(action, "config.")`."""
    return {name.removeprefix(area): value for name, value in sorted(action.leaves.items()) if name.startswith(area)}


def trace(store: Store, digest: str) -> Lineage:
    """Everything that an artifact was made from and everything that was made from it."""
    return trace_all(store, [digest])


def trace_all(store: Store, digests: Iterable[str], downstream: bool = True) -> Lineage:
    """Like `trace`, for several artifacts; without `downstream`, only what they were made from."""
    makers: dict[str, list[Action]] = {}
    uses: dict[str, tuple[str, ...]] = {}

    def inputs_of(digest: str) -> list[tuple[str, str]]:
        if digest not in makers:
            makers[digest] = store.index.makers(digest)
        return list(dict.fromkeys((name, each) for action in makers[digest] for name, given in action.inputs.items() for each in given))

    def outputs_of(digest: str) -> tuple[str, ...]:
        if digest not in uses:
            uses[digest] = tuple(dict.fromkeys(action.output for action in store.index.users(digest)))
        return uses[digest]

    roots = tuple(dict.fromkeys(digests))
    reached = set(_reachable(roots, lambda digest: [each for _, each in inputs_of(digest)]))
    if downstream:
        reached |= set(_reachable(roots, outputs_of))
    inputs = {digest: tuple(pair for pair in inputs_of(digest) if pair[1] in reached) for digest in sorted(reached)}
    nodes = {digest: _node(store, digest, makers[digest]) for digest in inputs}
    return Lineage(roots, nodes, inputs, {digest: tuple(each for each in outputs_of(digest) if each in reached) for digest in nodes})


def _reachable(roots: Iterable[str], neighbours: Callable[[str], Iterable[str]]) -> Iterator[str]:
    seen: set[str] = set()
    waiting = list(roots)
    while waiting:
        digest = waiting.pop()
        if digest not in seen:
            seen.add(digest)
            yield digest
            waiting += neighbours(digest)


def _node(store: Store, digest: str, makers: list[Action]) -> Node:
    manifest = store.manifest(digest)
    kind = manifest["kind"] if manifest else makers[0].output_kind if makers else "artifact"
    return Node(digest, kind, manifest["metadata"] if manifest else {}, tuple(makers), manifest is not None)
