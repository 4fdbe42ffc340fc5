"""The graph of actions, both ways: where an artifact came from, down to what was read from outside, and what was made of it.

    gptline lineage model:line@newest

One artifact may have several makers (a `rerun` that came out the same): all are shown, the newest first.
"""

from __future__ import annotations

import hashlib
import html
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from cluster.commit import canonical_json
from pipelines.store.action import Action
from pipelines.store.store import Store

SHORT = 12
MOST_SOURCES = 12
"""More source files than this are summed up."""
MOST_SETTINGS = 8
_QUIET_SETTINGS = ("files", "sources")
"""Settings that name sources, which have their own rows."""


@dataclass(frozen=True)
class Node:
    digest: str
    kind: str
    metadata: dict[str, Any]
    makers: tuple[Action, ...]
    """Newest first; empty when no action of this store made it."""
    present: bool = True
    """False: only records speak of it, the files are gone."""

    @property
    def stage(self) -> str:
        return self.makers[0].stage if self.makers else ""

    @property
    def what(self) -> str:
        """Its kind, a model's with its role: `reward model`."""
        return f"{self.metadata['role']} {self.kind}" if "role" in self.metadata else self.kind


@dataclass(frozen=True)
class Lineage:
    roots: tuple[str, ...]
    """Digests that were asked for."""
    nodes: dict[str, Node]
    inputs: dict[str, tuple[tuple[str, str], ...]]
    """Digest to the (parameter, digest) pairs of all its makers, each once."""
    uses: dict[str, tuple[str, ...]]
    """Digest to what was made of it."""


def code_digest(action: Action) -> str:
    """One digest over all the definitions in an action's key."""
    return hashlib.sha256(canonical_json(_leaves(action, "code."))).hexdigest()


def trace(store: Store, digest: str) -> Lineage:
    """Everything that `digest` was made from and everything that was made of it."""
    return trace_all(store, [digest])


def trace_all(store: Store, digests: Iterable[str], downstream: bool = True) -> Lineage:
    """As `trace`, for several artifacts; without `downstream` only what they were made from."""
    makers: dict[str, list[Action]] = {}
    uses: dict[str, tuple[str, ...]] = {}

    def inputs_of(digest: str) -> list[tuple[str, str]]:
        """The (parameter, digest) pairs of all makers, each once."""
        if digest not in makers:
            makers[digest] = store.index.makers(digest)
        return list(dict.fromkeys((name, each) for action in makers[digest] for name, given in action.inputs.items() for each in given))

    def outputs_of(digest: str) -> tuple[str, ...]:
        if digest not in uses:
            uses[digest] = tuple(dict.fromkeys(action.output for action in store.index.users(digest)))
        return uses[digest]

    roots = tuple(dict.fromkeys(digests))
    reached = set(_reach(roots, lambda digest: [each for _, each in inputs_of(digest)]))
    if downstream:
        reached |= set(_reach(roots, outputs_of))
    inputs = {digest: tuple(pair for pair in inputs_of(digest) if pair[1] in reached) for digest in sorted(reached)}
    nodes = {digest: _node(store, digest, makers[digest]) for digest in inputs}
    return Lineage(roots, nodes, inputs, {digest: tuple(each for each in outputs_of(digest) if each in reached) for digest in nodes})


def as_text(lineage: Lineage) -> str:
    """A tree for the terminal: first down to the files from outside, then what was made of each root."""
    lines: list[str] = []
    shown: set[str] = set()
    for root in lineage.roots:
        lines += _branch(lineage, root, "", "", "", shown)
        if lineage.uses.get(root):
            lines += ["", f"made of {_title(lineage.nodes[root])}:"]
            lines += _uses(lineage, root, "", {root})
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def as_mermaid(lineage: Lineage) -> str:
    """A flowchart from the sources at the top to what was made at the bottom."""
    names = {digest: f"a{at}" for at, digest in enumerate(lineage.nodes)}
    lines = ["flowchart TD"]
    for digest, node in lineage.nodes.items():
        label = "<br/>".join(_label(text) for text in (node.stage, f"{node.what} {digest[:SHORT]}", _counts(node.metadata)) if text)
        shape = ('(["', '"])') if digest in lineage.roots else ('["', '"]')
        lines.append(f"    {names[digest]}{shape[0]}{label}{shape[1]}")
    for digest, pairs in lineage.inputs.items():
        lines += [f'    {names[each]} -->|"{_label(name)}"| {names[digest]}' for name, each in pairs]
    sources = 0
    for digest, node in lineage.nodes.items():
        for name, _ in _sources(node):
            lines.append(f'    s{sources}[("{_label(name)}")] --> {names[digest]}')
            sources += 1
    return "\n".join(lines) + "\n"


