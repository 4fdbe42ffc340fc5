"""What ingest made, in one line for people, from an artifact's metadata."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

UNITS = ("documents", "conversations", "pairs", "ratings", "prompts")
LEFT_OUT = {
    "bad": "bad",
    "empty": "empty",
    "short": "too short",
    "duplicate": "duplicates",
    "left_by_weight": "left out by weight",
    "left_out": "left out by the stage",
}
"""How the counts in `metadata["records"]` are called."""


def summary_of(metadata: Mapping[str, Any]) -> str:
    """`"760 pairs (73 held out; 163 bad, 76 duplicates)"`; empty for an artifact that isn't made of records.

    Where the held-out share is far from what was asked for, both stand behind it: "held out 38 % of the records, asked for 10 %".
    """
    unit = next((unit for unit in UNITS if unit in _mapping(metadata.get("train"))), None)
    if unit is None:
        return ""
    train, held_out = (_mapping(metadata.get(split)).get(unit, 0) for split in ("train", "held_out"))
    records = _mapping(metadata.get("records"))
    left_out = ", ".join(f"{records[key]:,} {name}" for key, name in LEFT_OUT.items() if records.get(key))
    details = "; ".join(part for part in (f"{held_out:,} held out" if held_out else "", left_out) if part)
    return f"{train + held_out:,} {unit}" + (f" ({details})" if details else "") + _share_notice(_mapping(metadata.get("hold_out")))


def _share_notice(hold_out: Mapping[str, Any]) -> str:
    if not hold_out:
        return ""
    groups = f"{hold_out['groups']:,} " + ("records" if hold_out["by"] == "record" else f"values of {hold_out['by']}")
    return f"; held out {_percent(hold_out['share'])} of the records, asked for {_percent(hold_out['asked'])}, drawn from {groups}"


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
