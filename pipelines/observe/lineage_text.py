"""Writes a lineage for people: as a tree for the terminal, as a Mermaid flowchart, and as an HTML page with the picture."""

from __future__ import annotations

import json
import time
from typing import Any

from pipelines.observe.drawing import draw
from pipelines.observe.lineage import Lineage, Node, code_digest, leaves
from pipelines.observe.notation import escaped
from pipelines.observe.style import STYLE
from pipelines.observe.summary import summary
from pipelines.store.action import Action

SHORT = 12
"""Characters of a digest that are shown."""
MOST_SOURCES = 12
"""More source files than this are shown as one row."""
MOST_SETTINGS = 8
MOST_COUNTS = 6
_SOURCE_SETTINGS = ("files", "sources")
"""Settings that name source files, which have rows of their own."""
_COUNTED = ("parameters", "steps", "vocab_size", "empty_files", "replaced_characters")
"""Counts that an artifact's summary covers."""


def as_text(lineage: Lineage) -> str:
    """A tree: what each root was made from, down to the outside files, then what was made from it."""
    lines: list[str] = []
    shown: set[str] = set()
    for root in lineage.roots:
        lines += _branch(lineage, root, "", "", "", shown)
        if lineage.uses.get(root):
            lines += ["", f"made from {_title(lineage.nodes[root])}:"]
            lines += _uses(lineage, root, "", {root})
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def as_mermaid(lineage: Lineage) -> str:
    """A flowchart from the source files at the top to the newest artifacts at the bottom."""
    names = {digest: f"a{at}" for at, digest in enumerate(lineage.nodes)}
    lines = ["flowchart TD"]
    for digest, node in lineage.nodes.items():
        label = "<br/>".join(_label(text) for text in (node.stage, f"{node.title} {digest[:SHORT]}", _details(node)) if text)
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
    """One page without scripts: the picture, the tree, and the Mermaid source to copy."""
    roots = lineage.roots
    title = _title(lineage.nodes[roots[0]]) if len(roots) == 1 else f"{len(roots)} artifacts"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Lineage</title>\n<style>{STYLE}</style></head><body>\n'
        f'<main><h1>Lineage of {escaped(title)}</h1>\n<div class="scroll">{draw(lineage)}</div>\n'
        f'<pre class="whole">{escaped(as_text(lineage))}</pre>\n'
        f"<details><summary>Mermaid source</summary><pre>{escaped(as_mermaid(lineage))}</pre></details>\n</main></body></html>\n"
    )


# ---- the tree ----


def _branch(lineage: Lineage, digest: str, first: str, rest: str, parameter: str, shown: set[str]) -> list[str]:
    """An artifact with its makers, then its inputs. `first` begins its first line, `rest` all its other lines."""
    node = lineage.nodes[digest]
    head = f"{first}{parameter}{_title(node)}"
    if digest in shown:
        return [f"{head}  (shown above)"]
    shown.add(digest)
    inputs = lineage.inputs[digest]
    sources = _sources(node)
    bar = rest + ("│    " if inputs or sources else "     ")
    lines = [head, *(bar + fact for fact in _facts(node))]
    for at, (name, sha256) in enumerate(sources):
        last = at == len(sources) - 1 and not inputs
        lines.append(f"{rest}{'└─' if last else '├─'} source {name}" + (f"  sha256 {sha256[:SHORT]}" if sha256 else ""))
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
        # Several makings may have come to this output: take the newest one that read this input.
        makers = [maker for maker in lineage.nodes[each].makers if any(digest in given for given in maker.inputs.values())]
        when = f"  {_making(makers[0])}" if makers else ""
        lines.append(f"{indent}{'└─' if last else '├─'} {_title(lineage.nodes[each])}{when}{'  (shown above)' if known else ''}")
        if not known:
            lines += _uses(lineage, each, indent + ("   " if last else "│  "), shown)
    return lines


# ---- an artifact in words ----


def _title(node: Node) -> str:
    gone = "" if node.present else "(files deleted)"
    return "  ".join(part for part in (f"{node.title} {node.digest[:SHORT]}", node.stage, gone) if part)


