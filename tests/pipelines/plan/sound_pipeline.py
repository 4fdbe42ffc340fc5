"""A tiny pipeline with every stage kind, each of its settings that leads to other code, and the files that it reads."""

from __future__ import annotations

import json
from pathlib import Path

_TOML = """
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
_PRETRAIN = """
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
_AFTER = """
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
_TALKS = [
    {"prompt": f"{n}?", "response": "a" * n, "chosen": "a" * n, "rejected": "b" * n, "kind": "letters", "score": n, "instruction": f"{n}"}
    for n in range(1, 13)
]


def write_sound_pipeline(folder: Path) -> Path:
    """Write sound.toml and its files; the checkpoint that it imports from `foreign/` is left to the caller."""
    (folder / "a.txt").write_text("".join(f"line {n} of some text that repeats itself\n" for n in range(80)))
    (folder / "b.jsonl").write_text("".join(f'{{"title": "t{n % 7}", "text": "record {n} has a text"}}\n' for n in range(60)))
    (folder / "reward.py").write_text("def score(prompt, response, record):\n    return len(response) / len(prompt[0]['content'])\n")
    messages = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    (folder / "talks").mkdir()
    (folder / "talks" / "plain.json").write_text(json.dumps(_TALKS))
    (folder / "talks" / "messages.json").write_text(json.dumps([{"messages": messages}]))
    (folder / "talks" / "questions.jsonl").write_text('{"question": "?", "answer": "No."}')
    pretrain = [_PRETRAIN.format(preset=preset) for preset in ("gpt2-nano", "llama-nano", "transformer-nano")]
    (folder / "sound.toml").write_text("".join([_TOML, *pretrain, _AFTER]))
    return folder / "sound.toml"
