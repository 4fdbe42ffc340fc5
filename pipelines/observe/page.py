"""A run's page: one HTML file without scripts or outside parts, made from the journal and the action records.

It opens from a disk, a mail or MLflow's artifact view, in a light or a dark window, and prints. Everything that comes from data is escaped.
Its order: what was run, the stages, their lineage, then stage by stage the figures, curves and samples, and last the config.
"""

from __future__ import annotations

import json
import math
import re
import time
from typing import Any

from cluster.events import Curves
from pipelines.observe.charts import curve_section
from pipelines.observe.drawing import draw
from pipelines.observe.lineage import Lineage, Node, trace_all
from pipelines.observe.lineage_text import as_mermaid
from pipelines.observe.meanings import EVALUATED_BESIDE, meaning, order
from pipelines.observe.notation import duration, escaped, number
from pipelines.observe.style import STYLE
from pipelines.observe.summary import summary
from pipelines.observe.view import RunView, StageView, run_view
from pipelines.store.action import Action
from pipelines.store.runs import RunFolder, RunRecord
from pipelines.store.store import Store

MOST_SAMPLES = 12
ANSWER_COLUMNS = {
    "prompt": "asked",
    "reference": "right",
    "answer": "this model, most likely",
    "drawn": "this model, sampled",
    "baseline": "baseline, most likely",
    "baseline_drawn": "baseline, sampled",
    "score": "score of the sample",
}
CODERS = (
    ("eval/bits_per_byte", "this model", "predicts held-out text it has never seen"),
    ("eval/ppmd_bits_per_byte", "PPMd", "a statistical coder that has read the training text first"),
    ("eval/xz_bits_per_byte", "xz -9e", "compresses only the held-out text"),
)
"""What the model's bits per byte are compared with: figure, label, explanation."""


def render(store: Store, run: str) -> str:
    """The whole page as HTML."""
    view = run_view(store, run)
    actions = {name: action for name, stage in view.stages.items() if (action := _action(store, stage)) is not None}
    record = RunFolder(store, run).record()
    lineage = trace_all(store, [stage.output for stage in view.stages.values() if stage.output], downstream=False)
    results = {name: shown for name, stage in view.stages.items() if (shown := _results(store, stage, actions.get(name)))}
    targets = {name: f"#{_anchor(name)}" for name in view.stages}
    sections = [
        _header(view, record),
        _contents(lineage, results, targets),
        _stages(view, actions, lineage, results),
        _lineage(lineage, targets),
        *(f'<div id="{_anchor(name)}">{shown}</div>' for name, shown in results.items()),
        _settings(view, record, actions),
    ]
    title = f"{view.pipeline or record.pipeline} {view.status.lower()}"
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escaped(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + f"\n<footer>Made by gptline from the run's journal and its action records. {escaped(run)}</footer>\n</main>\n</body>\n</html>\n"
    )


def _action(store: Store, stage: StageView) -> Action | None:
    if not stage.key or stage.number is None:
        return None
    try:
        return store.action(stage.key, stage.number)
    except KeyError:
        return None


def _anchor(stage: str) -> str:
    return "stage-" + "".join(letter if letter.isalnum() else "-" for letter in stage)


def _results(store: Store, stage: StageView, action: Action | None) -> str:
    """What a stage has to show beside its row in the table."""
    if action is None:
        return curve_section(stage.name, stage.curves)
    # The action's curves are complete. The journal of a run that reused it has none of them.
    curves: Curves = action.curves or stage.curves
    parts = [_comparison(stage.name, action), _figures(stage.name, action), curve_section(stage.name, curves)]
    return "".join([*parts, _samples(store, stage.name, action)])


# ---- what was run ----


def _header(view: RunView, record: RunRecord) -> str:
    started_ms = view.started_ms or record.started_ms
    took_s = view.seconds()
    counts: dict[str, int] = {}
    for stage in view.stages.values():
        state = {"done": "made"}.get(stage.status, stage.status)
        counts[state] = counts.get(state, 0) + 1
    facts = [
        ("When", time.strftime("%d %B %Y, %H:%M %Z", time.localtime(started_ms / 1000)) if started_ms else ""),
        ("Forecast", duration(view.forecast_s) if view.forecast_s else ""),
        ("Took", "" if took_s is None else duration(took_s)),
        ("Stages", ", ".join(f"{count} {state}" for state, count in counts.items())),
        ("Where", " on ".join(part for part in (view.user or record.user, view.host or record.host) if part)),
        ("Run", view.run),
        ("Command", view.command or record.command),
    ]
    rows = "".join(
        f"<div{' class=wide' if name in ('Run', 'Command') else ''}><dt>{name}</dt><dd>{escaped(value)}</dd></div>"
        for name, value in facts
        if value
    )
    text = f'<p class="lead">{escaped(view.text)}</p>' if view.text else ""
    status = view.status.lower()
    return (
        f'<header><p class="eyebrow">gptline run</p><h1>{escaped(view.pipeline or record.pipeline or view.run)} '
        f'<span class="pill {status}">{status}</span></h1>{text}<dl class="facts">{rows}</dl></header>'
    )


