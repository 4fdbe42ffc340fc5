"""Draws a stage's curves as SVG: linear axes, round ticks, one polyline per metric.

`curve_section` decides which curves are open and which are folded away; `chart` draws one picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from cluster.events import Curves, Point
from pipelines.observe.notation import escaped, number

MOST_POINTS = 600
"""A curve with more points is drawn by the lowest and the highest point of each stretch."""
MOST_DOTS = 40
"""Up to this many points are marked by dots too."""
MOST_CHARTS = 24
"""An area with more curves is drawn in part."""
LOSSES = ("train/loss", "val/loss")
RL_CURVES = ("reward/score_mean", "rollout/kl_k1_nats_per_response", "rollout/kl_k3_nats_per_token")
"""What reinforcement learning gains and what it pays for it. They come before its loss, which says little."""


def curve_section(title: str, curves: Curves) -> str:
    """A section with a stage's curves; empty without any. Loss, score and KL are open, all others folded by area."""
    losses = {metric: curves[metric] for metric in LOSSES if curves.get(metric)}
    rl_curves = {metric: curves[metric] for metric in RL_CURVES if curves.get(metric)}
    folded: dict[str, Curves] = {}
    for metric, points in curves.items():
        if points and metric not in losses and metric not in rl_curves:
            folded.setdefault(metric.partition("/")[0], {})[metric] = points
    shown = losses or rl_curves
    if not shown and not folded:
        return ""
    parts = [_grid(rl_curves) if rl_curves else "", chart(losses, 960, 220 if rl_curves else 320) if losses else ""]
    for area, others in sorted(folded.items()):
        count = f"{len(others)} curve{'s' if len(others) != 1 else ''}"
        count += f", of which the first {MOST_CHARTS} are drawn" if len(others) > MOST_CHARTS else ""
        parts.append(f"<details{'' if shown else ' open'}><summary>{escaped(area)}: {count}</summary>{_grid(others)}</details>")
    what = "loss" if losses and not rl_curves else "curves"
    return f"<section><h2>{escaped(title)}: {what} over steps</h2>{''.join(parts)}</section>"


def chart(curves: Curves, width: int, height: int) -> str:
    """One picture with all the curves and, below it, their newest values. NaN and infinity leave gaps."""
    finite = [(point.step, point.value) for points in curves.values() for point in points if math.isfinite(point.value)]
    if not finite:
        return '<p class="note">no value of this curve is a finite number</p>'
    axes = _Axes(finite, width, height)
    parts = [f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escaped(", ".join(curves))} over steps">']
    parts += axes.lines()
    for at, points in enumerate(curves.values()):
        for stretch in stretches(points):
            if len(stretch) > 1:
                drawn = " ".join(f"{axes.x(step):.1f},{axes.y(value):.1f}" for step, value in stretch)
                parts.append(f'<polyline class="line{at}" points="{drawn}"/>')
            if len(stretch) <= MOST_DOTS:
                radius = 2.6 if len(stretch) > 1 else 3.5
                parts += [
                    f'<circle class="dot{at}" cx="{axes.x(step):.1f}" cy="{axes.y(value):.1f}" r="{radius}"/>' for step, value in stretch
                ]
    parts.append("</svg>")
    legend = "".join(
        f'<span><i class="key{at}"></i>{escaped(metric)} <b>{number(points[-1].value)}</b> at step {points[-1].step:,}</span>'
        for at, (metric, points) in enumerate(curves.items())
    )
    return f'{"".join(parts)}<p class="legend">{legend}</p>'


def stretches(points: Sequence[Point]) -> list[list[tuple[int, float]]]:
    """The (step, value) pairs between gaps, ordered by step and thinned."""
    found: list[list[tuple[int, float]]] = [[]]
    for step, value, _ in sorted(points, key=lambda point: point.step):
        if math.isfinite(value):
            found[-1].append((step, value))
        elif found[-1]:
            found.append([])
    return [_thinned(stretch) for stretch in found if stretch]


def ticks(low: float, high: float, about: int) -> list[float]:
    """About `about` round numbers (1, 2 or 5 times a power of ten) that enclose low and high."""
    if not high > low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [at * step for at in range(first, last + 1)]


class _Axes:
    """Maps steps and values to the picture's coordinates, and draws ticks."""

    LEFT, RIGHT, TOP, BOTTOM = 58, 14, 14, 30

    def __init__(self, points: Sequence[tuple[int, float]], width: int, height: int) -> None:
        self._width, self._height = width, height
        steps, values = [step for step, _ in points], [value for _, value in points]
        self._x_low, self._x_high = min(steps), max(steps)
        self._x_ticks = [tick for tick in ticks(self._x_low, self._x_high, max(3, width // 130)) if tick == round(tick)]  # a step is whole
        self._y_ticks = ticks(min(values), max(values), max(3, height // 56))

    def x(self, step: float) -> float:
        share = (step - self._x_low) / (self._x_high - self._x_low) if self._x_high > self._x_low else 0.5
        return self.LEFT + (self._width - self.LEFT - self.RIGHT) * share

    def y(self, value: float) -> float:
        low, high = self._y_ticks[0], self._y_ticks[-1]
        return self.TOP + (self._height - self.TOP - self.BOTTOM) * (1 - (value - low) / (high - low))

    def lines(self) -> list[str]:
        parts = []
        for tick in self._y_ticks:
            y = self.y(tick)
            parts.append(f'<line class="grid-line" x1="{self.LEFT}" x2="{self._width - self.RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{self.LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{_tick(tick, self._y_ticks)}</text>')
        for tick in self._x_ticks:
            if self._x_low <= tick <= self._x_high:
                parts.append(f'<text x="{self.x(tick):.1f}" y="{self._height - 10}" text-anchor="middle">{tick:,.0f}</text>')
        return parts


def _grid(curves: Curves) -> str:
    charts = (
        f'<figure class="small-chart">{chart({metric: points}, 345, 160)}</figure>' for metric, points in list(curves.items())[:MOST_CHARTS]
    )
    return f'<div class="grid">{"".join(charts)}</div>'


def _thinned(stretch: list[tuple[int, float]]) -> list[tuple[int, float]]:
    if len(stretch) <= MOST_POINTS:
        return stretch
    bucket = math.ceil(len(stretch) / (MOST_POINTS // 2))
    kept = []
    for at in range(0, len(stretch), bucket):
        part = stretch[at : at + bucket]
        kept += sorted({min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])})
    return kept


def _tick(value: float, among: Sequence[float]) -> str:
    largest = max(abs(tick) for tick in among)
    if largest < 0.001 or largest >= 1e7:
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e") if value else "0"
    step = among[1] - among[0]
    return f"{value:,.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"
