"""How much an artifact holds, in a few words: `760 pairs (73 held out; 163 bad, 76 duplicates)`."""

from __future__ import annotations

from typing import Any

from pipelines.store.store import Store

MOST_COUNTS = 3
"""Of an artifact type that we don't know, this many counts are shown."""
LEFT_OUT = {
    "bad": ("bad", "bad"),
    "empty": ("empty", "empty"),
    "short": ("too short", "too short"),
    "duplicate": ("duplicate", "duplicates"),
    "left_by_weight": ("left out by weight", "left out by weight"),
    "too_long": ("too long", "too long"),
    "cut": ("cut", "cut"),
    "left_out": ("left out by the stage", "left out by the stage"),
    "alike": ("with two equal responses", "with two equal responses"),
}
"""What the manifest calls records that were left out or changed, and what we call one and several of them."""


def summary_of(store: Store, digest: str) -> str:
    """The summary of an artifact in the store; empty if its manifest is gone or counts nothing."""
    manifest = store.manifest(digest)
    return summary(manifest["kind"], manifest["metadata"]) if manifest else ""


def summary(kind: str, metadata: dict[str, Any]) -> str:
    """What an artifact of type `kind` holds, read off its metadata."""
    match kind:
        case "model":
            return _model(metadata)
        case "tokenizer":
            return ", ".join([*_counted(metadata, "vocab_size", "token", "tokens"), *_text(metadata, "algorithm")])
        case "tokens":
            return _split(metadata, "tokens")
        case "report" | "hf_checkpoint":
            return _counts(metadata)
    unit = next((name for name in _parts(metadata, "train") if name != "bytes"), None)
    return _records(metadata, unit) if unit else _counts(metadata)


def _records(metadata: dict[str, Any], unit: str) -> str:
    reasons = _parts(metadata, "records")
    left_out = _left_out(reasons)
    left_out += [f"{count:,} {name.replace('_', ' ')}" for name, count in reasons.items() if count and name not in ("read", *LEFT_OUT)]
    for name, one, several in (
        ("empty_files", "empty file", "empty files"),
        ("replaced_characters", "character replaced", "characters replaced"),
    ):
        if metadata.get(name):
            left_out += _counted(metadata, name, one, several)
    return _with_notes(_units(_total(metadata, unit), unit), _held_out(metadata, unit), left_out) + _share_notice(metadata.get("hold_out"))


def _split(metadata: dict[str, Any], unit: str) -> str:
    total = _total(metadata, unit)
    return _with_notes(_units(total, unit), _held_out(metadata, unit), []) if total else _counts(metadata)


def _total(metadata: dict[str, Any], unit: str) -> int:
    return sum(_parts(metadata, split).get(unit, 0) for split in ("train", "held_out"))


def _share_notice(hold_out: Any) -> str:
    """What was asked for and what came out, which a stage records only where the two are far apart."""
    if not isinstance(hold_out, dict):
        return ""
    share, asked = (f"{100 * hold_out[name]:.2g} %" for name in ("share", "asked"))
    groups = _units(hold_out["groups"], "records") if hold_out["by"] == "record" else f"{hold_out['groups']:,} values of {hold_out['by']}"
    return f"; held out {share} of the records, asked for {asked}, drawn from {groups}"


def _model(metadata: dict[str, Any]) -> str:
    """Its size, and what it was trained on if that is counted in records: those left out matter, since nobody chose them one by one."""
    parts = [*_counted(metadata, "parameters", "parameter", "parameters"), *_counted(metadata, "steps", "step", "steps")]
    for unit in ("conversations", "prompts"):
        if "train" in (given := _parts(metadata, unit)):
            parts.append(_with_notes(_units(given["train"], unit), "", _left_out(given)))
    given = _parts(metadata, "train")
    items = [_units(given[unit], unit) for unit in ("pairs", "ratings") if given.get(unit)]
    if items:
        parts.append(_with_notes(" and ".join(items), "", _left_out(given)))
    return ", ".join(parts)


def _counts(metadata: dict[str, Any]) -> str:
    counts = [_units(count, name) for name, count in metadata.items() if _is_count(count) and name != "bytes" and count]
    return ", ".join(counts[:MOST_COUNTS])


def _with_notes(head: str, held_out: str, left_out: list[str]) -> str:
    notes = "; ".join(part for part in (held_out, ", ".join(left_out)) if part)
    return f"{head} ({notes})" if notes else head


def _held_out(metadata: dict[str, Any], unit: str) -> str:
    count = _parts(metadata, "held_out").get(unit)
    return f"{count:,} held out" if count else ""


def _left_out(counts: dict[str, Any]) -> list[str]:
    """In the order of `LEFT_OUT`."""
    return [text for name, forms in LEFT_OUT.items() if counts.get(name) for text in _counted(counts, name, *forms)]


def _counted(metadata: dict[str, Any], name: str, one: str, several: str) -> list[str]:
    return [f"{metadata[name]:,} {_form(metadata[name], one, several)}"] if _is_count(metadata.get(name)) else []


def _text(metadata: dict[str, Any], name: str) -> list[str]:
    return [str(metadata[name])] if name in metadata else []


def _units(count: int, unit: str) -> str:
    unit = unit.replace("_", " ")
    return f"{count:,} {unit.removesuffix('s') if count == 1 else unit}"


def _form(count: int, one: str, several: str) -> str:
    return one if count == 1 else several


def _parts(metadata: dict[str, Any], name: str) -> dict[str, int]:
    """The counts in a table of the metadata. A user's own artifact may hold anything there."""
    found = metadata.get(name)
    return {each: count for each, count in found.items() if _is_count(count)} if isinstance(found, dict) else {}


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