def as_html(lineage: Lineage) -> str:
    """The same tree as one page without scripts, with the Mermaid source to copy."""
    title = ", ".join(_title(lineage.nodes[root]) for root in lineage.roots) or "nothing"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Lineage</title>\n'
        "<style>:root{color-scheme:light dark}body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 1rem}"
        "pre{overflow:auto;font:13px/1.5 ui-monospace,monospace}</style></head><body>\n"
        f"<h1>Lineage of {html.escape(title)}</h1>\n<pre>{html.escape(as_text(lineage))}</pre>\n"
        f"<details><summary>Mermaid</summary><pre>{html.escape(as_mermaid(lineage))}</pre></details>\n</body></html>\n"
    )


def _reach(roots: Iterable[str], following: Any) -> Iterator[str]:
    seen: set[str] = set()
    waiting = list(roots)
    while waiting:
        digest = waiting.pop()
        if digest not in seen:
            seen.add(digest)
            yield digest
            waiting += following(digest)


def _node(store: Store, digest: str, makers: list[Action]) -> Node:
    manifest = store.manifest(digest)
    kind = manifest["kind"] if manifest else makers[0].output_kind if makers else "artifact"
    return Node(digest, kind, manifest["metadata"] if manifest else {}, tuple(makers), manifest is not None)


def _branch(lineage: Lineage, digest: str, first: str, rest: str, parameter: str, shown: set[str]) -> list[str]:
    """One artifact with its makers, then its inputs; `first` and `rest` are what stands before its first and its other lines."""
    node = lineage.nodes[digest]
    head = f"{first}{parameter}{_title(node)}"
    if digest in shown:
        return [f"{head}  (shown above)"]
    shown.add(digest)
    inputs = lineage.inputs[digest]
    sources = _sources(node)
    bar = rest + ("│    " if inputs or sources else "     ")
    lines = [head, *(bar + fact for fact in _facts(node))]
    below = [*((f"source {name}  sha256 {sha256[:SHORT]}" if sha256 else f"source {name}") for name, sha256 in sources)]
    for at, text in enumerate(below):
        last = at == len(below) - 1 and not inputs
        lines.append(f"{rest}{'└─' if last else '├─'} {text}")
    for at, (name, each) in enumerate(inputs):
        last = at == len(inputs) - 1
        lines += _branch(lineage, each, f"{rest}{'└─' if last else '├─'} ", rest + ("   " if last else "│  "), f"{name}: ", shown)
    return lines


def _uses(lineage: Lineage, digest: str, indent: str, shown: set[str]) -> list[str]:
    lines = []
    made = lineage.uses.get(digest, ())
    for at, each in enumerate(made):
        last = at == len(made) - 1
        known = each in shown
        shown.add(each)
        # an output that several makings came to: the newest one that read this input
        makers = [maker for maker in lineage.nodes[each].makers if any(digest in given for given in maker.inputs.values())]
        when = f"  {_when(makers[0])}" if makers else ""
        lines.append(f"{indent}{'└─' if last else '├─'} {_title(lineage.nodes[each])}{when}{'  (shown above)' if known else ''}")
        if not known:
            lines += _uses(lineage, each, indent + ("   " if last else "│  "), shown)
    return lines


def _title(node: Node) -> str:
    return "  ".join(part for part in (f"{node.what} {node.digest[:SHORT]}", node.stage, "" if node.present else "(files gone)") if part)


