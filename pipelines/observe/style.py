"""The style of a run's page: light and dark windows, narrow ones, and paper."""

from __future__ import annotations

STYLE = """
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
.graph a:hover rect { stroke: var(--a); }
pre.whole { max-height: none; }
nav { display: flex; flex-wrap: wrap; gap: 0.2rem 1.1rem; margin-top: 1.8rem; padding: 0.6rem 0; border-block: 1px solid var(--line);
  font-size: 0.88rem; }
a { color: var(--a); text-decoration: none; }
a:hover { text-decoration: underline; }
.counts { white-space: normal; min-width: 11rem; }
:target { scroll-margin-top: 1rem; }
tr:target { background: var(--card); }
.graph .name { fill: var(--ink); font-size: 13.5px; font-weight: 600; }
footer { margin-top: 3.5rem; padding-top: 0.9rem; border-top: 1px solid var(--line); color: var(--soft); font-size: 0.82rem; }
@media (max-width: 32rem) { .facts .wide { grid-column: auto; } }
@media print { main { max-width: none; padding: 0; } details:not([open]) { display: none; } section { break-inside: avoid; } }
"""
