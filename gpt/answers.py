"""A model's answers to questions, and what can be counted about them: right, declined, cut off, and how far from another model's.

Left out: answers that are right in other words; a reward model can score those.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpt.batching import evenly, padded
from gpt.chat import Message, encode_prompt
from gpt.losses import chosen_logprobs
from gpt.model import GPT
from gpt.numbers import has_number, reference_number
from gpt.random_streams import stream_seed
from gpt.reward_scorer import RewardScorer
from gpt.sampling import sample
from gpt.tokenizer import Tokenizer

ROWS_AT_ONCE = 64
"""Prompts that are read together."""
LOGITS_AT_ONCE = 1024
"""Tokens whose logits are computed together: each is a row of V, and several copies are alive at once."""


@dataclass(frozen=True)
class Answer:
    prompt_ids: list[int]
    token_ids: list[int]
    """Includes the end token if the model wrote one."""
    text: str
    stopped: bool
    """True: the model ended the answer itself. False: it was cut off."""


@dataclass(frozen=True)
class Answered:
    """A model and its answers to all questions."""

    model: GPT
    likeliest: list[Answer]
    """At temperature 0: always the likeliest token."""
    drawn: list[Answer]
    """At temperature 1, from the same random streams for every model."""
    scores: Tensor | None
    """(B,), the drawn answers' scores. None without a scorer."""


def questions_with_room(
    questions: Sequence[Mapping[str, Any]], tokenizer: Tokenizer, *, seq_len: int, answer_tokens: int
) -> list[Mapping[str, Any]]:
    """Keep the questions whose prompt leaves room for an answer within `seq_len`; ValueError if none does."""
    fitting = [each for each in questions if len(encode_prompt(tokenizer, each["prompt"])) <= seq_len - answer_tokens]
    if not fitting:
        raise ValueError(
            f"none of {len(questions)} questions leaves room for answer_tokens = {answer_tokens} within the models' seq_len = {seq_len}; "
            "use shorter questions, or a lower answer_tokens"
        )
    return fitting


@dataclass(frozen=True)
class Examiner:
    """Asks one model after another the same questions: `examiner.figures(examiner.answers_of(model))`."""

    tokenizer: Tokenizer
    questions: Sequence[Mapping[str, Any]]
    """`{"prompt": [messages], "reference": right answer, None or absent}`"""
    seed: int
    answer_tokens: int
    refusal: str | None = None
    number_marker: str | None = None
    scorer: RewardScorer | None = None
    missing_end_score: float = -1.0
    """Score of an answer that was cut off."""
    on_progress: Callable[[int, int], None] = lambda done, total: None
    """Called with the answers written so far and their total, for each pass over the questions."""

    def answers_of(self, model: GPT) -> Answered:
        drawn = self._ask(model, "drawn", temperature=1.0)
        return Answered(model, self._ask(model, "likeliest", temperature=0.0), drawn, self._scores(drawn) if self.scorer else None)

    def figures(self, answered: Answered) -> dict[str, float]:
        """Measure a model's answers."""
        likeliest, drawn = self._shares(answered.likeliest), self._shares(answered.drawn)
        figures = likeliest | {f"{name}_sampled": drawn[name] for name in ("exactly_right", "number_right") if name in drawn}
        figures["truncated_share"] = sum(not each.stopped for each in answered.likeliest) / len(answered.likeliest)
        figures["response_tokens"] = sum(len(each.token_ids) for each in answered.likeliest) / len(answered.likeliest)
        if answered.scores is not None:
            figures |= {"score_mean": answered.scores.mean().item(), "score_std": answered.scores.std(correction=0).item()}
        return figures

    def best_of(self, n: int, answered: Answered) -> dict[str, float]:
        """Measure what the model would answer if the highest-scoring of `n` drawn answers were taken each time."""
        assert answered.scores is not None, "without scores there is no best answer"
        more = [self._ask(answered.model, f"drawn {number}", temperature=1.0) for number in range(2, n + 1)]
        draws = [answered.drawn, *more]
        scores = torch.stack([answered.scores, *map(self._scores, more)])  # (n, B)
        best = [draws[number][row] for row, number in enumerate(scores.argmax(dim=0).tolist())]
        figures = {f"best_of_{name}": value for name, value in self._shares(best).items()}
        return figures | {"best_of_score_mean": scores.max(dim=0).values.mean().item()}

    def compare(self, answered: Answered, baseline: Answered) -> dict[str, float]:
        """Measure the baseline, how far the model has diverged from it, and what the model gained by that."""
        figures = {f"baseline_{name}": value for name, value in self._shares(baseline.likeliest).items()}
        logprobs, baseline_logprobs = (response_logprobs(each.model, answered.drawn) for each in (answered, baseline))
        figures["kl_nats_per_response"] = (logprobs - baseline_logprobs).mean().item()
        if answered.scores is not None and baseline.scores is not None:
            figures["baseline_score_mean"] = baseline.scores.mean().item()
            deviation = baseline.scores.std(correction=0).item()
            if deviation:
                figures["score_gain_in_deviations"] = (answered.scores.mean().item() - figures["baseline_score_mean"]) / deviation
        return figures

    def samples(self, n: int, answered: Answered, baseline: Answered | None) -> list[dict[str, Any]]:
        """Show `n` evenly spaced questions with their reference and each model's answers."""
        samples: list[dict[str, Any]] = []
        for row in evenly(range(len(self.questions)), n):
            question = self.questions[row]
            samples.append({"prompt": question["prompt"][-1]["content"], "reference": question.get("reference")})
            samples[-1] |= {"answer": answered.likeliest[row].text, "drawn": answered.drawn[row].text}
            if answered.scores is not None:
                samples[-1]["score"] = round(answered.scores[row].item(), 3)
            if baseline:
                samples[-1] |= {"baseline": baseline.likeliest[row].text, "baseline_drawn": baseline.drawn[row].text}
        return samples

    def _ask(self, model: GPT, name: str, *, temperature: float) -> list[Answer]:
        return answer(
            model,
            self.tokenizer,
            [question["prompt"] for question in self.questions],
            seed=self.seed,
            name=f"evaluate {name}",
            max_tokens=self.answer_tokens,
            temperature=temperature,
            on_progress=self.on_progress,
        )

    def _shares(self, answers: Sequence[Answer]) -> dict[str, float]:
        references = [question.get("reference") for question in self.questions]
        return answer_figures(answers, references, refusal=self.refusal, number_marker=self.number_marker)

    def _scores(self, answers: Sequence[Answer]) -> Tensor:
        assert self.scorer is not None, "there is no scorer"
        scores = self.scorer.scores([each.prompt_ids for each in answers], [each.token_ids for each in answers]).cpu()
        return torch.where(torch.tensor([each.stopped for each in answers]), scores, self.missing_end_score).double()


