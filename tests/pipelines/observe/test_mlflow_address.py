"""mlflow_address.py: which MLflow an address means, and whether it answers."""

from __future__ import annotations

import socket

import pytest

from pipelines.observe.mlflow_address import resolve_uri, unreachable
from pipelines.store.store import Store


def test_sqlite_is_a_file_inside_the_store(store: Store) -> None:
    assert resolve_uri("sqlite", store) == f"sqlite:///{store}/mlflow.db"
    assert resolve_uri("http://mlflow.example:5000", store) == "http://mlflow.example:5000"


@pytest.mark.slow  # it needs this machine's sockets
def test_a_server_that_accepts_connections_but_never_answers_is_given_up_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.observe.mlflow_address.ANSWER_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        assert unreachable(f"http://127.0.0.1:{mute.getsockname()[1]}") == "no answer in time"
