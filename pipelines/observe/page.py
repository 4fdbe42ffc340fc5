"""A run's page: one HTML file without scripts or outside parts, made from the journal and the action records.

It opens from a disk, a mail or MLflow's artifact view, in a light or a dark window, and prints. Whatever comes from data is escaped.
"""

from __future__ import annotations

import html
import json
import math
import time
from collections.abc import Sequence
from itertools import pairwise

from cluster.events import Curves, Point
from pipelines.observe.lineage import Lineage, as_mermaid, trace_all
from pipelines.observe.view import RunView, StageView, run_view
from pipelines.store.action import Action
from pipelines.store.runs import RunFolder, RunRecord
from pipelines.store.store import Store

MOST_POINTS = 600
"""A curve with more points is drawn by the lowest and the highest of each stretch."""
MOST_SAMPLES = 12
ANSWER_COLUMNS = {
    "prompt": "asked",
    "reference": "right",
    "answer": "this model, likeliest",
    "drawn": "this model, drawn",
    "baseline": "baseline, likeliest",
    "baseline_drawn": "baseline, drawn",
    "score": "score of the draw",
}
MOST_CHARTS = 24
MOST_NODES = 80
LOSSES = ("train/loss", "val/loss")
OF_RL = ("reward/score_mean", "rollout/kl_k1_nats_per_response", "rollout/kl_k3_nats_per_token")
"""What reinforcement learning is after, and what it pays for that: these stand before its loss, which says little."""
CODERS = (
    ("eval/bits_per_byte", "this model", "predicts held-out text it has never seen"),
    ("eval/ppmd_bits_per_byte", "PPMd", "a statistical coder that has read the training text first"),
    ("eval/xz_bits_per_byte", "xz -9e", "the same held-out text, compressed alone"),
)
BESIDE = {"eval/baseline_": "baseline", "eval/best_of_": "best of several draws"}
"""Figures of the same name behind these prefixes stand in one row."""
OF_KIND = "eval/pair_accuracy_"
MEANINGS = {
    "eval/loss": "Nats per held-out token; lower is better.",
    "eval/bits_per_byte": "Bits for a byte of held-out text, comparable between tokenizers; lower is better.",
    "eval/ppmd_bits_per_byte": "What PPMd needs for it after reading the training text; hard to beat for a small model.",
    "eval/xz_bits_per_byte": "What xz -9e needs for it; to be beaten.",
    "eval/exactly_right": "Share of questions answered right to the letter, by the likeliest tokens; higher is better.",
    "eval/exactly_right_sampled": "Share of questions answered right to the letter by a draw at temperature 1; higher is better.",
    "eval/number_right": "Share of questions whose right number the likeliest tokens give; higher is better.",
    "eval/number_right_sampled": "Share of questions whose right number a draw at temperature 1 gives; higher is better.",
    "eval/declined": "Share of questions declined, of those where that is right; higher is better.",
    "eval/false_refusals": "Share of questions declined, of those that have an answer; lower is better.",
    "eval/too_long_share": "Share of questions that were not put, since they leave no room for an answer; lower is better.",
    "eval/truncated_share": "Share of answers cut off before the model ended them; lower is better.",
    "eval/response_tokens": "Tokens of an answer, on average.",
    "eval/score_mean": "Mean score of drawn answers, normalised as in training; higher is better, where the reward model judges well.",
    "eval/score_std": "How far the scores of drawn answers lie apart: their standard deviation.",
    "eval/score_gain_in_deviations": "How much higher drawn answers score than the baseline's, in deviations of the baseline's scores.",
    "eval/kl_nats_per_response": "How far drawn answers are from what the baseline would say, in nats; what the gain in score has cost.",
    "eval/pair_accuracy": "Share of held-out pairs whose chosen response scores higher; 0.5 is a coin.",
    "eval/rating_auc": "How often a held-out response rated good scores higher than one rated bad; 0.5 is a coin.",
    "reward/score_mean": "Mean score of the last step's responses; higher is better, where the scorer judges well.",
    "rollout/kl_k1_nats_per_response": "How far the last step's policy was from the reference policy; what the score has cost.",
    "rollout/truncated_share": "Share of the last step's responses that were cut off; lower is better.",
}
"""What a figure says, in the order of the table; README's table of metrics says it at length."""


