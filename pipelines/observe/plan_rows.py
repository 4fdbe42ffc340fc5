"""What `gptline plan` prints: a row per stage, and how much there is to run."""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.observe.notation import clock_time, printable
from pipelines.plan.planner import Decision


def plan_lines(decisions: Sequence[Decision], about: str = "") -> list[str]:
    """A row for each stage with its notes below it, and a last line that sums them up. `about`: the pipeline file's own description."""
    stage_width = max((len(each.stage) for each in decisions), default=0)
    decision_width = max((len(each.action) for each in decisions), default=0)
    lines = []
    for each in decisions:
        lines.append(f"{each.stage:<{stage_width}}  {each.action:<{decision_width}}  {printable(each.reason)}".rstrip())
        lines += [f"{'':<{stage_width + decision_width + 4}}{printable(note)}" for note in each.notes]
    return [*lines, "", *forecast(decisions, about)]


def forecast(decisions: Sequence[Decision], about: str = "") -> list[str]:
    """How much there is to run. If the duration is not fully known, the pipeline file's description goes first: it may say."""
    unknown = any(each.expected_s is None for each in decisions if each.action not in ("reuse", "blocked"))
    return [*([about] if about and unknown else []), work_to_do(decisions)]


def work_to_do(decisions: Sequence[Decision]) -> str:
    """`3 of 9 stages to run, about 4:10`"""
    to_run = [each for each in decisions if each.action not in ("reuse", "blocked")]
    blocked = sum(each.action == "blocked" for each in decisions)
    if not to_run:
        return f"nothing to run: {f'{blocked} blocked' if blocked else 'every stage is reused'}"
    known = [each.expected_s for each in to_run if each.expected_s is not None]
    unknown = len(to_run) - len(known)
    about = f", about {clock_time(sum(known))}" if known else ""
    if unknown:
        about += f" plus {unknown} of unknown duration" if known else ", duration unknown"
    return f"{len(to_run)} of {len(decisions)} stages to run{about}" + (f"; {blocked} blocked" if blocked else "")
