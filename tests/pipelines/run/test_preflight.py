"""The checks of an existing cluster before a run."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable

import pytest

from pipelines.run.preflight import unshared
from pipelines.store.store import Store


def nodes(monkeypatch: pytest.MonkeyPatch, before: Callable[[], object]) -> None:
    """A cluster of one node, which is this process after `before()`."""

    def ask(question: Callable[[], str | None], deadline_s: float) -> dict[str, str]:
        before()
        answer = question()
        return {} if answer is None else {"node7 (10.0.0.7)": answer}

    monkeypatch.setattr("cluster.ray_session.ask_nodes", ask)


def test_the_check_of_a_shared_store_leaves_it_unchanged(store: Store, monkeypatch: pytest.MonkeyPatch):
    nodes(monkeypatch, lambda: None)
    assert unshared(store) == []
    assert list((store.root / "tmp").iterdir()) == []


def test_a_node_with_a_different_disk_at_the_same_path_is_named(store: Store, monkeypatch: pytest.MonkeyPatch):
    nodes(monkeypatch, lambda: shutil.rmtree(store.root))
    (fault,) = unshared(store)
    assert str(fault) == (
        f"store.root: {store.root}: node node7 (10.0.0.7) does not see what is written there; "
        "expected a folder on storage that every node has at this same path"
    )


def test_a_node_that_can_only_read_the_store_is_named(store: Store, monkeypatch: pytest.MonkeyPatch):
    def read_only(**_: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    nodes(monkeypatch, lambda: monkeypatch.setattr(tempfile, "TemporaryFile", read_only))
    (fault,) = unshared(store)
    assert "node node7 (10.0.0.7) can't write there ([Errno 30] Read-only file system); expected" in str(fault)


def test_a_node_that_does_not_answer_is_named_and_the_probe_is_removed(store: Store, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("cluster.ray_session.ask_nodes", lambda question, deadline_s: {"node7": f"did not answer within {deadline_s:g} s"})
    (fault,) = unshared(store)
    assert "node node7 did not answer within 60 s; expected" in str(fault)
    assert list((store.root / "tmp").iterdir()) == []