def render(store: Store, run: str) -> str:
    view = run_view(store, run)
    actions = {name: action for name, stage in view.stages.items() if (action := _action(store, stage)) is not None}
    record = RunFolder(store, run).record()
    lineage = trace_all(store, [stage.output for stage in view.stages.values() if stage.output], downstream=False)
    title = f"{view.pipeline or record.pipeline} {view.status.lower()}"
    sections = [
        _header(view, record),
        _stages(view, actions, lineage),
        *(_comparison(name, action) + _figures(name, action) for name, action in actions.items()),
        *(_curves(name, _all_curves(stage, actions.get(name))) for name, stage in view.stages.items()),
        *(_samples(store, name, action) for name, action in actions.items()),
        _picture(lineage),
        _settings(view, record, actions),
    ]
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_esc(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + f"\n<footer>Made by gptline from the run's journal and its action records. {_esc(run)}</footer>\n</main>\n</body>\n</html>\n"
    )


def _action(store: Store, stage: StageView) -> Action | None:
    if not stage.key or stage.number is None:
        return None
    try:
        return store.action(stage.key, stage.number)
    except KeyError:
        return None


def _all_curves(stage: StageView, action: Action | None) -> Curves:
    """The action's are whole; a stage without one yet (or for ever) has what the journal holds."""
    return action.curves if action is not None and action.curves else stage.curves


def _header(view: RunView, record: RunRecord) -> str:
    began = view.started_ms or record.started_ms
    when = time.strftime("%d %B %Y, %H:%M %Z", time.localtime(began / 1000)) if began else ""
    took = _duration((view.ended_ms - began) / 1000) if began and view.ended_ms else ""
    tally: dict[str, int] = {}
    for stage in view.stages.values():
        word = {"done": "made"}.get(stage.status, stage.status)
        tally[word] = tally.get(word, 0) + 1
    facts = [
        ("When", when),
        ("Forecast", _duration(view.forecast_s) if view.forecast_s else ""),
        ("Took", took),
        ("Stages", ", ".join(f"{count} {word}" for word, count in tally.items())),
        ("Where", " on ".join(part for part in (view.user or record.user, view.host or record.host) if part)),
        ("Run", view.run),
        ("Command", view.command or record.command),
    ]
    rows = "".join(
        f"<div{' class=wide' if name in ('Run', 'Command') else ''}><dt>{name}</dt><dd>{_esc(value)}</dd></div>"
        for name, value in facts
        if value
    )
    text = f'<p class="lead">{_esc(view.text)}</p>' if view.text else ""
    return (
        f'<header><p class="eyebrow">gptline run</p><h1>{_esc(view.pipeline or record.pipeline or view.run)} '
        f'<span class="pill {view.status.lower()}">{view.status.lower()}</span></h1>{text}<dl class="facts">{rows}</dl></header>'
    )


def _stages(view: RunView, actions: dict[str, Action], lineage: Lineage) -> str:
    rows = []
    for name, stage in view.stages.items():
        action = actions.get(name)
        trouble = f'<p class="error">{_esc(stage.error)}</p>' if stage.error else ""
        notes = "".join(f'<p class="note">{_esc(note)}</p>' for note in stage.notes)
        output = action.output if action is not None else stage.output
        kind = f"<span>{_esc(lineage.nodes[output].what)}</span> " if output in lineage.nodes else ""
        digest = f'<div>{kind}<code title="{_esc(output)}">{_esc(output[:12])}</code></div>' if output else ""
        key = f'<div><span>key</span> <code title="{_esc(stage.key)}">{_esc(stage.key[:12])}</code></div>' if stage.key else ""
        word = stage.decision if stage.status in ("done", "reused", "planned", "running", "blocked") else stage.status
        seconds = action.seconds if action is not None else stage.seconds
        maker = action.run if action is not None else view.run
        told = maker == view.run or maker in (stage.reason or "")
        made = "" if told else f'<p class="note">made by run {_esc(maker)}</p>'
        rows.append(
            f'<tr><th scope="row">{_esc(name)}</th><td><span class="pill {_esc(word)}">{_esc(word)}</span></td>'
            f'<td class="why">{_esc(stage.reason)}{made}{trouble}{notes}</td><td class="small">{digest}{key}</td>'
            f'<td class="number">{_duration(seconds) if seconds is not None else ""}</td></tr>'
        )
    return (
        '<section><h2>Stages</h2><div class="scroll"><table><thead><tr><th>Stage</th><th>Decision</th><th>Why</th><th>Output</th>'
        f'<th class="number">Took</th></tr></thead><tbody>{"".join(rows)}</tbody></table></div></section>'
    )


