"""Draws the lineage as SVG: artifacts as boxes in layers from top to bottom, an arrow's line from each input to what was made from it.

An edge that skips layers gets a lane of its own in each, so that no line runs behind a box.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from pipelines.observe.lineage import Lineage, Node
from pipelines.observe.notation import escaped, shortened
from pipelines.observe.summary import summary

BOX_WIDTH, BOX_HEIGHT, GAP_X, GAP_Y = 170, 62, 22, 34
MOST_BOXES = 80
"""A lineage of more artifacts is not drawn."""
NAME_CHARS, TEXT_CHARS = 20, 24
"""What fits into a box."""

Slot = tuple[str, int]
"""A place in a layer: (digest, layer). In the artifact's own layer it holds the box, in a later one the lane of its edges."""


def draw(lineage: Lineage, link: Callable[[Node], str] = lambda node: "") -> str:
    """The picture; empty if there are too many artifacts. `link` gives the address that a box leads to, or nothing."""
    if not 0 < len(lineage.nodes) <= MOST_BOXES:
        return ""
    layout = _laid_out(lineage)
    width, height = layout.size()
    parts = [f'<svg class="graph" viewBox="0 0 {width} {height}" style="width:{width}px" role="img" aria-label="lineage">']
    parts += [f'<path d="{_path(layout, edge)}"/>' for edge in layout.edges]
    for digest, node in lineage.nodes.items():
        box, target = _box(layout, (digest, layout.depth[digest]), node), link(node)
        parts.append(f'<a href="{escaped(target)}">{box}</a>' if target else box)
    return "".join([*parts, "</svg>"])


@dataclass(frozen=True)
class _Layout:
    depth: dict[str, int]
    """Digest to the layer of its box, 0 at the top."""
    layers: list[list[Slot]]
    """From left to right."""
    column: dict[Slot, int]
    edges: list[list[Slot]]
    """Each the slots that an edge passes, its two boxes included."""

    def size(self) -> tuple[int, int]:
        widest = max(map(len, self.layers))
        return widest * (BOX_WIDTH + GAP_X) - GAP_X + 2, len(self.layers) * (BOX_HEIGHT + GAP_Y) - GAP_Y + 2

    def top(self, slot: Slot) -> float:
        return 1 + slot[1] * (BOX_HEIGHT + GAP_Y)

    def middle(self, slot: Slot) -> float:
        indent = (max(map(len, self.layers)) - len(self.layers[slot[1]])) / 2
        return 1 + (self.column[slot] + indent) * (BOX_WIDTH + GAP_X) + BOX_WIDTH / 2


def _laid_out(lineage: Lineage) -> _Layout:
    depth = _depths(lineage)
    layers: list[list[Slot]] = [[] for _ in range(max(depth.values()) + 1)]
    parents: dict[Slot, list[Slot]] = {}
    for digest in lineage.nodes:
        parents[digest, depth[digest]] = []
        layers[depth[digest]].append((digest, depth[digest]))
    edges: list[list[Slot]] = []
    for digest in lineage.nodes:
        for each in dict.fromkeys(each for _, each in lineage.inputs[digest]):
            lane = [(each, layer) for layer in range(depth[each], depth[digest])]
            for before, after in pairwise(lane):
                if after not in parents:
                    parents[after] = [before]
                    layers[after[1]].append(after)
            if lane:
                parents[digest, depth[digest]].append(lane[-1])
                edges.append([*lane, (digest, depth[digest])])
    column: dict[Slot, int] = {}
    for layer in layers:  # below the middle of what it was made from
        centre = {slot: (sum(column[each] for each in parents[slot]) / len(parents[slot]) if parents[slot] else 0.0) for slot in layer}
        layer.sort(key=lambda slot: (centre[slot], depth[slot[0]] != slot[1], slot[0]))
        column |= {slot: at for at, slot in enumerate(layer)}
    return _Layout(depth, layers, column, edges)


def _depths(lineage: Lineage) -> dict[str, int]:
    depth: dict[str, int] = {}

    def find(digest: str, above: frozenset[str]) -> int:
        if digest not in depth:
            inputs = [each for _, each in lineage.inputs[digest] if each not in above]
            depth[digest] = 1 + max((find(each, above | {digest}) for each in inputs), default=-1)
        return depth[digest]

    for digest in lineage.nodes:
        find(digest, frozenset())
    for digest in lineage.nodes:
        if not lineage.inputs[digest]:  # an artifact without inputs stands right above its first reader, or all would share the top row
            depth[digest] = max(0, min((depth[each] for each in lineage.uses[digest]), default=1) - 1)
    return depth


def _path(layout: _Layout, edge: list[Slot]) -> str:
    path = f"M{layout.middle(edge[0]):.0f},{layout.top(edge[0]) + BOX_HEIGHT:.0f}"
    for before, after in pairwise(edge):
        bend, to_x, to_y = layout.top(after) - GAP_Y / 2, layout.middle(after), layout.top(after)
        path += f" C{layout.middle(before):.0f},{bend:.0f} {to_x:.0f},{bend:.0f} {to_x:.0f},{to_y:.0f}"
        if after != edge[-1]:
            path += f" V{to_y + BOX_HEIGHT:.0f}"
    return path


def _box(layout: _Layout, slot: Slot, node: Node) -> str:
    x, y = layout.middle(slot) - BOX_WIDTH / 2, layout.top(slot)
    counts = summary(node.kind, node.metadata)
    artifact = f"{node.title} {node.digest[:8]}" if node.stage != node.title else node.digest[:12]
    texts = (
        (20, "name", shortened(node.stage or node.kind, NAME_CHARS)),
        (37, "", shortened(artifact, TEXT_CHARS)),
        (53, "", shortened(counts.partition(" (")[0].partition(", ")[0], TEXT_CHARS)),
    )
    rows = "".join(
        f'<text class="{style}" x="{x + 11:.0f}" y="{y + down:.0f}">{escaped(text)}</text>' for down, style, text in texts if text
    )
    title = f"{node.title} sha256:{node.digest}" + (f": {counts}" if counts else "")
    rectangle = f'<rect x="{x:.0f}" y="{y:.0f}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="7"/>'
    return f"<g><title>{escaped(title)}</title>{rectangle}{rows}</g>"
