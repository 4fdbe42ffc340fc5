"""The key is sound: every project function that ran for a stage is in that stage's key.

Each kind runs tiny and in this process while a profiler notes which functions ran. What lies behind `StageContext` and `Rank`
is left out by design: it decides how work is carried out, not what comes out.
"""

from __future__ import annotations

import inspect
import json
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

BEHIND_THE_SEAM = (
    "pipelines/run/execute.py",  # StageContext
    "pipelines/store/store.py",
    "pipelines/plan/graph.py",
    "pipelines/store/lease.py",
    "pipelines/store/journal.py",
    "pipelines/run/runner.py",
    "pipelines/observe/progress.py",
    "cluster/commit.py",
    "cluster/checkpoint.py",
    "cluster/gang.py",
    "cluster/metric_names.py",
    "cluster/rank.py",  # Rank
)

TOML = """
pipeline = "sound"

[stages.lines]
uses = "ingest"
source = "text"
unit = "line"
files = ["*.txt"]
hold_out = { share = 0.3, by = "record" }

[stages.records]
uses = "ingest"
source = "json"
files = ["*.jsonl"]
text = "{title}\\n{text}"
fields = ["title"]
hold_out = { share = 0.5, by = "title" }

[stages.tokenizer]
algorithm = "bpe"
vocab_size = 280
inputs = { documents = ["lines", "records"] }

[stages.bytes]
uses = "tokenizer"
algorithm = "bytes"
inputs = { documents = ["lines"] }

[stages.tokenize]
inputs = { documents = ["lines", "records"], tokenizer = "tokenizer" }
"""
PRETRAIN = """
[stages.{preset}]
uses = "pretrain"
inputs = {{ tokens = "tokenize" }}
preset = "{preset}"
seq_len = 16
dropout = 0.1
steps = 4
global_batch_size = 4
lr = 1e-3
checkpoint_every = 2
eval_every = 2
"""
AFTER = """
[stages.further]
uses = "pretrain"
inputs = { tokens = "tokenize", model = "gpt2-nano" }
preset = "gpt2-nano"
seq_len = 16
steps = 2
global_batch_size = 4
lr = 1e-3
activation_checkpointing = true

[stages.conversations]
source = "json"
files = ["talks/plain.json"]
format = "plain"
hold_out = { share = 0.3, by = "prompt" }

[stages.preferences]
source = "json"
files = ["talks/plain.json"]
format = "plain"
fields = ["kind"]
hold_out = { share = 0.3, by = "prompt" }

[stages.ratings]
source = "json"
files = ["talks/plain.json"]
format = "plain"
score_range = [0, 40]
hold_out = { last = 0.3 }

[[stages.prompts.mixture]]
source = "json"
files = ["talks/messages.json"]

[[stages.prompts.mixture]]
source = "json"
files = ["talks/plain.json"]
format = "alpaca"
weight = 1.5

[stages.sft]
inputs = { policy = "gpt2-nano", conversations = ["conversations"] }
steps = 2
global_batch_size = 2
lr = 1e-3
eval_every = 1

[stages.evaluate]
inputs = { model = "gpt2-nano", documents = ["lines", "records"] }
sample_tokens = 20

[stages.examine]
uses = "evaluate"
inputs = { model = "sft", baseline = "gpt2-nano", questions = ["preferred"], reward_model = "reward_model" }
questions_file = "talks/questions.jsonl"
refusal = "No."
best_of = 2
answer_tokens = 6

[stages.preferred]
uses = "prompts"
source = "json"
files = ["talks/plain.json"]
format = "plain"
hold_out = { share = 0.3, by = "prompt" }

[stages.export]
inputs = { model = "gpt2-nano" }

[stages.reward_model]
inputs = { policy = "sft", preferences = "preferences", ratings = "ratings" }
steps = 4
global_batch_size = 4
lr = 1e-3
eval_every = 2

[stages.sums]
uses = "prompts"
source = "json"
files = ["talks/plain.json"]
format = "plain"
keys = { reference = "score" }

[stages.rl]
inputs = { policy = "sft", prompts = ["prompts", "sums"], reward_model = "reward_model" }
reward = "./reward.py:score"
steps = 2
prompts_per_step = 4
responses_per_prompt = 2
global_batch_size = 4
max_response_tokens = 6
lr = 1e-3
entropy_coef = 0.01

[stages.reinforced]
uses = "rl"
algorithm = "reinforce"
inputs = { policy = "sft", prompts = ["sums"] }
verifier = "number"
number_marker = "="
steps = 2
prompts_per_step = 4
global_batch_size = 4
max_response_tokens = 6
lr = 1e-3
kl_coef = 0

[stages.import_hf_tokenizer]
folder = "foreign"

[stages.import_hf]
folder = "foreign"
inputs = { tokenizer = "import_hf_tokenizer" }
"""
TALKS = [
    {"prompt": f"{n}?", "response": "a" * n, "chosen": "a" * n, "rejected": "b" * n, "kind": "letters", "score": n, "instruction": f"{n}"}
    for n in range(1, 13)
]


class Profiler:
    """Notes the project's functions that run, by file and name, in all threads."""

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
        """(module, top-level name) of what ran."""
        for code in self.ran:
            path = Path(code.co_filename)
            if not path.is_relative_to(ROOT) or "site-packages" in path.parts or ".venv" in path.parts:
                continue
            place = path.relative_to(ROOT).as_posix()
            name = code.co_qualname.split(".")[0]
            if place.split("/")[0] in ("pipelines", "gpt", "cluster") and place not in BEHIND_THE_SEAM and not name.startswith("<"):
                yield place.removesuffix(".py").replace("/", "."), name


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, save_foreign: Callable[..., Any]) -> dict[str, tuple[set[tuple[str, str]], set[str]]]:
    """Stage to what ran and what its key holds."""
    folder = tmp_path_factory.mktemp("sound")
    (folder / "a.txt").write_text("".join(f"line {n} of some text that repeats itself\n" for n in range(80)))
    (folder / "b.jsonl").write_text("".join(f'{{"title": "t{n % 7}", "text": "record {n} has a text"}}\n' for n in range(60)))
    save_foreign(folder / "foreign", shards="4KB", tie_word_embeddings=False)
    text = TOML + "".join(PRETRAIN.format(preset=preset) for preset in ("gpt2-nano", "llama-nano", "transformer-nano")) + AFTER
    (folder / "sound.toml").write_text(text)
    (folder / "talks").mkdir()
    (folder / "talks" / "plain.json").write_text(json.dumps(TALKS))
    (folder / "reward.py").write_text("def score(prompt, response, record):\n    return len(response) / len(prompt[0]['content'])\n")
    messages = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    (folder / "talks" / "messages.json").write_text(json.dumps([{"messages": messages}]))
    (folder / "talks" / "questions.jsonl").write_text('{"question": "?", "answer": "No."}')
    graph = build(load(folder / "sound.toml"))
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
        patch.setattr("pipelines.run.runner.execute", profiled)
        patch.setattr(Run, "_start_tracking", lambda self: _NoTracker())
        assert Run(graph, store, Options("test", "test", inline=True), lambda event: None).execute() == 0
    return found


class _NoTracker:
    def news(self) -> None: ...

    def finish(self, deadline_s: float) -> None: ...


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