def _facts(node: Node) -> list[str]:
    facts = [text for text in (_counts(node.metadata), _licenses(node.metadata)) if text]
    if not node.makers:
        return [*facts, "made outside of what this store has records of"]
    newest = node.makers[0]
    for action in node.makers:
        facts.append(f"made {_when(action)}")
        if action is not newest and (changed := _changed(newest, action)):
            facts.append(f"  there with {changed}")
    settings = _settings(newest)
    if settings:
        facts.append(f"config {settings}")
    code = _leaves(newest, "code.")
    versions = ", ".join(f"{name} {version}" for name, version in newest.versions.items())
    parts = [f"code {code_digest(newest)[:SHORT]} ({len(code)} definition{'s' if len(code) != 1 else ''})" if code else "", versions]
    facts += [text for text in (", ".join(part for part in parts if part),) if text]
    return facts


def _when(action: Action) -> str:
    made = time.strftime("%Y-%m-%d %H:%M", time.localtime(action.started_ms / 1000))
    with_what = ", ".join(
        f"{name} {action.operational[name]}" for name in ("engine", "zero_stage") if action.operational.get(name) is not None
    )
    ranks = action.operational.get("ranks")
    ranked = f", {ranks} ranks" if isinstance(ranks, int) and ranks > 1 else ""
    return f"{made} by run {action.run}, {action.seconds:.1f} s{ranked}{', ' + with_what if with_what else ''}"


def _changed(newest: Action, other: Action) -> str:
    names = [name for name in sorted(set(newest.leaves) | set(other.leaves)) if newest.leaves.get(name) != other.leaves.get(name)]
    settings = [f"{name.removeprefix('config.')} {other.leaves.get(name)}" for name in names if name.startswith("config.")]
    code = sum(name.startswith("code.") for name in names)
    return ", ".join([*settings[:MOST_SETTINGS], *([f"other code in {code} definition{'s' if code != 1 else ''}"] if code else [])])


def _settings(action: Action) -> str:
    """The config in the key, one line of it: what is set to something, shortest names first come first."""
    settings = {
        name: value
        for name, value in _leaves(action, "config.").items()
        if value not in (None, False, "", [], {}) and name.split(".")[0] not in _QUIET_SETTINGS
    }
    words = [f"{name} {value}" for name, value in settings.items()]
    more = len(words) - MOST_SETTINGS
    return ", ".join(words[:MOST_SETTINGS]) + (f" and {more} more" if more > 0 else "")


def _sources(node: Node) -> list[tuple[str, str]]:
    """(name, sha256) of the outside files that the newest maker read; many are summed up in one."""
    if not node.makers:
        return []
    sources = [(name, str(value)) for name, value in _leaves(node.makers[0], "source.").items()]
    return sources if len(sources) <= MOST_SOURCES else [(f"{len(sources):,} files, {sources[0][0]} to {sources[-1][0]}", "")]


def _counts(metadata: dict[str, Any]) -> str:
    """The whole numbers that a manifest tells, such as documents and bytes."""
    counts = {name: value for name, value in metadata.items() if isinstance(value, int) and not isinstance(value, bool)}
    words = [f"{name.replace('_', ' ')} {metadata[name]}" for name in ("dtype", "chat_format") if name in metadata]
    return ", ".join([*words, *(f"{value:,} {name.replace('_', ' ')}" for name, value in list(counts.items())[:6])])


def _licenses(metadata: dict[str, Any]) -> str:
    licenses = metadata.get("licenses") or metadata.get("license")
    names = [licenses] if isinstance(licenses, str) else list(licenses or [])
    return f"licence {', '.join(map(str, names))}" if names else ""


def _leaves(action: Action, area: str) -> dict[str, Any]:
    return {name.removeprefix(area): value for name, value in sorted(action.leaves.items()) if name.startswith(area)}


def _label(text: str) -> str:
    """Mermaid reads its own entities inside quotes, and nothing else there ends a label or becomes markup."""
    return "".join(f"#{ord(letter)};" if letter in '"#;<>&|`[](){}\\' else " " if letter in "\n\r\t" else letter for letter in text)
