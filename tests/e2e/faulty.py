"""A `pretrain` that fails where a test says: gptline's own loop on a rank that is wrapped. Lies beside a test's TOML.

    fault = "rank 1: die at 12"      kills itself in the middle of its 13th step, with twelve done
    fault = "rank 0: wait at 12"     waits there until it is killed or the file `go` appears; a stop that reaches it leaves a mark
    fault = "rank 0: pause at 12"    waits there until a stop reaches it
    fault = "rank 1: raise at 12"    raises there

Each fault happens once: it leaves a mark in `marks`, a folder outside the store. Several are separated by semicolons.
`count` is a stage of another branch, and `copy` one whose process is killed while it publishes.
"""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

from gpt.settings import Operational, PretrainSettings
from pipelines.artifacts import Documents, Model, Report, Tokens
from pipelines.stage import StageConfig, StageContext


class FaultyConfig(StageConfig, PretrainSettings):
    fault: Operational[str] = ""
    marks: Operational[str] = "."


def pretrain(config: FaultyConfig, tokens: list[Tokens], stage: StageContext) -> Model:
    (first,) = tokens
    dtype, vocab_size = first.metadata["dtype"], first.metadata["vocab_size"]
    metadata = stage.gang(train, config, [first.path], dtype, vocab_size, None, stage.seed, stage.output)
    return stage.publish(Model, tokenizer=first.metadata["tokenizer"], **metadata)


def count(documents: Documents, stage: StageContext) -> Report:
    (stage.output / "report.json").write_text(str(documents.metadata["train"]["documents"]))
    return stage.publish(Report)


class CopyConfig(StageConfig):
    marks: Operational[str] = "."


def copy(config: CopyConfig, documents: Documents, stage: StageContext) -> Documents:
    from pipelines.store import FolderBackend

    put, mark = FolderBackend.put, Path(config.marks, "killed-publishing")

    def killing_put(backend: FolderBackend, name: str, data: bytes | Path) -> None:
        if name.startswith("artifacts/") and name.endswith("/train.jsonl") and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        put(backend, name, data)

    for file in ("held_out.jsonl", "rejects.jsonl", "train.jsonl"):  # published in this order
        (stage.output / file).write_bytes((documents.path / file).read_bytes())
    FolderBackend.put = killing_put  # type: ignore[method-assign]
    try:
        return stage.publish(Documents, **documents.metadata, copied=True)
    finally:
        FolderBackend.put = put  # type: ignore[method-assign]


def train(rank: Any, config: FaultyConfig, *arguments: Any) -> dict[str, Any] | None:
    from gpt import pretrain

    return pretrain.train(FaultyRank(rank, config), config, *arguments)


class FaultyRank:
    """A rank whose engine fails between the backward pass and the optimizer."""

    def __init__(self, rank: Any, config: FaultyConfig) -> None:
        self._inner = rank
        self._config = config
        self.finished = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def engine(self, *arguments: Any) -> FaultyEngine:
        return FaultyEngine(self._inner.engine(*arguments), self)

    def restore(self) -> int:
        self.finished = self._inner.restore()
        return self.finished

    def fail(self) -> None:
        for rank, deed, step in re.findall(r"rank (\d+): (\w+) at (\d+)", self._config.fault):
            if (int(rank), int(step)) == (self._inner.rank, self.finished) and self._first_time(f"{deed}-{rank}-{step}"):
                getattr(self, f"_{deed}")()

    def _first_time(self, mark: str) -> bool:
        try:
            Path(self._config.marks, mark).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def _die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def _wait(self) -> None:
        while not Path(self._config.marks, "go").exists():
            if self._asked_to_stop():
                Path(self._config.marks, f"asked-{self._inner.rank}-{self.finished}").touch()
            time.sleep(0.05)

    def _pause(self) -> None:
        while not self._asked_to_stop():
            time.sleep(0.05)

    def _asked_to_stop(self) -> bool:
        return self._inner._stop_requested()  # of this rank alone: should_stop() waits for the others, who are elsewhere

    def _raise(self) -> None:
        raise ZeroDivisionError("the data has no end")


class FaultyEngine:
    def __init__(self, engine: Any, rank: FaultyRank) -> None:
        self._inner = engine
        self._rank = rank

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __call__(self, *arguments: Any) -> Any:
        return self._inner(*arguments)

    def step(self, lr: float) -> float:
        self._rank.fail()
        norm = self._inner.step(lr)
        self._rank.finished += 1
        return norm
