"""Shared by all tests: no unit test reaches a network, and none writes into the home folder."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def no_network(request: pytest.FixtureRequest) -> None:
    """Sockets are closed to unit tests; slow ones may use this machine's own."""
    from pytest_socket import disable_socket, socket_allow_hosts

    if request.node.get_closest_marker("slow") is None and request.node.get_closest_marker("gpu") is None:
        disable_socket(allow_unix_socket=True)
    else:
        socket_allow_hosts(["127.0.0.1", "::1", "localhost"], allow_unix_socket=True)


@pytest.fixture
def store(tmp_path: Path):  # type: ignore[no-untyped-def]
    from pipelines.store import Store

    root = tmp_path / "store"
    root.mkdir()
    return Store(root)
