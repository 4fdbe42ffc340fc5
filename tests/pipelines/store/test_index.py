"""The index of actions: makers and users of an artifact, found without reading every record."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipelines.store.action import Action
from pipelines.store.backend import FolderBackend
from pipelines.store.store import Store

A, B, C = ("a" * 64, "b" * 64, "c" * 64)


def action(key: str, output: str, *, inputs: tuple[str, ...] = (), started_ms: int = 1, sources: dict[str, str] | None = None) -> Action:
    leaves = {f"source.{name}": sha256 for name, sha256 in (sources or {}).items()}
    fields: dict[str, Any] = dict(pipeline="p", stage="s", kind="ingest", run="r", output_kind="documents", host="h", user="u", pid=3)
    return Action(key=key, output=output, inputs={"documents": list(inputs)}, leaves=leaves, started_ms=started_ms, seconds=1.0, **fields)


def test_makers_and_users_are_listed_newest_first(store: Store):
    store.record(action("k1", A, started_ms=1))
    store.record(action("k2", A, started_ms=2))
    store.record(action("k3", B, inputs=(A,), started_ms=3))
    assert [each.key for each in store.index.makers(A)] == ["k2", "k1"]
    assert [each.key for each in store.index.users(A)] == ["k3"]
    assert store.index.users(B) == []


def test_a_rerun_that_came_out_different_makes_only_its_own_output(store: Store):
    store.record(action("k1", A, started_ms=1))
    store.record(action("k1", B, started_ms=2))
    assert [each.number for each in store.index.makers(A)] == [1]
    assert [each.number for each in store.index.makers(B)] == [2]


def test_readers_of_exactly_these_files_are_found_by_content(store: Store):
    store.record(action("k1", A, sources={"x.txt": C, "y.txt": B}))
    assert [each.key for each in store.index.readers([B, C])] == ["k1"]
    assert store.index.readers([C]) == []


def test_an_entry_without_a_record_is_ignored(store: Store):
    store.index.add(action("k1", A))  # killed before the record was written
    assert store.index.makers(A) == []


def test_a_store_from_before_the_index_is_indexed_when_it_is_first_asked(store: Store):
    for key, output in (("k1", A), ("k2", B)):
        store.backend.put(f"actions/{key}/000001.json", action(key, output).model_dump_json().encode())
    assert [each.key for each in store.index.makers(B)] == ["k2"]
    assert [each.key for each in Store(store.root).index.makers(A)] == ["k1"]


def test_an_unindexed_store_that_cannot_be_written_is_read_as_a_whole(store: Store, monkeypatch: pytest.MonkeyPatch):
    store.backend.put("actions/k1/000001.json", action("k1", A).model_dump_json().encode())

    def read_only(name: str, data: bytes | Path) -> None:
        raise OSError(30, "Read-only file system", name)

    monkeypatch.setattr(store.backend, "put", read_only)
    assert [each.key for each in store.index.makers(A)] == ["k1"]


class Counted(FolderBackend):
    """A backend that counts its calls."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.calls: Counter[str] = Counter()

    def get(self, name: str) -> bytes | None:
        self.calls["get"] += 1
        return super().get(name)

    def list(self, prefix: str) -> list[str]:
        self.calls["list"] += 1
        return super().list(prefix)


def test_looking_up_a_maker_reads_as_much_in_a_store_of_300_actions_as_in_one_of_3(tmp_path: Path):
    calls = []
    for size in (3, 300):
        store = Store(tmp_path / str(size))
        for number in range(size):
            store.record(action(f"k{number}", f"{number:064d}"))
        store.backend = backend = Counted(store.root)
        assert len(store.index.makers(f"{2:064d}")) == 1
        calls.append(backend.calls)
    assert calls[0] == calls[1] == {"list": 2, "get": 1}
