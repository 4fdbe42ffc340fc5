"""Gates: whether what a stage made may be read by other stages."""

from __future__ import annotations

import difflib

from pipelines.plan.graph import Stage
from pipelines.store.action import Action


def closed_gate(stage: Stage, action: Action) -> str | None:
    """Return the sentence that says why a stage's output may not be read, or None if it passes all its gates."""
    known = {name: points[-1].value for name, points in action.curves.items() if points} | action.figures
    reasons = []
    remedy = ""
    for gate in stage.gates:
        value = known.get(gate.figure)
        if value is None:
            near = difflib.get_close_matches(gate.figure, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"its figures: {', '.join(sorted(known)) or 'none'}"
            reasons.append(f"it has no figure {gate.figure} ({hint})")
        elif not gate.passes(value):
            shown = next(text for text in (f"{value:.6g}", repr(value)) if not gate.passes(float(text)))  # no rounding across the bound
            reasons.append(f"{gate.figure} is {shown}, expected {gate.bounds()}")
            remedy = "train it longer or otherwise, or " if stage.kind.trains() else "change its settings or its inputs, or "
    return f"{stage.name}'s gate is closed: {', and '.join(reasons)}; {remedy}change the gate" if reasons else None