def _bars(action: Action) -> list[tuple[str, str, float]]:
    """The model's bits per byte beside those of the coders; none where one of them is no number."""
    bars = [(label, why, action.figures[figure]) for figure, label, why in CODERS if figure in action.figures]
    return bars if CODERS[0][0] in action.figures and all(math.isfinite(value) for _, _, value in bars) else []


def _comparison(name: str, action: Action) -> str:
    bars = _bars(action)
    if not bars:
        return ""
    widest = max(value for _, _, value in bars)
    rows = "".join(
        f'<div class="bar{" own" if label == CODERS[0][1] else ""}"><div class="label">{_esc(label)}<small>{_esc(why)}</small></div>'
        f'<div class="track"><div style="width:{100 * value / widest:.1f}%"></div></div><div class="value">{value:.3f}</div></div>'
        for label, why, value in sorted(bars, key=lambda bar: bar[2])
    )
    return f'<section><h2>{_esc(name)}: bits per byte of held-out text</h2><p class="lead">Lower is better.</p>{rows}</section>'


def _figures(name: str, action: Action) -> str:
    """All that no bar shows, a row each, with what a baseline came to in the same row."""
    drawn = {figure for figure, _, _ in CODERS} if _bars(action) else set()
    rows: dict[str, dict[str, float]] = {}
    for figure, value in action.figures.items():
        if figure not in drawn:
            prefix = next((each for each in BESIDE if figure.startswith(each)), "")
            rows.setdefault(f"eval/{figure.removeprefix(prefix)}" if prefix else figure, {})[BESIDE.get(prefix, "")] = value
    if not rows:
        return ""
    columns = ["", *(column for column in BESIDE.values() if any(column in values for values in rows.values()))]
    head = "".join(f'<th class="number">{column or ("this model" if len(columns) > 1 else "")}</th>' for column in columns)
    body = "".join(
        f'<tr><th scope="row" class="metric">{_esc(figure)}</th>'
        + "".join(f'<td class="number">{_number(values[column]) if column in values else ""}</td>' for column in columns)
        + f'<td class="why">{_esc(_meaning(figure))}</td></tr>'
        for figure, values in sorted(rows.items(), key=lambda row: _place(row[0]))
    )
    return (
        f'<section><h2>{_esc(name)}: figures</h2><div class="scroll"><table>'
        f"<thead><tr><th>Figure</th>{head}<th>What it says</th></tr></thead><tbody>{body}</tbody></table></div></section>"
    )


def _place(figure: str) -> tuple[int, bool]:
    """Where it stands in the table, kinds below all pairs; what has no meaning here comes last, as it was measured."""
    known = list(MEANINGS)
    is_kind = figure.startswith(OF_KIND)
    name = OF_KIND.removesuffix("_") if is_kind else figure
    return known.index(name) if name in known else len(known), is_kind


def _meaning(figure: str) -> str:
    kind = figure.removeprefix(OF_KIND)
    return f"The same for pairs of the kind {kind} alone." if kind != figure else MEANINGS.get(figure, "")


def _curves(name: str, curves: Curves) -> str:
    """What tells how it went is open; all other curves are folded away by area."""
    losses = {metric: curves[metric] for metric in LOSSES if curves.get(metric)}
    of_rl = {metric: curves[metric] for metric in OF_RL if curves.get(metric)}
    folded: dict[str, Curves] = {}
    for metric, points in curves.items():
        if points and metric not in losses and metric not in of_rl:
            folded.setdefault(metric.partition("/")[0], {})[metric] = points
    shown = losses or of_rl
    if not shown and not folded:
        return ""
    parts = [_grid(of_rl) if of_rl else "", _chart(losses, 960, 220 if of_rl else 320) if losses else ""]
    for area, others in sorted(folded.items()):
        count = f"{len(others)} curve{'s' if len(others) != 1 else ''}"
        count += f", the first {MOST_CHARTS} of them drawn" if len(others) > MOST_CHARTS else ""
        parts.append(f"<details{'' if shown else ' open'}><summary>{_esc(area)}: {count}</summary>{_grid(others)}</details>")
    return f"<section><h2>{_esc(name)}: {'loss' if losses and not of_rl else 'curves'} over steps</h2>{''.join(parts)}</section>"


