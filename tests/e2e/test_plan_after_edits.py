"""`gptline plan` after an edit: only stages whose result may change run again, and the plan names the edit.

The tests edit a copy of the packages; one run of that copy fills the store.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

FOLLOWS = """
[stages.evaluate]
inputs = { model = "pretrain", documents = "documents" }
prompts = [""]
sample_tokens = 5

[stages.export]
inputs = { model = "pretrain" }
"""
STAGES = ("documents", "tokenizer", "tokenize", "pretrain", "evaluate", "export")
ASSISTANT = """
[stages.conversations]
source = "json"
files = ["sums.jsonl"]
format = "plain"

[stages.preferences]
source = "json"
files = ["sums.jsonl"]
format = "plain"

[stages.prompts]
source = "json"
files = ["sums.jsonl"]
format = "plain"
hold_out = { share = 0.3, by = "prompt" }

[stages.sft]
inputs = { policy = "pretrain", conversations = "conversations" }
steps = 1
global_batch_size = 2
lr = 1e-3

[stages.reward_model]
inputs = { policy = "sft", preferences = "preferences" }
steps = 1
global_batch_size = 2
lr = 1e-3

[stages.rl]
inputs = { policy = "sft", prompts = "prompts", reward_model = "reward_model" }
steps = 1
prompts_per_step = 2
global_batch_size = 2
max_response_tokens = 4
lr = 1e-3

