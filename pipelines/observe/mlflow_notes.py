"""The texts that MLflow shows of a run: its source, its table of stages, a stage's description."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping

from pipelines.observe.notation import shortened
from pipelines.observe.view import RunView, StageView

NOTE_CHARS = 7900
NAME_CHARS = 120
SLASH = "\N{DIVISION SLASH}"


def source_name(command: str) -> str:
    """The command without a slash, since MLflow's list shows only what follows the last one.

    Folders are left out of paths, so that the file's name comes early; elsewhere the slash becomes a character that looks like it:
    `gptline run configs/line.toml --set tracking.uri=http://host:5000` becomes `gptline run line.toml --set tracking.uri=http:∕∕host:5000`.
    """
    try:
        words = shlex.split(command)
    except ValueError:
        words = command.split()
    return " ".join(_without_slash(word) for word in words)


def _without_slash(word: str) -> str:
    name, equals, value = word.rpartition("=")
    is_path = re.fullmatch(r"[^\[\]{}\"',:]+", value)
    short = value.rstrip("/").rpartition("/")[2] if is_path else value
    return f"{name}{equals}{short}".replace("/", SLASH)


def run_name(view: RunView) -> str:
    """`6415cc net lr: 0.001 -> 0.0005`: the end of the run's id, by which `gptline status` knows it, and what made it differ.

    The id by itself would not do: it begins with the date and the pipeline, and MLflow's list cuts it there.
    """
    planned = [stage for stage in view.stages.values() if stage.decision not in ("", "reuse", "blocked")]
    causes = [stage for stage in planned if not stage.reason.startswith("its input ")]
    if not causes:
        why = "all reused" if view.stages else ""
    elif len(causes) > 1 and len({stage.reason for stage in causes}) == 1:
        why = f"{len(causes)} stages {causes[0].reason}"
    else:
        why = f"{causes[0].name} {causes[0].reason}" + (f", and {len(causes) - 1} more" if len(causes) > 1 else "")
    return shortened(f"{_tail(view)} {why}".rstrip(), NAME_CHARS)


def stage_name(view: RunView, stage: str) -> str:
    """`net 6415cc`, or `net 6415cc (reused)`: runs of one stage are compared side by side, where their parents aren't shown."""
    return f"{stage} {_tail(view)}" + (" (reused)" if view.stage(stage).status == "reused" else "")


def _tail(view: RunView) -> str:
    return view.run.rpartition("-")[2]


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
