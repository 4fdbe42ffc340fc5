"""The share of signal in a policy gradient, with numbers that one can check by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.rl_signal import cosine, gradient, leave_one_out, main, responses_needed
from gpt.chat import encode_prompt
from gpt.model import GPT, save_model
from gpt.settings import PRESETS, GPTConfig
from gpt.tokenizer import byte_tokenizer
from pipelines.store.store import Store

TOKENIZER = byte_tokenizer()
CONFIG = GPTConfig(**PRESETS["gpt2-nano"].model_dump(), vocab_size=TOKENIZER.vocab_size)


def test_an_answers_advantage_is_its_reward_less_the_mean_of_the_others() -> None:
    worth = leave_one_out(torch.tensor([[1.0, 0.0, 0.0, 1.0], [5.0, 5.0, 5.0, 5.0]]))
    torch.testing.assert_close(worth, torch.tensor([[2 / 3, -2 / 3, -2 / 3, 2 / 3], [0.0, 0.0, 0.0, 0.0]]))


def test_if_halves_of_100_agree_by_a_quarter_300_responses_have_as_much_signal_as_noise() -> None:
    assert responses_needed(0.25, 100) == 300
    assert responses_needed(0.5, 100) == 100
    assert responses_needed(-0.1, 100) is None
    assert cosine(torch.tensor([3.0, 4.0]), torch.tensor([4.0, 3.0])) == pytest.approx(24 / 25)
    assert cosine(torch.zeros(2), torch.ones(2)) == 0


def test_the_gradient_is_that_of_each_answers_log_probability_times_its_advantage() -> None:
    model = GPT(CONFIG, torch.Generator().manual_seed(1)).eval()
    rows = [([1, 2, 3], [4, 5]), ([6], [7, 8, 9])]
    found = gradient(model, rows, torch.tensor([2.0, -1.0]), pad=0)
    total = torch.zeros(())
    for (prompt, response), worth in zip(rows, (2.0, -1.0), strict=True):
        logprobs = model(torch.tensor([[*prompt, *response]]))[0].log_softmax(dim=-1)  # (T, V)
        total = total + worth * sum(logprobs[len(prompt) - 1 + place, token] for place, token in enumerate(response)) / 2
    expected = torch.cat([each.flatten() for each in torch.autograd.grad(total, list(model.parameters()))])
    torch.testing.assert_close(found, expected)


def test_one_answer_to_all_questions_is_pure_signal_when_supervised_and_none_when_never_sampled(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    policy, prompts = store.new_folder(), store.new_folder()
    model = GPT(CONFIG, torch.Generator().manual_seed(1))
    save_model(policy, CONFIG, dict(model.named_parameters()))
    TOKENIZER.save(policy / "tokenizer.json")
    records = [{"prompt": [{"role": "user", "content": f"{number}?"}], "reference": "so it is"} for number in range(8)]
    (prompts / "train.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    assert len(encode_prompt(TOKENIZER, records[0]["prompt"])) + 8 < CONFIG.seq_len
    references = [store.publish(policy, "policy", {}).digest, store.publish(prompts, "prompts", {}).digest]
    main([*references, "--store", str(store.root), "--responses", "2", "--max-tokens", "8", "--out", str(tmp_path / "out")])
    row = json.loads((tmp_path / "out" / "rl_signal.json").read_text())
    assert row["cosines"]["supervised"] > 0.9
    assert (row["cosines"]["right_answer"], row["ours"]) == (0, None)
    assert (row["questions"], row["responses_in_each_half"]) == (8, 8)
