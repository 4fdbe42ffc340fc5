"""Which actions made an artifact, and which used it, without reading every record.

    index/output/<digest>/<key>       an action under this key made the artifact
    index/input/<digest>/<key>        an action under this key was given it
    index/sources/<digest>/<key>      an action under this key read exactly these outside files
    index/stage/<digest>/<time>-<key> an action of this pipeline's stage, under this key, began then

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
        """Name of a folder of the index to its entries, for a store that can't be written."""

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

    def newest(self, pipeline: str, stage: str, at_most: int) -> list[Action]:
        """The last actions of a pipeline's stage, newest first.

        It only lists: a plan writes nothing, so what was recorded before the index had stages is not found.
        """
        names = self._records.backend.list(f"index/{_stage_folder(pipeline, stage)}/")
        keys = [name.rpartition("/")[2].partition("-")[2] for name in reversed(names)]
        found = [action for key in dict.fromkeys(keys[:at_most]) for action in self._records.actions(key)]
        return _newest_first(action for action in found if (action.pipeline, action.stage) == (pipeline, stage))[:at_most]

    def add(self, action: Action) -> None:
        """Write an action's entries; call it before the record is written."""
        self._ensure_complete()
        for folder, entry in _entries(action):
            self._records.backend.put(f"index/{folder}/{entry}", b"")

    def _actions(self, folder: str, belongs: Callable[[Action], bool]) -> list[Action]:
        self._ensure_complete()
        if self._in_memory is not None:
            keys = sorted(self._in_memory.get(folder, ()))
        else:
            keys = [name.rpartition("/")[2] for name in self._records.backend.list(f"index/{folder}/")]
        return _newest_first(action for key in keys for action in self._records.actions(key) if belongs(action))

    def _ensure_complete(self) -> None:
        if self._complete or self._records.backend.get(_COMPLETE) is not None:
            self._complete = True
            return
        entries: dict[str, set[str]] = defaultdict(set)
        for action in self._records.all_actions():
            for folder, entry in _entries(action):
                entries[folder].add(entry)
        try:
            for folder, names in entries.items():
                for name in names:
                    self._records.backend.put(f"index/{folder}/{name}", b"")
            self._records.backend.put(_COMPLETE, canonical_json({"schema": 1}))
        except OSError:
            self._in_memory = entries
        self._complete = True


def _newest_first(actions: Iterable[Action]) -> list[Action]:
    return sorted(actions, key=lambda action: (action.started_ms, action.number), reverse=True)


def _entries(action: Action) -> list[tuple[str, str]]:
    """The folder and the name of each entry."""
    used = {digest for given in action.inputs.values() for digest in given}
    sources = sorted(action.sources().values())
    folders = [
        f"output/{action.output}",
        *(f"input/{digest}" for digest in sorted(used)),
        *([f"sources/{_digest(sources)}"] if sources else []),
    ]
    began = (_stage_folder(action.pipeline, action.stage), f"{action.started_ms:015}-{action.key}")
    return [*((folder, action.key) for folder in folders), began]


def _stage_folder(pipeline: str, stage: str) -> str:
    return f"stage/{_digest([pipeline, stage])}"


def _digest(sources: list[str]) -> str:
    return hashlib.sha256("\n".join(sources).encode()).hexdigest()
