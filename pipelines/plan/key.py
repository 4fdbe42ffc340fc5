"""A stage's key, and how two keys differ.

A key is the digest of named leaves: the kind, the seed, the config without its operational fields, the inputs' digests, the content
of the source files, and the code that the stage can reach. `gptline plan` explains itself by comparing leaves.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

AREAS = ("kind", "seed", "config", "source", "input", "code", "environment")
"""What a leaf's name begins with, in the order in which differences are shown: first what a person changed."""


def key_of(leaves: dict[str, Any]) -> str:
    """Return the key: the SHA-256 of the leaves as JSON."""
    text = json.dumps(leaves, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(b"gptline key 1\n" + text.encode()).hexdigest()


def flat(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Flatten nested settings: `flat({"a": [1]}, "config")` yields ("config.a.0", 1). Empty tables and lists are leaves too."""
    if isinstance(value, dict) and value:
        for part in sorted(value):
            yield from flat(value[part], f"{name}.{part}")
    elif isinstance(value, list | tuple) and value:
        for index, item in enumerate(value):
            yield from flat(item, f"{name}.{index}")
    else:
        yield name, value


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Say how two sets of leaves differ, in the order of AREAS: "lr: 0.001 -> 0.0005", "code of gpt.losses:lm_loss changed"."""
    names = sorted(set(old) | set(new), key=lambda name: (AREAS.index(name.split(".")[0]), name))
    changed = [name for name in names if (name in old, old.get(name)) != (name in new, new.get(name))]
    return [_sentence(name, old.get(name), new.get(name)) for name in changed]


def _sentence(name: str, old: Any, new: Any) -> str:
    area, _, rest = name.partition(".")
    if area == "input":
        return f"input {rest.split('.')[0]}: {_short(old)} -> {_short(new)}"
    if area not in ("source", "code"):
        return f"{rest or area}: {_short(old)} -> {_short(new)}"
    subject = f"source {rest}" if area == "source" else f"code of {rest}"
    return f"{subject} {'is new' if old is None else 'is gone' if new is None else 'changed'}"


def _short(value: Any) -> str:
    if value is None:
        return "none"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if len(text) == 64 and set(text) <= set("0123456789abcdef"):
        return text[:12]
    return text if len(text) <= 60 else text[:57] + "..."
