"""Which actions made an artifact, and which used it, without reading every record.

    index/output/<digest>/<key>       an action under this key made the artifact
    index/input/<digest>/<key>        an action under this key was given it
    index/sources/<digest>/<key>      an action under this key read exactly these outside files

An entry is an empty object, written before the action's record. It only says where to look: the records decide. A store from before the
index is indexed once, when it is first asked; one that can't be written is read as a whole instead.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from cluster.commit import canonical_json
from pipelines.store.action import Action
from pipelines.store.backend import Backend

_COMPLETE = "index/complete.json"
"""Says that every action of the store has its entries."""


class Records(Protocol):
    """The records that are indexed, and where the entries go: what the index needs of the store."""

    backend: Backend

    def actions(self, key: str) -> list[Action]: ...

    def all_actions(self) -> Iterator[Action]: ...


class ActionIndex:
    """Answers from the entries, and reads only the records that they name."""

    def __init__(self, records: Records) -> None:
        self._records = records
        self._complete = False
        self._in_memory: dict[str, set[str]] | None = None
        """Name of a folder of the index to keys, for a store that can't be written."""

    def makers(self, digest: str) -> list[Action]:
        """The actions that made an artifact, newest first."""
        return self._actions(f"output/{digest}", lambda action: action.output == digest)

    def users(self, digest: str) -> list[Action]:
        """The actions that were given an artifact, newest first."""
        return self._actions(f"input/{digest}", lambda action: any(digest in given for given in action.inputs.values()))

    def readers(self, sources: Iterable[str]) -> list[Action]:
        """The actions that read outside files of exactly these sha256, newest first."""
        expected = sorted(sources)
        return self._actions(f"sources/{_digest(expected)}", lambda action: sorted(action.sources().values()) == expected)

    def add(self, action: Action) -> None:
        """Write an action's entries; call it before the record is written."""
        self._ensure_complete()
        for folder in _folders(action):
            self._records.backend.put(f"index/{folder}/{action.key}", b"")

    def _actions(self, folder: str, belongs: Callable[[Action], bool]) -> list[Action]:
        self._ensure_complete()
        if self._in_memory is not None:
            keys = sorted(self._in_memory.get(folder, ()))
        else:
            keys = [name.rpartition("/")[2] for name in self._records.backend.list(f"index/{folder}/")]
        found = [action for key in keys for action in self._records.actions(key) if belongs(action)]
        return sorted(found, key=lambda action: (action.started_ms, action.number), reverse=True)

    def _ensure_complete(self) -> None:
        if self._complete or self._records.backend.get(_COMPLETE) is not None:
            self._complete = True
            return
        entries: dict[str, set[str]] = defaultdict(set)
        for action in self._records.all_actions():
            for folder in _folders(action):
                entries[folder].add(action.key)
        try:
            for folder, keys in entries.items():
                for key in keys:
                    self._records.backend.put(f"index/{folder}/{key}", b"")
            self._records.backend.put(_COMPLETE, canonical_json({"schema": 1}))
        except OSError:
            self._in_memory = entries
        self._complete = True


def _folders(action: Action) -> list[str]:
    used = {digest for given in action.inputs.values() for digest in given}
    sources = sorted(action.sources().values())
    return [
        f"output/{action.output}",
        *(f"input/{digest}" for digest in sorted(used)),
        *([f"sources/{_digest(sources)}"] if sources else []),
    ]


def _digest(sources: list[str]) -> str:
    return hashlib.sha256("\n".join(sources).encode()).hexdigest()