def _facts(node: Node) -> list[str]:
    facts = [text for text in (_details(node), _licenses(node.metadata)) if text]
    if not node.makers:
        return [*facts, "this store has no record of how it was made"]
    newest = node.makers[0]
    for action in node.makers:
        facts.append(f"made {_making(action)}")
        if action is not newest and (changes := _changes(newest, action)):
            facts.append(f"  with {changes}")
    if settings := _settings(newest):
        facts.append(f"config {settings}")
    definitions = len(leaves(newest, "code."))
    code = f"code {code_digest(newest)[:SHORT]} ({definitions} definition{'s' if definitions != 1 else ''})" if definitions else ""
    software = [code, *(f"{name} {version}" for name, version in newest.versions.items())]
    return [*facts, *([", ".join(each for each in software if each)] if any(software) else [])]


def _making(action: Action) -> str:
    """When an action was carried out, by which run, in what time, on what."""
    started = time.strftime("%Y-%m-%d %H:%M", time.localtime(action.started_ms / 1000))
    ranks = action.operational.get("ranks")
    names = ("engine",) if action.operational.get("engine") == "torch" else ("engine", "zero_stage")  # torch has no ZeRO
    engine = [f"{name} {action.operational[name]}" for name in names if action.operational.get(name) is not None]
    parts = [f"{started} by run {action.run}", f"{action.seconds:.1f} s"]
    return ", ".join([*parts, *([f"{ranks} ranks"] if isinstance(ranks, int) and ranks > 1 else []), *engine])


def _changes(newest: Action, other: Action) -> str:
    """What was different when `other` made what `newest` made too."""
    names = [name for name in sorted(set(newest.leaves) | set(other.leaves)) if newest.leaves.get(name) != other.leaves.get(name)]
    settings = [_setting(name.removeprefix("config."), other.leaves.get(name)) for name in names if name.startswith("config.")]
    code = sum(name.startswith("code.") for name in names)
    return ", ".join([*settings[:MOST_SETTINGS], *([f"other code in {code} definition{'s' if code != 1 else ''}"] if code else [])])


def _settings(action: Action) -> str:
    """The settings in the key that have a value, on one line."""
    settings = [
        _setting(name, value)
        for name, value in leaves(action, "config.").items()
        if value not in (None, False, "", [], {}) and name.split(".")[0] not in _SOURCE_SETTINGS
    ]
    more = len(settings) - MOST_SETTINGS
    return ", ".join(settings[:MOST_SETTINGS]) + (f" and {more} more" if more > 0 else "")


def _setting(name: str, value: Any) -> str:
    """`lr = 0.001`, `delimiter = ","`: nearly as in a pipeline file."""
    return f"{name} = {json.dumps(value, ensure_ascii=False)}"


def _sources(node: Node) -> list[tuple[str, str]]:
    """(name, sha256) of the outside files that the newest maker read; many of them as one row without a sha256."""
    sources = list(node.makers[0].sources().items()) if node.makers else []
    return sources if len(sources) <= MOST_SOURCES else [(f"{len(sources):,} files, {sources[0][0]} to {sources[-1][0]}", "")]


def _details(node: Node) -> str:
    """The summary, further counts from the manifest, and what tells formats apart."""
    counted = summary(node.kind, node.metadata)
    counts = [
        f"{value:,} {name.replace('_', ' ')}"
        for name, value in node.metadata.items()
        if isinstance(value, int) and not isinstance(value, bool) and name not in _COUNTED
    ]
    known = [part.partition(" (")[0] for part in counted.split(", ")]
    further = [each for each in counts if each not in known][:MOST_COUNTS]
    formats = [f"{name.replace('_', ' ')} {node.metadata[name]}" for name in ("dtype", "chat_format") if name in node.metadata]
    return ", ".join(part for part in (counted, *further, *formats) if part)


def _licenses(metadata: dict[str, Any]) -> str:
    licenses = metadata.get("licenses") or metadata.get("license")
    names = [licenses] if isinstance(licenses, str) else list(licenses or [])
    return f"licence {', '.join(map(str, names))}" if names else ""


def _label(text: str) -> str:
    """Text for a Mermaid label: its special characters as Mermaid's entities, so that nothing ends the label or becomes markup."""
    return "".join(f"#{ord(letter)};" if letter in '"#;<>&|`[](){}\\' else " " if letter in "\n\r\t" else letter for letter in text)