def answer(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[Message]],
    *,
    seed: int,
    name: str,
    max_tokens: int,
    temperature: float,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Answer]:
    """Answer each prompt once. `name` and the prompt's position name the stream that it draws from. Temperature 0: the likeliest tokens."""
    end = tokenizer.special["end"]
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    answers = []
    for first in range(0, len(encoded), ROWS_AT_ONCE):
        rows = encoded[first : first + ROWS_AT_ONCE]
        streams = [stream_seed(seed, name, first + row) for row in range(len(rows))]
        responses = sample(model, rows, streams=streams, max_tokens=max_tokens, temperature=temperature, stop_ids=(end,))
        for prompt_ids, response in zip(rows, responses, strict=True):
            text = tokenizer.decode(token_id for token_id in response.token_ids if token_id != end)
            answers.append(Answer(prompt_ids, response.token_ids, text, response.stopped))
        on_progress(len(answers), len(encoded))
    return answers


def is_right(answer: Answer, reference: str) -> bool:
    """Whether the answer equals the reference except for surrounding space; one that was cut off is never right."""
    return answer.stopped and answer.text.strip() == reference.strip()


def answer_figures(
    answers: Sequence[Answer], references: Sequence[str | None], *, refusal: str | None = None, number_marker: str | None = None
) -> dict[str, float]:
    """Shares of the answers that have a reference; a share of no answers is absent.

    Always `exactly_right`. With a refusal, `declined` is the share among questions whose reference is the refusal, and `exactly_right` and
    `false_refusals` are shares among the others. With a number marker, `number_right` is the share among references with a number.
    """
    pairs = [(each, reference) for each, reference in zip(answers, references, strict=True) if reference is not None]
    known = [(each, reference) for each, reference in pairs if reference != refusal]
    counted = {"exactly_right": [is_right(each, reference) for each, reference in known]}
    if number_marker is not None:
        numbers = [(each, reference_number(reference, number_marker)) for each, reference in pairs]
        counted["number_right"] = [
            each.stopped and has_number(each.text, number, number_marker) for each, number in numbers if number is not None
        ]
    if refusal is not None:
        counted["declined"] = [is_right(each, refusal) for each, reference in pairs if reference == refusal]
        counted["false_refusals"] = [is_right(each, refusal) for each, _ in known]
    return {name: sum(each) / len(each) for name, each in counted.items() if each}


@torch.no_grad()
def response_logprobs(model: GPT, answers: Sequence[Answer]) -> Tensor:
    """The logprob (B,) in nats that the model gives to each whole response after its prompt, end token included."""
    totals = []
    for first in range(0, len(answers), ROWS_AT_ONCE):
        part = answers[first : first + ROWS_AT_ONCE]
        # any id serves as padding, since no token attends to a later one
        rows = padded([[*each.prompt_ids, *each.token_ids] for each in part], 0).to(model.token_embedding.weight.device)  # (B, T + 1)
        spans = [slice(len(each.prompt_ids), len(each.prompt_ids) + len(each.token_ids)) for each in part]
        hidden = model.hidden_states(rows[:, :-1])  # (B, T, C)
        read = torch.cat([hidden[row, span.start - 1 : span.stop - 1] for row, span in enumerate(spans)])  # (all responses' tokens, C)
        written = torch.cat([rows[row, span] for row, span in enumerate(spans)])  # (all responses' tokens,)
        chunks = zip(read.split(LOGITS_AT_ONCE), written.split(LOGITS_AT_ONCE), strict=True)
        logprobs = [chosen_logprobs(model.output(each), ids, 1.0) for each, ids in chunks]
        by_response = torch.cat(logprobs).double().cpu().split([len(each.token_ids) for each in part])
        totals.append(torch.stack([each.sum() for each in by_response]))
    return torch.cat(totals)
