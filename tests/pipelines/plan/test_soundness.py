"""The key is sound: every project function that ran for a stage is in that stage's key.

Each kind runs on tiny data in this process while a profiler records which functions ran. Code behind `StageContext` and `Rank`
is left out by design: it decides how work is carried out, not what the result is.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

from pipelines.plan.code import Code
from pipelines.plan.config import load
from pipelines.plan.environment import ROOT
from pipelines.plan.graph import build
from pipelines.run import execute as executing
from pipelines.run.execute import Job
from pipelines.run.runner import Options, Run
from pipelines.store.store import Store
from tests.pipelines.plan.sound_pipeline import write_sound_pipeline
from tests.pipelines.run.small import NoTracker

BEHIND_THE_SEAM = (  # StageContext and Rank, and what stands behind them
    "pipelines/observe/",
    "pipelines/plan/",
    "pipelines/run/",
    "pipelines/store/",
    "cluster/",
)


class Profiler:
    """Records which functions of the project run in any thread, by file and name."""

    def __init__(self) -> None:
        self.ran: set[CodeType] = set()

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        # Not the body of a class, which runs when its module is imported and only defines.
        if event == "call" and frame.f_code.co_flags & inspect.CO_OPTIMIZED:
            self.ran.add(frame.f_code)

    def __enter__(self) -> Profiler:
        threading.setprofile(self)
        sys.setprofile(self)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)

    def functions(self) -> Iterator[tuple[str, str]]:
        """The (module, top-level name) of each function that ran."""
        for code in self.ran:
            path = Path(code.co_filename)
            if not path.is_relative_to(ROOT) or "site-packages" in path.parts or ".venv" in path.parts:
                continue
            place = path.relative_to(ROOT).as_posix()
            name = code.co_qualname.split(".")[0]
            if (
                place.split("/")[0] in ("pipelines", "gpt", "cluster")
                and not place.startswith(BEHIND_THE_SEAM)
                and not name.startswith("<")
            ):
                yield place.removesuffix(".py").replace("/", "."), name


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, save_foreign: Callable[..., Any]) -> dict[str, tuple[set[tuple[str, str]], set[str]]]:
    """For each stage, what ran and what its key holds."""
    folder = tmp_path_factory.mktemp("sound")
    save_foreign(folder / "foreign", shards="4KB", tie_word_embeddings=False)
    graph = build(load(write_sound_pipeline(folder)))
    store = Store(folder / "store")
    found: dict[str, tuple[set[tuple[str, str]], set[str]]] = {}
    real = executing.execute

    def profiled(job: Job, *arguments: Any) -> Any:
        with Profiler() as profiler:
            outcome = real(job, *arguments)
        assert outcome.error is None, outcome.traceback
        code = Code(ROOT, folder).leaves(graph.stages[job.stage].kind.entries())
        found[job.stage] = (set(profiler.functions()), set(code))
        return outcome

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.run.task.execute", profiled)
        patch.setattr("pipelines.run.runner.start_tracking", lambda *_: NoTracker())
        assert Run(graph, store, Options("test", "test", inline=True), lambda event: None).execute() == 0
    return found


STAGES = [
    "lines",
    "records",
    "tokenizer",
    "bytes",
    "tokenize",
    "gpt2-nano",
    "llama-nano",
    "transformer-nano",
    "further",
    "conversations",
    "preferences",
    "ratings",
    "prompts",
    "sft",
    "evaluate",
    "examine",
    "export",
    "reward_model",
    "sums",
    "rl",
    "reinforced",
    "import_hf_tokenizer",
    "import_hf",
]


@pytest.mark.parametrize("stage", STAGES)
def test_every_function_that_ran_is_in_the_stages_key(ran: dict[str, tuple[set[tuple[str, str]], set[str]]], stage: str):
    functions, key = ran[stage]
    assert any(module.startswith("pipelines.stages.") for module, _ in functions), "the profiler did not see the stage's own function"
    missing = sorted(f"{module}:{name}" for module, name in functions if f"{module}:{name}" not in key)
    assert missing == []


def test_the_profiler_would_notice_a_function_outside_the_key(ran: dict[str, tuple[set[tuple[str, str]], set[str]]]):
    functions, _ = ran["gpt2-nano"]
    _, key = ran["tokenizer"]
    assert any(f"{module}:{name}" not in key for module, name in functions)