def _contents(lineage: Lineage, results: dict[str, str], targets: dict[str, str]) -> str:
    links = [("#stages", "Stages"), *([("#lineage", "Lineage")] if lineage.nodes else [])]
    links += [(targets[name], name) for name in results]
    links.append(("#config", "Config and versions"))
    return "<nav>" + "".join(f'<a href="{escaped(target)}">{escaped(text)}</a>' for target, text in links) + "</nav>"


def _stages(view: RunView, actions: dict[str, Action], lineage: Lineage, results: dict[str, str]) -> str:
    rows = []
    for name, stage in view.stages.items():
        action = actions.get(name)
        title = f'<a href="#{_anchor(name)}">{escaped(name)}</a>' if name in results else escaped(name)
        anchor = "" if name in results else f' id="{_anchor(name)}"'
        state = stage.decision if stage.status in ("done", "reused", "planned", "running", "blocked") else stage.status
        seconds = action.seconds if action is not None else stage.seconds
        rows.append(
            f'<tr{anchor}><th scope="row">{title}</th><td><span class="pill {escaped(state)}">{escaped(state)}</span></td>'
            f'<td class="why">{_why(view, stage, action)}</td><td class="small">{_output(stage, action, lineage)}</td>'
            f'<td class="number">{duration(seconds) if seconds is not None else ""}</td></tr>'
        )
    return (
        '<section id="stages"><h2>Stages</h2><div class="scroll"><table><thead><tr><th>Stage</th><th>Decision</th><th>Why</th>'
        f'<th>Output</th><th class="number">Took</th></tr></thead><tbody>{"".join(rows)}</tbody></table></div></section>'
    )


def _why(view: RunView, stage: StageView, action: Action | None) -> str:
    made_by = action.run if action is not None else view.run
    is_known = made_by == view.run or made_by in stage.reason
    maker = "" if is_known else f'<p class="note">made by run {escaped(made_by)}</p>'
    error = f'<p class="error">{escaped(stage.error)}</p>' if stage.error else ""
    return escaped(stage.reason) + maker + error + "".join(f'<p class="note">{escaped(note)}</p>' for note in stage.notes)


def _output(stage: StageView, action: Action | None, lineage: Lineage) -> str:
    output = action.output if action is not None else stage.output
    node = lineage.nodes.get(output)
    counts = summary(node.kind, node.metadata) if node else ""
    digests = [(node.title if node else "", output), ("key", stage.key)]
    shown = " ".join(
        f'<span>{escaped(title)}</span> <code title="{escaped(digest)}">{escaped(digest[:12])}</code>'
        for title, digest in digests
        if digest
    )
    return (f"<div>{shown}</div>" if shown else "") + (f'<div class="counts">{escaped(counts)}</div>' if counts else "")


def _lineage(lineage: Lineage, targets: dict[str, str]) -> str:
    if not lineage.nodes:
        return ""

    def link(node: Node) -> str:
        return targets.get(node.stage, "")

    return (
        f'<section id="lineage"><h2>Lineage</h2><p class="lead">What each artifact was made from.</p>'
        f'<div class="scroll">{draw(lineage, link)}</div>'
        f"<details><summary>Mermaid source</summary><pre>{escaped(as_mermaid(lineage))}</pre></details></section>"
    )


# ---- a stage's results ----


def _bars(action: Action) -> list[tuple[str, str, float]]:
    """(label, explanation, bits per byte) of the model and the coders; none if one of the values is not finite."""
    bars = [(label, why, action.figures[figure]) for figure, label, why in CODERS if figure in action.figures]
    return bars if CODERS[0][0] in action.figures and all(math.isfinite(value) for _, _, value in bars) else []


