"""The texts that MLflow shows of a run: its source, its table of stages, a stage's description."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping

from pipelines.observe.view import RunView, StageView

NOTE_CHARS = 7900


def source_name(command: str) -> str:
    """The command with the folders left out of its words: MLflow's list shows only what follows the last slash.

    `gptline run configs/small/line.toml --set tracking.uri=http://host:5000` becomes `gptline run line.toml --set tracking.uri=host:5000`.
    """
    try:
        words = shlex.split(command)
    except ValueError:
        words = command.split()
    return " ".join(re.sub(r"[^=/]*/", "", word.rstrip("/")) for word in words)


def stage_table(view: RunView, experiment: str, run_ids: Mapping[str, str | None]) -> str:
    """The parent's description: a row for every stage, since MLflow's own page lists only the ten newest children."""
    for reason_chars in (200, 80, 0):
        rows = ["| stage | decision | why | seconds | output |", "| --- | --- | --- | ---: | --- |"]
        for stage in view.stages.values():
            run_id = run_ids.get(stage.name)
            name = link(stage.name, experiment, run_id) if run_id else stage.name
            status = "" if stage.status in ("planned", "running", "done", "reused", "blocked") else f", {stage.status}"
            seconds = "" if stage.seconds is None else f"{stage.seconds:.1f}"
            why = _cell(stage.error or stage.reason)[:reason_chars]
            rows.append(f"| {name} | {stage.decision}{status} | {why} | {seconds} | {stage.output[:12]} |")
        table = "\n".join(rows)
        if len(table) <= NOTE_CHARS:
            break
    return table


def stage_note(stage: StageView, summary: str, maker: str) -> str:
    """A child's description. `maker`: the run that made a reused output, as text or as a link."""
    parts = [f"**{stage.decision}**: {stage.reason}" if stage.reason else f"**{stage.decision}**", stage.error, summary]
    parts += [f"made by {maker}" if maker else "", *(f"- {note}" for note in stage.notes)]
    return "\n\n".join(part for part in parts if part)[:NOTE_CHARS]


def link(text: str, experiment: str, run_id: str) -> str:
    return f"[{text}](#/experiments/{experiment}/runs/{run_id}?workflowType=machine_learning)"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
