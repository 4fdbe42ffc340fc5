"""Fixtures of the training tests: a Rank with checkpoints in a folder, and tokens."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

# A test's ranks are sent to other processes, which import this module by its plain name, as the tests do.
sys.path.insert(0, str(Path(__file__).parent))

from ranks import FakeRank


@pytest.fixture
def make_rank(tmp_path: Path) -> Callable[..., FakeRank]:
    """`make_rank("a")` begins a run; another call with the same name resumes from that run's checkpoints."""

    def make(name: str = "run", stop_after: int | None = None) -> FakeRank:
        folder = tmp_path / "checkpoints" / name
        folder.mkdir(parents=True, exist_ok=True)
        return FakeRank(folder, stop_after)

    return make


@pytest.fixture
def make_tokens(tmp_path: Path) -> Callable[..., Path]:
    """Make a tokens artifact's folder."""

    def make(train: Sequence[int], held_out: Sequence[int] = (), name: str = "tokens") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        np.array(train, "<u2").tofile(folder / "train.bin")
        np.array(held_out, "<u2").tofile(folder / "held_out.bin")
        (folder / "tokenizer.json").write_text("{}")
        return folder

    return make


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # models this small gain nothing from a second one
