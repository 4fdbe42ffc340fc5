"""mlflow_ui.py: where MLflow's pages are."""

from __future__ import annotations

import pytest
from mlflow_runs import begin

from pipelines.observe.mlflow_ui import serve_ui
from pipelines.store.store import Store


def test_ui_names_the_servers_that_runs_were_sent_to(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(store, "r1", uri="http://old:5000").flush()
    begin(store, "r2", uri="http://new:5000/").flush()
    monkeypatch.setattr("pipelines.observe.mlflow_ui.sync", lambda store, uri, dead: [])
    printed: list[str] = []
    assert serve_ui(store, None, 5001, printed.append) == 0
    assert printed == [f"http://{host}:5000/#/experiments?workflowType=machine_learning" for host in ("new", "old")]
    printed.clear()
    assert serve_ui(store, "http://third", 5001, printed.append) == 0
    assert printed == ["http://third/#/experiments?workflowType=machine_learning"]
