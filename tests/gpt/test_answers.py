"""Answers counted by hand, and their logprobs compared with those of single rows."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from gpt.answers import Answer, Answered, Examiner, answer, answer_figures, response_logprobs
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


def given(text: str, stopped: bool = True) -> Answer:
    return Answer([ASSISTANT], [*text.encode(), END], text, stopped)


def test_evaluation_imports_no_training_loop():
    loops = ("gpt.loop", "gpt.pretrain", "gpt.sft", "gpt.reward", "gpt.rl.loop")
    program = f"import sys, gpt.answers, gpt.evaluation; print([name for name in {loops} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_right_answers_refusals_and_false_refusals_are_counted_separately():
    answers = [given("a"), given("b "), given("c", stopped=False), given(NO), given(NO), given("d")]
    references = ["a", "b", "c", "d", NO, NO]
    assert answer_figures(answers, references, refusal=NO) == {
        "exactly_right": 2 / 4,  # a and b; c was cut off, and d was declined
        "declined": 1 / 2,
        "false_refusals": 1 / 4,
    }
    assert answer_figures(answers, references) == {"exactly_right": 3 / 6}


def test_an_answer_does_not_depend_on_its_neighbours_and_ends_with_its_end_token(model):
    prompts = [[{"role": "user", "content": text}] for text in ("a", "bcd", "ef")]
    shown: list[tuple[int, int]] = []
    drawn = answer(
        model, TOKENIZER, prompts, seed=1, name="test", max_tokens=8, temperature=1.0, on_progress=lambda *counts: shown.append(counts)
    )
    assert shown == [(3, 3)]
    by_itself = answer(model, TOKENIZER, prompts[:1], seed=1, name="test", max_tokens=8, temperature=1.0)
    assert drawn[0] == by_itself[0]
    assert all(each.stopped == (each.token_ids[-1] == END) for each in drawn)
    assert all(each.text == TOKENIZER.decode(t for t in each.token_ids if t != END) for each in drawn)


@pytest.mark.parametrize("held", [1, 5, 1024])
def test_response_logprobs_equal_those_of_single_rows_however_few_logits_are_computed_at_once(model, monkeypatch, held):
    prompts = [[{"role": "user", "content": text}] for text in ("a", "bcd")]
    answers = answer(model, TOKENIZER, prompts, seed=1, name="test", max_tokens=6, temperature=0.7)
    expected = []
    for each in answers:
        row = [*each.prompt_ids, *each.token_ids]
        logprobs = model(torch.tensor([row[:-1]]))[0].log_softmax(dim=-1)
        expected.append(sum(logprobs[place, row[place + 1]].item() for place in range(len(each.prompt_ids) - 1, len(row) - 1)))
    most = []
    hook = model.output.register_forward_hook(lambda module, inputs, logits: most.append(logits.shape[:-1].numel()))
    monkeypatch.setattr("gpt.answers.LOGITS_AT_ONCE", held)
    found = response_logprobs(model, answers).tolist()
    hook.remove()
    assert found == pytest.approx(expected, abs=1e-4)
    assert sum(most) == sum(len(each.token_ids) for each in answers)  # none is computed for the prompts
    assert max(most) <= held


def test_only_the_number_after_the_last_marker_counts_and_never_in_a_truncated_answer():
    answers = [given("2 + 2 = 4\n#### 4"), given("#### 4.0"), given("4"), given("#### 5"), given("#### 4", stopped=False), given("#### 4")]
    references = ["#### 4", "so #### 4", "4", "4", "4", "many"]
    assert answer_figures(answers, references, number_marker="####") == {
        "exactly_right": 1 / 6,  # the third
        "number_right": 2 / 5,  # the first two; the last one's reference has no number
    }


def test_the_best_of_four_scores_highest_and_the_gain_is_in_deviations_of_the_baselines_scores(model):
    class Lengths:
        """Scores a response by its tokens."""

        def scores(self, prompts, responses):
            return torch.tensor([float(len(response)) for response in responses])

    questions = [{"prompt": [{"role": "user", "content": text}]} for text in "abcdefgh"]
    examiner = Examiner(TOKENIZER, questions, 1, answer_tokens=8, scorer=Lengths(), missing_end_score=-1.0)  # type: ignore[arg-type]
    answered = examiner.answers_of(model)

    def scores(answers):
        return [float(len(each.token_ids)) if each.stopped else -1.0 for each in answers]

    assert answered.scores.tolist() == scores(answered.drawn)
    prompts = [question["prompt"] for question in questions]
    names = ("evaluate drawn", "evaluate drawn 2", "evaluate drawn 3", "evaluate drawn 4")
    draws = [answer(model, TOKENIZER, prompts, seed=1, name=name, max_tokens=8, temperature=1.0) for name in names]
    best = [max(each) for each in zip(*map(scores, draws), strict=True)]
    assert examiner.best_of(4, answered) == {"best_of_score_mean": sum(best) / 8}

    baseline = Answered(model, answered.likeliest, answered.drawn, torch.tensor([1.0, 3.0] * 4, dtype=torch.float64))
    found = examiner.compare(answered, baseline)
    mean = sum(scores(answered.drawn)) / 8
    assert found == {"kl_nats_per_response": 0.0, "baseline_score_mean": 2.0, "score_gain_in_deviations": mean - 2.0}