def _comparison(name: str, action: Action) -> str:
    bars = _bars(action)
    if not bars:
        return ""
    widest = max(value for _, _, value in bars)
    rows = "".join(
        f'<div class="bar{" own" if label == CODERS[0][1] else ""}"><div class="label">{escaped(label)}<small>{escaped(why)}</small></div>'
        f'<div class="track"><div style="width:{100 * value / widest:.1f}%"></div></div><div class="value">{value:.3f}</div></div>'
        for label, why, value in sorted(bars, key=lambda bar: bar[2])
    )
    return f'<section><h2>{escaped(name)}: bits per byte of held-out text</h2><p class="lead">Lower is better.</p>{rows}</section>'


def _figures(name: str, action: Action) -> str:
    """A table of the figures that have no bar: a row each, the same figure of a baseline in the same row."""
    in_bars = {figure for figure, _, _ in CODERS} if _bars(action) else set()
    rows: dict[str, dict[str, float]] = {}
    for figure, value in action.figures.items():
        if figure not in in_bars:
            prefix = next((each for each in EVALUATED_BESIDE if figure.startswith(each)), "")
            own_name = f"eval/{figure.removeprefix(prefix)}" if prefix else figure
            rows.setdefault(own_name, {})[EVALUATED_BESIDE.get(prefix, "")] = value
    if not rows:
        return ""
    columns = ["", *(column for column in EVALUATED_BESIDE.values() if any(column in values for values in rows.values()))]
    head = "".join(f'<th class="number">{column or ("this model" if len(columns) > 1 else "")}</th>' for column in columns)
    body = "".join(
        f'<tr><th scope="row" class="metric">{escaped(figure)}</th>'
        + "".join(f'<td class="number">{number(values[column]) if column in values else ""}</td>' for column in columns)
        + f'<td class="why">{_with_code(meaning(figure))}</td></tr>'
        for figure, values in sorted(rows.items(), key=lambda row: order(row[0]))
    )
    return (
        f'<section><h2>{escaped(name)}: figures</h2><div class="scroll"><table>'
        f"<thead><tr><th>Figure</th>{head}<th>What it means</th></tr></thead><tbody>{body}</tbody></table></div></section>"
    )


def _samples(store: Store, name: str, action: Action) -> str:
    """What a report holds of the model's own writing: continued prompts as quotes, answered questions as a table."""
    if action.output_kind != "report":
        return ""
    try:
        report = json.loads(store.read(action.output, "report.json") or b"{}")
    except ValueError:
        return ""
    samples = report.get("samples") if isinstance(report, dict) else None
    found: list[dict[str, Any]] = [each for each in (samples if isinstance(samples, list) else []) if isinstance(each, dict)]
    continued = [sample for sample in found if "text" in sample][:MOST_SAMPLES]
    answered = [sample for sample in found if "text" not in sample][:MOST_SAMPLES]
    parts = []
    if continued:
        texts = ((str(each.get("prompt", "")), str(each["text"])) for each in continued)
        quotes = "".join(f"<blockquote><b>{escaped(prompt)}</b>{escaped(text.removeprefix(prompt))}</blockquote>" for prompt, text in texts)
        parts.append(f'<p class="lead">The prompt in bold, then what the model wrote.</p>{quotes}')
    if answered:
        columns = list(answered[0])
        head = "".join(f"<th>{escaped(ANSWER_COLUMNS.get(column, column))}</th>" for column in columns)
        rows = ("".join(f"<td>{escaped(sample.get(column, ''))}</td>" for column in columns) for sample in answered)
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        parts.append(f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>')
    return f"<section><h2>{escaped(name)}: samples</h2>{''.join(parts)}</section>" if parts else ""


# ---- how it can be repeated ----


def _settings(view: RunView, record: RunRecord, actions: dict[str, Action]) -> str:
    config = json.dumps(record.config, indent=2, ensure_ascii=False)
    versions = dict(view.versions)
    for action in actions.values():
        versions = dict(action.versions) | versions
    facts = [*sorted(versions.items()), ("code snapshot", record.snapshot)]
    facts += [(f"git {name}", value) for name, value in (record.git or {}).items()]
    rows = "".join(f"<div><dt>{escaped(name)}</dt><dd>{escaped(value)}</dd></div>" for name, value in facts if value)
    return (
        f'<section id="config"><h2>Config and versions</h2><details><summary>The whole resolved config</summary>'
        f'<pre>{escaped(config)}</pre></details><dl class="facts">{rows}</dl></section>'
    )


def _with_code(text: str) -> str:
    """Escaped text with what stands between backquotes as code."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", escaped(text))
