"""A Ray session per module for the tests that start one, and the path by which workers find the tests' own functions."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
# Functions go to other processes by reference, so these must know them by the same plain name as the tests do.
sys.path.insert(0, str(HERE))


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    from cluster import ray_session

    with ray_session.start(code_path=REPOSITORY, cpus=2, environment={"PYTHONPATH": str(HERE)}):
        yield