def _grid(curves: Curves) -> str:
    charts = (
        f'<figure class="small-chart">{_chart({metric: points}, 345, 160)}</figure>'
        for metric, points in list(curves.items())[:MOST_CHARTS]
    )
    return f'<div class="grid">{"".join(charts)}</div>'


def _samples(store: Store, name: str, action: Action) -> str:
    if action.output_kind != "report":
        return ""
    try:
        report = json.loads(store.read(action.output, "report.json") or b"{}")
    except ValueError:
        return ""
    samples = report.get("samples") if isinstance(report, dict) else None
    found = [sample for sample in (samples if isinstance(samples, list) else []) if isinstance(sample, dict)]
    written = [sample for sample in found if "text" in sample][:MOST_SAMPLES]
    answered = [sample for sample in found if "text" not in sample][:MOST_SAMPLES]
    parts = []
    if written:
        cards = ((str(each.get("prompt", "")), str(each["text"])) for each in written)
        quotes = "".join(f"<blockquote><b>{_esc(prompt)}</b>{_esc(text.removeprefix(prompt))}</blockquote>" for prompt, text in cards)
        parts.append(f'<p class="lead">The prompt in bold, then what the model wrote.</p>{quotes}')
    if answered:
        columns = list(answered[0])
        head = "".join(f"<th>{_esc(ANSWER_COLUMNS.get(column, column))}</th>" for column in columns)
        rows = ("".join(f"<td>{_esc(str(sample.get(column, '')))}</td>" for column in columns) for sample in answered)
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        parts.append(f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>')
    return f"<section><h2>{_esc(name)}: samples</h2>{''.join(parts)}</section>" if parts else ""


def _settings(view: RunView, record: RunRecord, actions: dict[str, Action]) -> str:
    config = json.dumps(record.config, indent=2, ensure_ascii=False)
    versions = dict(view.versions)
    for action in actions.values():
        versions = dict(action.versions) | versions
    rows = "".join(f"<div><dt>{_esc(name)}</dt><dd>{_esc(version)}</dd></div>" for name, version in sorted(versions.items()))
    git = record.git or {}
    code = [("code snapshot", record.snapshot), *((f"git {name}", value) for name, value in git.items())]
    rows += "".join(f"<div><dt>{_esc(name)}</dt><dd>{_esc(value)}</dd></div>" for name, value in code if value)
    return (
        f"<section><h2>Config and versions</h2><details><summary>The whole resolved config</summary><pre>{_esc(config)}</pre></details>"
        f'<dl class="facts">{rows}</dl></section>'
    )


def _picture(lineage: Lineage) -> str:
    if not lineage.nodes:
        return ""
    drawing = _graph(lineage) if len(lineage.nodes) <= MOST_NODES else ""
    return (
        f'<section><h2>Lineage</h2><p class="lead">What each artifact was made from.</p><div class="scroll">{drawing}</div>'
        f"<details><summary>Mermaid source</summary><pre>{_esc(as_mermaid(lineage))}</pre></details></section>"
    )


def _chart(curves: Curves, width: int, height: int) -> str:
    """Polylines on linear axes; a value that is no number leaves a gap."""
    left, right, top, bottom = 58, 14, 14, 30
    finite = [(step, value) for points in curves.values() for step, value, _ in points if _is_number(value)]
    if not finite:
        return '<p class="note">no value of this curve is a number</p>'
    x_ticks = _ticks(min(step for step, _ in finite), max(step for step, _ in finite), max(3, width // 130))
    y_ticks = _ticks(min(value for _, value in finite), max(value for _, value in finite), max(3, height // 56))
    x_low, x_high = min(step for step, _ in finite), max(step for step, _ in finite)
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def x(step: float) -> float:
        return left + (width - left - right) * ((step - x_low) / (x_high - x_low) if x_high > x_low else 0.5)

    def y(value: float) -> float:
        return top + (height - top - bottom) * (1 - (value - y_low) / (y_high - y_low))

    parts = [f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{_esc(", ".join(curves))} over steps">']
    for tick in y_ticks:
        parts.append(f'<line class="grid-line" x1="{left}" x2="{width - right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text x="{left - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{_tick(tick, y_ticks)}</text>')
    for tick in x_ticks:
        if x_low <= tick <= x_high:
            parts.append(f'<text x="{x(tick):.1f}" y="{height - 10}" text-anchor="middle">{_tick(tick, x_ticks)}</text>')
    for at, (_, points) in enumerate(curves.items()):
        for stretch in _stretches(points):
            drawn = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in stretch)
            if len(stretch) > 1:
                parts.append(f'<polyline class="line{at}" points="{drawn}"/>')
            if len(stretch) <= 40:
                parts += [
                    f'<circle class="dot{at}" cx="{x(step):.1f}" cy="{y(value):.1f}" r="{2.6 if len(stretch) > 1 else 3.5}"/>'
                    for step, value in stretch
                ]
    parts.append("</svg>")
    legend = "".join(
        f'<span><i class="key{at}"></i>{_esc(metric)} <b>{_number(points[-1].value)}</b> at step {points[-1].step:,}</span>'
        for at, (metric, points) in enumerate(curves.items())
    )
    return f'{"".join(parts)}<p class="legend">{legend}</p>'


def _stretches(points: Sequence[Point]) -> list[list[tuple[int, float]]]:
    stretches: list[list[tuple[int, float]]] = [[]]
    for step, value, _ in sorted(points, key=lambda point: point.step):
        if _is_number(value):
            stretches[-1].append((step, value))
        elif stretches[-1]:
            stretches.append([])
    return [_thinned(stretch) for stretch in stretches if stretch]


def _thinned(stretch: list[tuple[int, float]]) -> list[tuple[int, float]]:
    if len(stretch) <= MOST_POINTS:
        return stretch
    bucket = math.ceil(len(stretch) / (MOST_POINTS // 2))
    kept = []
    for at in range(0, len(stretch), bucket):
        part = stretch[at : at + bucket]
        kept += sorted({min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])})
    return kept


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) that enclose low and high."""
    if not high > low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def _tick(value: float, ticks: Sequence[float]) -> str:
    if max(abs(tick) for tick in ticks) < 0.001 or max(abs(tick) for tick in ticks) >= 1e7:
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e") if value else "0"
    step = ticks[1] - ticks[0]
    return f"{value:,.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


_NODE_WIDTH, _NODE_HEIGHT, _GAP_X, _GAP_Y = 166, 62, 22, 34


def _graph(lineage: Lineage) -> str:
    """Layers from top to bottom; an edge that skips layers gets a free lane in each, so that no line runs behind a box."""
    depth: dict[str, int] = {}

    def place(digest: str, above: frozenset[str]) -> int:
        if digest not in depth:
            inputs = [each for _, each in lineage.inputs[digest] if each not in above]
            depth[digest] = 1 + max((place(each, above | {digest}) for each in inputs), default=-1)
        return depth[digest]

    for digest in lineage.nodes:
        place(digest, frozenset())
    for digest in lineage.nodes:
        if not lineage.inputs[digest]:  # what comes from outside stands above the first that reads it, not all in one row
            depth[digest] = max(0, min((depth[each] for each in lineage.uses[digest]), default=1) - 1)
    layers: list[list[tuple[str, int]]] = [[] for _ in range(max(depth.values()) + 1)]
    parents: dict[tuple[str, int], list[tuple[str, int]]] = {}
    for digest in lineage.nodes:
        parents[digest, depth[digest]] = []
        layers[depth[digest]].append((digest, depth[digest]))
    edges: list[list[tuple[str, int]]] = []
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
    column: dict[tuple[str, int], float] = {}
    for layer in layers:
        wanted = {slot: (sum(column[each] for each in parents[slot]) / len(parents[slot]) if parents[slot] else 0.0) for slot in layer}
        layer.sort(key=lambda slot: (wanted[slot], depth[slot[0]] != slot[1], slot[0]))
        column |= {slot: float(at) for at, slot in enumerate(layer)}
    widest = max(len(layer) for layer in layers)
    width = widest * (_NODE_WIDTH + _GAP_X) - _GAP_X + 2
    height = len(layers) * (_NODE_HEIGHT + _GAP_Y) - _GAP_Y + 2

    def top(slot: tuple[str, int]) -> float:
        return 1 + slot[1] * (_NODE_HEIGHT + _GAP_Y)

    def middle(slot: tuple[str, int]) -> float:
        centred = (widest - len(layers[slot[1]])) / 2
        return 1 + (column[slot] + centred) * (_NODE_WIDTH + _GAP_X) + _NODE_WIDTH / 2

    parts = [f'<svg class="graph" viewBox="0 0 {width} {height}" style="width:{width}px" role="img" aria-label="lineage">']
    for edge in edges:
        path = f"M{middle(edge[0]):.0f},{top(edge[0]) + _NODE_HEIGHT:.0f}"
        for before, after in pairwise(edge):
            bend = top(after) - _GAP_Y / 2
            path += f" C{middle(before):.0f},{bend:.0f} {middle(after):.0f},{bend:.0f} {middle(after):.0f},{top(after):.0f}"
            if after != edge[-1]:
                path += f" V{top(after) + _NODE_HEIGHT:.0f}"
        parts.append(f'<path d="{path}"/>')
    for digest, node in lineage.nodes.items():
        slot = (digest, depth[digest])
        x, y = middle(slot) - _NODE_WIDTH / 2, top(slot)
        counts = [(name, value) for name, value in node.metadata.items() if type(value) is int]
        counts.sort(key=lambda count: count[0] == "bytes")  # how many there are says more
        texts = (
            (20, "name", node.stage or node.kind),
            (37, "", f"{node.what} {digest[:8]}" if node.stage != node.what else digest[:12]),
            (53, "", f"{counts[0][1]:,} {counts[0][0].replace('_', ' ')}" if counts else ""),
        )
        box = f'<rect x="{x:.0f}" y="{y:.0f}" width="{_NODE_WIDTH}" height="{_NODE_HEIGHT}" rx="7"/>'
        parts.append(f"<g><title>{_esc(node.what)} sha256:{_esc(digest)}</title>{box}")
        parts += [
            f'<text class="{kind}" x="{x + 11:.0f}" y="{y + down:.0f}">{_esc(_cut(text, 24))}</text>' for down, kind, text in texts if text
        ]
        parts.append("</g>")
    return "".join([*parts, "</svg>"])


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _number(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "infinite" if value > 0 else "-infinite"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _cut(text: str, chars: int) -> str:
    return text if len(text) <= chars else text[: chars - 3] + "..."


def _esc(value: object) -> str:
    return html.escape(str(value))


_STYLE = """
:root { color-scheme: light dark; --ink: #1c2128; --soft: #5f6875; --line: #e3e6ea; --paper: #ffffff; --card: #f6f7f9; --a: #2563c9;
  --b: #d9661f;
  --good: #1a7f4b; --good-bg: #e2f4ea; --calm: #3d5a86; --calm-bg: #e6edf7; --bad: #b3261e; --bad-bg: #fbe6e4; --warn: #8a5a00;
  --warn-bg: #fbf0d9; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --soft: #98a1ad; --line: #2c323a; --paper: #14171b; --card: #1c2026;
  --a: #6ea4f5; --b: #f09a5c;
  --good: #6fd3a0; --good-bg: #17352a; --calm: #a9c2ea; --calm-bg: #1f2c40; --bad: #f59a93; --bad-bg: #43201e; --warn: #ecc477;
  --warn-bg: #3c2f14; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 2.75rem 1.5rem 4rem; }
h1 { font-size: 2.1rem; line-height: 1.2; letter-spacing: -0.02em; margin: 0 0 0.4rem; display: flex; gap: 0.8rem; align-items: center;
  flex-wrap: wrap; }
h2 { font-size: 1.15rem; letter-spacing: -0.01em; margin: 0 0 0.9rem; }
section { margin-top: 2.9rem; }
.eyebrow { margin: 0 0 0.2rem; color: var(--soft); font-size: 0.85rem; }
.lead { margin: -0.5rem 0 1rem; color: var(--soft); }
header .lead { margin: 0 0 1rem; }
code, pre, blockquote { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
code { font-size: 0.86em; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: 0.7rem 1.6rem; margin: 1.1rem 0 0; }
.facts .wide { grid-column: span 2; }
.facts dt { color: var(--soft); font-size: 0.8rem; }
.facts dd { margin: 0; overflow-wrap: anywhere; }
.pill { display: inline-block; padding: 0.1rem 0.6rem; border-radius: 1rem; font-size: 0.8rem; font-weight: 600; letter-spacing: 0;
  white-space: nowrap;
  background: var(--calm-bg); color: var(--calm); }
.pill.finished, .pill.run, .pill.resume { background: var(--good-bg); color: var(--good); }
.pill.failed { background: var(--bad-bg); color: var(--bad); }
.pill.killed, .pill.stopped, .pill.blocked { background: var(--warn-bg); color: var(--warn); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: 0.6rem 1.1rem 0.6rem 0; border-bottom: 1px solid var(--line); }
thead th { color: var(--soft); font-weight: 500; font-size: 0.8rem; padding-bottom: 0.35rem; }
tbody th { font-weight: 600; white-space: nowrap; }
tbody th.metric { font-weight: 400; }
.number { text-align: right; white-space: nowrap; }
.small { font-size: 0.84rem; white-space: nowrap; }
.small span { color: var(--soft); }
.why { min-width: 14rem; }
.note { margin: 0.2rem 0 0; color: var(--soft); font-size: 0.86rem; }
.error { margin: 0.3rem 0 0; color: var(--bad); }
svg { display: block; max-width: 100%; height: auto; }
svg text { fill: var(--soft); font-size: 12px; font-family: inherit; font-variant-numeric: tabular-nums; }
.chart { width: 100%; overflow: visible; }
.grid-line { stroke: var(--line); stroke-width: 1; }
polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
.line0 { stroke: var(--a); } .dot0 { fill: var(--a); } .line1 { stroke: var(--b); } .dot1 { fill: var(--b); }
.legend { display: flex; flex-wrap: wrap; gap: 0.3rem 1.6rem; margin: 0.4rem 0 0; color: var(--soft); font-size: 0.88rem;
  font-variant-numeric: tabular-nums; }
.legend b { color: var(--ink); font-weight: 600; }
.legend i { display: inline-block; width: 1rem; height: 0.2rem; border-radius: 1px; margin-right: 0.45rem; vertical-align: middle; }
.key0 { background: var(--a); } .key1 { background: var(--b); }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); gap: 1.4rem 2rem; padding: 0.9rem 0; }
.small-chart { margin: 0; }
.bar { display: grid; grid-template-columns: minmax(9rem, 17rem) 1fr 4rem; gap: 1rem; align-items: center; padding: 0.35rem 0; }
.bar small { display: block; color: var(--soft); line-height: 1.3; }
.bar .track { background: var(--card); border-radius: 4px; }
.bar .track div { height: 1.1rem; border-radius: 4px; background: var(--soft); opacity: 0.55; }
.bar.own .track div { background: var(--a); opacity: 1; }
.bar.own .label { font-weight: 600; } .bar.own small { font-weight: 400; }
.bar .value { font-variant-numeric: tabular-nums; text-align: right; font-weight: 600; }
blockquote { margin: 0 0 0.8rem; padding: 0.85rem 1.1rem; background: var(--card); border-radius: 8px; font-size: 0.86rem;
  white-space: pre-wrap;
  overflow-wrap: anywhere; }
details { margin-top: 0.9rem; }
summary { cursor: pointer; color: var(--soft); font-size: 0.9rem; }
pre { background: var(--card); border-radius: 8px; padding: 0.9rem 1.1rem; overflow: auto; font-size: 0.8rem; line-height: 1.5;
  max-height: 32rem; }
.graph { max-width: none; }
.graph rect { fill: var(--card); stroke: var(--line); }
.graph path { fill: none; stroke: var(--soft); stroke-opacity: 0.55; stroke-width: 1.4; }
.graph .name { fill: var(--ink); font-size: 13.5px; font-weight: 600; }
footer { margin-top: 3.5rem; padding-top: 0.9rem; border-top: 1px solid var(--line); color: var(--soft); font-size: 0.82rem; }
@media (max-width: 32rem) { .facts .wide { grid-column: auto; } }
@media print { main { max-width: none; padding: 0; } details:not([open]) { display: none; } section { break-inside: avoid; } }
"""
