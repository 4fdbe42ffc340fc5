from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from gpt.chat import encode_prompt, encode_response
from gpt.model import GPT, RewardModel, save_model
from gpt.reward_scorer import RewardScorer, end_scores, value_model
from gpt.rl.scorers import RewardModelScorer
from gpt.rl.scoring import Rollout
from gpt.settings import GPTConfig
from gpt.tokenizer import byte_tokenizer

CPU = torch.device("cpu")
TOKENIZER = byte_tokenizer()
SHAPE = GPTConfig(n_layer=1, n_head=2, n_embd=16, seq_len=16, dropout=0.1, vocab_size=TOKENIZER.vocab_size)


def asked(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def saved_reward_model(folder: Path) -> RewardModel:
    """Save an untrained reward model to a folder and return it."""
    generator = torch.Generator().manual_seed(2)
    model = RewardModel.from_policy(GPT(SHAPE, generator), generator).eval()
    save_model(folder, SHAPE, dict(model.named_parameters()), RewardModel)
    return model


def conversation(prompt: str, response: str) -> list[int]:
    return [*encode_prompt(TOKENIZER, asked(prompt)), *encode_response(TOKENIZER, response)]


@torch.no_grad()
def slow_score(model: RewardModel, token_ids: list[int]) -> float:
    """Score a row by itself, without padding."""
    return model(torch.tensor([token_ids]))[0, -1].item()


def test_the_score_is_read_at_the_end_token_regardless_of_padding(tmp_path):
    # The second response ends in the byte 0, which is also what rows are padded with.
    model = saved_reward_model(tmp_path)
    rows = [conversation("q", text) for text in ("a", "a\0\0", "abcdefg")]
    assert [row[-1] for row in rows] == [TOKENIZER.special["end"]] * 3
    together = end_scores(model, rows, CPU)
    assert together.tolist() == pytest.approx([slow_score(model, row) for row in rows], abs=1e-6)
    assert len({round(score, 3) for score in together.tolist()}) == 3


def test_a_scorer_normalises_the_score_at_the_end_token(tmp_path):
    model = saved_reward_model(tmp_path)
    responses = ["a" * (1 + n % 8) for n in range(40)]  # more than one pass, of unequal lengths
    scores = RewardScorer(tmp_path, mean=0.5, std=2.0, device=CPU).scores(
        [encode_prompt(TOKENIZER, asked("q"))] * 40, [encode_response(TOKENIZER, response) for response in responses]
    )
    assert scores.tolist() == pytest.approx([(slow_score(model, conversation("q", each)) - 0.5) / 2.0 for each in responses], abs=1e-6)


def test_a_reward_model_scorer_is_sent_to_the_ranks_without_its_weights(tmp_path):
    saved_reward_model(tmp_path)
    prompt, response = encode_prompt(TOKENIZER, asked("q")), encode_response(TOKENIZER, "ab")
    sent = pickle.dumps(RewardModelScorer(tmp_path, mean=0.5, std=2.0))
    assert len(sent) < 1000
    arrived = pickle.loads(sent)
    arrived.open(CPU)
    [score] = arrived.scores([Rollout({}, prompt, response, "ab")]).scores.tolist()
    assert score == RewardScorer(tmp_path, mean=0.5, std=2.0, device=CPU).scores([prompt], [response]).item()


def test_the_value_model_starts_as_the_normalised_score(tmp_path):
    saved_reward_model(tmp_path)
    scorer = RewardScorer(tmp_path, mean=-0.7, std=0.25, device=CPU)
    prompt, response = encode_prompt(TOKENIZER, asked("q")), encode_response(TOKENIZER, "abc")
    with torch.no_grad():
        values = value_model(tmp_path, mean=-0.7, std=0.25)(torch.tensor([[*prompt, *response]]))  # (1, T)
    assert values[0, -1].item() == pytest.approx(scorer.scores([prompt], [response]).item(), abs=1e-5)
