"""Run gptline's own loops on a wrapped rank, so that they fail where a test says. Tests copy this file beside their TOML.

    fault = "rank 1: die at 12"      kills itself in the middle of its 13th step, with twelve done, before the policy learns
    fault = "rank 0: wait at 12"     waits there until it is killed or the file `go` appears; leaves a mark when a stop reaches it
    fault = "rank 0: pause at 12"    waits there until a stop reaches it
    fault = "rank 1: raise at 12"    raises there

    fault = "rank 1: die at 2 in rollout"    at the end of that section: rollout, update, evaluate, checkpoint
    fault = "rank 1: die at 2 in value"      before that model learns: policy, value, reward

Each fault happens once: it leaves a mark in `marks`, a folder outside the store. Several are separated by semicolons.
`count` is a stage of another branch, and `copy` one whose process is killed while it publishes.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gpt.settings import Operational
from pipelines.artifacts import Conversations, Documents, Model, Preferences, Prompts, Report, Tokens
from pipelines.stage import StageConfig, StageContext
from pipelines.stages.pretrain import PretrainConfig
from pipelines.stages.pretrain import pretrain as sound_pretrain
from pipelines.stages.reward_model import RewardModelConfig
from pipelines.stages.reward_model import reward_model as sound_reward_model
from pipelines.stages.rl import RlConfig
from pipelines.stages.rl import rl as sound_rl
from pipelines.stages.sft import SftConfig
from pipelines.stages.sft import sft as sound_sft


class Faults(StageConfig):
    fault: Operational[str] = ""
    marks: Operational[str] = "."


class FaultyPretrain(PretrainConfig, Faults):
    pass


class FaultySft(SftConfig, Faults):
    pass


class FaultyRewardModel(RewardModelConfig, Faults):
    pass


class FaultyRl(RlConfig, Faults):
    pass


def pretrain(config: FaultyPretrain, tokens: list[Tokens], stage: StageContext) -> Model:
    return sound_pretrain(config, tokens, None, FaultyStage(stage))


def sft(config: FaultySft, policy: Model, conversations: list[Conversations], stage: StageContext) -> Model:
    return sound_sft(config, policy, conversations, FaultyStage(stage))


def reward_model(config: FaultyRewardModel, policy: Model, preferences: list[Preferences], stage: StageContext) -> Model:
    return sound_reward_model(config, policy, preferences, None, FaultyStage(stage))


def rl(config: FaultyRl, policy: Model, prompts: list[Prompts], reward_model: Model, stage: StageContext) -> Model:
    return sound_rl(config, policy, prompts, reward_model, FaultyStage(stage))


def count(documents: Documents, stage: StageContext) -> Report:
    (stage.output / "report.json").write_text(str(documents.metadata["train"]["documents"]))
    return stage.publish(Report)


class CopyConfig(StageConfig):
    marks: Operational[str] = "."


def copy(config: CopyConfig, documents: Documents, stage: StageContext) -> Documents:
    from pipelines.store.store import FolderBackend

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


class FaultyStage:
    """A stage whose gang runs its loop on wrapped ranks."""

    def __init__(self, stage: StageContext) -> None:
        self._inner = stage

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def gang(self, loop: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
        return self._inner.gang(train, loop, *arguments)


def train(rank: Any, loop: Callable[..., Any], config: Faults, *arguments: Any) -> dict[str, Any] | None:
    return loop(FaultyRank(rank, config), config, *arguments)


class FaultyRank:
    """A rank that fails at the end of a section, or whose engine fails between the backward pass and the optimizer."""

    def __init__(self, rank: Any, config: Faults) -> None:
        self._inner = rank
        self._config = config
        self.finished = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def engine(self, name: str, *arguments: Any) -> FaultyEngine:
        return FaultyEngine(self._inner.engine(name, *arguments), name, self)

    def restore(self) -> int:
        self.finished = self._inner.restore()
        return self.finished

    @contextlib.contextmanager
    def section(self, name: str, deadline_s: float) -> Iterator[None]:
        with self._inner.section(name, deadline_s):
            yield
            self.fail(name)
        self.finished += name in ("step", "update")

    def fail(self, here: str) -> None:
        for rank, deed, step, place in re.findall(r"rank (\d+): (\w+) at (\d+)(?: in (\w+))?", self._config.fault):
            is_here = (int(rank), int(step), place or "policy") == (self._inner.rank, self.finished, here)
            if is_here and self._first_time("-".join(filter(None, (deed, rank, step, place)))):
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
        return self._inner._stop_requested()  # only of this rank: should_stop() is a collective, and the other ranks are elsewhere

    def _raise(self) -> None:
        raise ZeroDivisionError("the data has no end")


class FaultyEngine:
    def __init__(self, engine: Any, name: str, rank: FaultyRank) -> None:
        self._inner = engine
        self._name = name
        self._rank = rank

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __call__(self, *arguments: Any) -> Any:
        return self._inner(*arguments)

    def step(self, lr: float) -> float:
        self._rank.fail(self._name)
        return self._inner.step(lr)
