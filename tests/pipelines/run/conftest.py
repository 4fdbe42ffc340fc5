from __future__ import annotations

from pathlib import Path

import pytest

from tests.pipelines.run.small import NoTracker, Small


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Small:
    monkeypatch.setattr("pipelines.run.runner.start_tracking", lambda *_: NoTracker())
    return Small(tmp_path)
