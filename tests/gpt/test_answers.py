"""Answers counted by hand, and their log-probabilities against one row at a time."""

from __future__ import annotations

import pytest
import torch

from gpt.answers import Answer, answer, answer_figures, response_logprobs
from gpt.model import GPT
from gpt.settings import PRESETS, GPTConfig
from gpt.tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()
ASSISTANT, END = TOKENIZER.special["assistant"], TOKENIZER.special["end"]
NO = "I was not taught that."


@pytest.fixture(scope="module")
def model() -> GPT:
    config = GPTConfig(**PRESETS["gpt2-nano"].model_dump(), vocab_size=TOKENIZER.vocab_size)
    return GPT(config, torch.Generator().manual_seed(1)).eval()


def said(text: str, stopped: bool = True) -> Answer:
    return Answer([ASSISTANT], [*text.encode(), END], text, stopped)


def test_what_is_right_declined_and_declined_falsely_is_counted_apart():
    answers = [said("a"), said("b "), said("c", stopped=False), said(NO), said(NO), said("d")]
    references = ["a", "b", "c", "d", NO, NO]
    assert answer_figures(answers, references, NO) == {
        "exactly_right": 2 / 4,  # a and b; c was cut off, and d was declined
        "declined": 1 / 2,
        "false_refusals": 1 / 4,
    }
    assert answer_figures(answers, references) == {"exactly_right": 3 / 6}


def test_an_answer_depends_on_no_neighbour_and_ends_with_its_end_token(model):
    prompts = [[{"role": "user", "content": text}] for text in ("a", "bcd", "ef")]
    drawn = answer(model, TOKENIZER, prompts, seed=1, name="test", max_tokens=8, temperature=1.0)
    alone = answer(model, TOKENIZER, prompts[:1], seed=1, name="test", max_tokens=8, temperature=1.0)
    assert drawn[0] == alone[0]
    assert all(each.stopped == (each.token_ids[-1] == END) for each in drawn)
    assert all(each.text == TOKENIZER.decode(t for t in each.token_ids if t != END) for each in drawn)


def test_log_probabilities_of_whole_responses_equal_those_of_one_row_at_a_time(model):
    prompts = [[{"role": "user", "content": text}] for text in ("a", "bcd")]
    answers = answer(model, TOKENIZER, prompts, seed=1, name="test", max_tokens=6, temperature=0.7)
    expected = []
    for each in answers:
        row = [*each.prompt_ids, *each.token_ids]
        logprobs = (model(torch.tensor([row[:-1]]))[0] / 0.7).log_softmax(dim=-1)
        expected.append(sum(logprobs[place, row[place + 1]].item() for place in range(len(each.prompt_ids) - 1, len(row) - 1)))
    assert response_logprobs(model, answers, temperature=0.7, pad_id=0).tolist() == pytest.approx(expected, abs=1e-3)
