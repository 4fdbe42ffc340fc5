"""Gates."""

from __future__ import annotations

import difflib

from pipelines.plan.graph import Stage
from pipelines.store.store import Action


def closed_gate(stage: Stage, action: Action) -> str | None:
    """Why what a stage made may not be read, as a sentence; None when it passes all its gates."""
    known = {name: points[-1][1] for name, points in action.curves.items() if points} | action.figures
    found = []
    remedy = ""
    for gate in stage.gates:
        value = known.get(gate.figure)
        if value is None:
            near = difflib.get_close_matches(gate.figure, known, n=1)
            there = f"perhaps {near[0]} is meant" if near else "there are " + ", ".join(sorted(known)) if known else "nor any other"
            found.append(f"it has no figure {gate.figure}, {there}")
        elif not gate.passes(value):
            shown = next(text for text in (f"{value:.6g}", repr(value)) if not gate.passes(float(text)))  # no rounding across the bound
            found.append(f"{gate.figure} is {shown}, wanted {gate.wanted()}")
            remedy = "train it longer or otherwise, or " if stage.kind.trains() else "change its settings or its inputs, or "
    return f"{stage.name}'s gate is closed: {', and '.join(found)}; {remedy}change the gate" if found else None