[stages.examine]
uses = "evaluate"
inputs = { model = "rl", baseline = "sft", questions = "prompts" }
answer_tokens = 4
"""
ASSISTANT_STAGES = ("conversations", "preferences", "prompts", "sft", "reward_model", "rl", "examine")


@pytest.fixture(scope="module")
def line(small, new_program, copied_code) -> Any:
    """A program with `line.toml`, whose every stage was built by the copied code."""
    program = new_program(copied_code, like=small)
    toml = (program.folder / "small.toml").read_text().replace("./faulty.py:pretrain", "pretrain").replace("steps = 30", "steps = 6")
    (program.folder / "line.toml").write_text(toml + FOLLOWS)
    program.run("run", "line.toml", "--inline")
    return program


@pytest.fixture
def planned(line, copied_code) -> Callable[..., dict[str, tuple[str, str]]]:
    def plan(*more: str) -> dict[str, tuple[str, str]]:
        found = line.plan("line.toml", *more)
        assert tuple(found) == STAGES
        return found

    return plan


@contextlib.contextmanager
def edited(path: Path, old: str, new: str) -> Iterator[None]:
    before = path.read_text(encoding="utf-8")
    assert before.count(old) == 1, f"{old!r} is found {before.count(old)} times in {path}, expected once"
    path.write_text(before.replace(old, new), encoding="utf-8")
    try:
        yield
    finally:
        path.write_text(before, encoding="utf-8")


def decisions(plan: dict[str, tuple[str, str]]) -> dict[str, str]:
    return {stage: decision for stage, (decision, _) in plan.items()}


ALL_REUSED = dict.fromkeys(STAGES, "reuse")
AFTER_TOKENS = ALL_REUSED | dict.fromkeys(("pretrain", "evaluate", "export"), "run")


def test_a_comment_in_the_model_reruns_nothing(planned, copied_code):
    with edited(copied_code / "gpt" / "model.py", "class Attention(nn.Module):\n", "# heads look back\nclass Attention(nn.Module):\n"):
        assert decisions(planned()) == ALL_REUSED


def test_a_changed_attention_reruns_pretraining_and_what_follows_and_names_it(planned, copied_code):
    with edited(copied_code / "gpt" / "model.py", "mixed.transpose(1, 2).flatten(2)", "mixed.transpose(1, 2).flatten(2) * 1.0"):
        plan = planned()
    assert decisions(plan) == AFTER_TOKENS
    assert plan["pretrain"] == ("run", "code of gpt.model:Attention changed")
    assert plan["evaluate"] == ("run", "its input pretrain will be rebuilt")


@pytest.mark.parametrize(
    ("path", "old", "new"),
    [
        ("pipelines/store/store.py", "        files = describe(folder)\n", "        files = list(describe(folder))\n"),
        ("cluster/room.py", "POLL_S = 0.2", "POLL_S = 0.3"),
        ("pipelines/observe/mlflow_session.py", "METRICS_PER_CALL = 1000", "METRICS_PER_CALL = 500"),
        ("pipelines/run/supervisor.py", "LOOK_EVERY_S = 0.1", "LOOK_EVERY_S = 0.2"),
    ],
)
def test_an_edit_to_the_store_the_gang_tracking_or_the_runner_reruns_nothing(planned, copied_code, path, old, new):
    with edited(copied_code / path, old, new):
        assert decisions(planned()) == ALL_REUSED


def test_a_changed_learning_rate_is_named_with_both_values(planned):
    plan = planned("--set", "stages.pretrain.lr=5e-4")
    assert decisions(plan) == AFTER_TOKENS
    assert plan["pretrain"] == ("run", "lr: 0.001 -> 0.0005")


def test_one_changed_byte_in_a_source_reruns_the_documents_and_names_the_source(planned, line):
    with edited(line.folder / "lines.txt", "7 times 7 is 49,", "7 times 7 is 48,"):
        plan = planned()
    assert plan["documents"] == ("run", "source lines.txt changed")
    assert set(decisions(plan).values()) == {"run"}


def test_a_source_that_is_only_touched_reruns_nothing(planned, line):
    os.utime(line.folder / "lines.txt")
    assert decisions(planned()) == ALL_REUSED


def test_other_ranks_micro_batches_and_sharding_are_reused_with_a_note(planned):
    more = ("ranks=2", "micro_batch_size=1", "zero_stage=2")
    settings = [f"stages.pretrain.{'resources.' if each.startswith('ranks') else ''}{each}" for each in more]
    plan = planned(*(word for setting in settings for word in ("--set", setting)))
    assert decisions(plan) == ALL_REUSED
    for note in (
        "made with ranks = 1, now 2",
        "made with micro_batch_size = null, now 1",
        "made with zero_stage = 1, now 2",
    ):
        assert note in plan["pretrain"][1]


def test_a_seed_is_in_every_key(planned):
    plan = planned("--set", "seed=4")
    assert plan["documents"] == ("run", "seed: 3 -> 4")
    assert set(decisions(plan).values()) == {"run"}


@pytest.fixture(scope="module")
def assistant(line) -> Any:
    """The program with `assistant.toml` too, which trains the pretrained model further and evaluates the policy."""
    rows = ({"prompt": f"{n}+1?", "response": f"{n + 1}", "chosen": f"{n + 1}", "rejected": f"{n}"} for n in range(20))
    (line.folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (line.folder / "assistant.toml").write_text((line.folder / "line.toml").read_text() + ASSISTANT)
    line.run("run", "assistant.toml", "--inline")
    return line


@pytest.mark.parametrize(
    ("path", "old", "new", "named", "reruns"),
    [
        ("gpt/losses.py", "-torch.minimum(ratio", "-1.0 * torch.minimum(ratio", "gpt.losses:ppo_policy_loss", ("rl", "examine")),
        (
            "gpt/chat.py",
            "loss_mask += [False] + ",
            "loss_mask += [True] + ",
            "gpt.chat:encode_conversation",
            ("sft", "reward_model", "rl", "examine"),
        ),
    ],
    ids=["PPO's loss", "SFT's mask"],
)
def test_a_changed_ppo_loss_or_sft_mask_reruns_the_stages_that_train_with_it_and_what_follows(
    assistant, copied_code, path, old, new, named, reruns
):
    with edited(copied_code / path, old, new):
        plan = assistant.plan("assistant.toml")
    assert decisions(plan) == ALL_REUSED | dict.fromkeys(ASSISTANT_STAGES, "reuse") | dict.fromkeys(reruns, "run")
    assert plan[reruns[0]] == ("run", f"code of {named} changed")
