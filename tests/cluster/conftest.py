"""A Ray session per module for the tests that need one, and the path on which workers find the tests' functions."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
# Functions are sent to other processes by reference, so those must import them by the same name as the tests.
sys.path.insert(0, str(HERE))


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    from cluster import ray_session

    with ray_session.start(code_path=REPOSITORY, cpus=2, environment={"PYTHONPATH": str(HERE)}):
        yield
