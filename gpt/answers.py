"""A model's answers to prompts, and what can be counted about them: right to the letter, declined, cut off, and how far from another model.

Left out: answers that are right in other words. Who wants those judged brings a reward model.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt.batching import padded
from gpt.chat import Message, encode_prompt
from gpt.losses import chosen_logprobs
from gpt.model import GPT, load_config, load_model
from gpt.random_streams import stream_seed
from gpt.reward import RewardScorer
from gpt.sampling import sample
from gpt.tokenizer import Tokenizer

ROWS = 64
"""Prompts that are read at a time."""


@dataclass(frozen=True)
class Answer:
    prompt_ids: list[int]
    token_ids: list[int]
    """With the end token, where the model wrote one."""
    text: str
    stopped: bool
    """False: it was cut off."""


def answer(
    model: GPT, tokenizer: Tokenizer, prompts: Sequence[Sequence[Message]], *, seed: int, name: str, max_tokens: int, temperature: float
) -> list[Answer]:
    """One answer to each prompt; `name` and the prompt's place name the stream that it draws from. Temperature 0: the likeliest tokens."""
    end = tokenizer.special["end"]
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    answers = []
    for first in range(0, len(encoded), ROWS):
        rows = encoded[first : first + ROWS]
        streams = [stream_seed(seed, name, first + row) for row in range(len(rows))]
        responses = sample(model, rows, streams=streams, max_tokens=max_tokens, temperature=temperature, stop_ids=(end,))
        for prompt_ids, response in zip(rows, responses, strict=True):
            text = tokenizer.decode(token_id for token_id in response.token_ids if token_id != end)
            answers.append(Answer(prompt_ids, response.token_ids, text, response.stopped))
    return answers


def is_right(answer: Answer, reference: str) -> bool:
    """To the letter, but for space around it; what was cut off is not an answer."""
    return answer.stopped and answer.text.strip() == reference.strip()


def answer_figures(answers: Sequence[Answer], references: Sequence[str], refusal: str | None = None) -> dict[str, float]:
    """Shares of answers: `exactly_right`, of those that have one; with a refusal, `declined` and `false_refusals` apart from these."""
    pairs = list(zip(answers, references, strict=True))
    known = [(each, reference) for each, reference in pairs if reference != refusal]
    figures = {}
    if known:
        figures["exactly_right"] = _share(is_right(each, reference) for each, reference in known)
    if refusal is not None:
        unknown = [each for each, reference in pairs if reference == refusal]
        if unknown:
            figures["declined"] = _share(is_right(each, refusal) for each in unknown)
        if known:
            figures["false_refusals"] = _share(is_right(each, refusal) for each, _ in known)
    return figures


@torch.no_grad()
def response_logprobs(model: GPT, answers: Sequence[Answer], *, temperature: float, pad_id: int) -> Tensor:
    """The log-probability (B,) in nats that the model gives to each whole response after its prompt, end token included."""
    totals = []
    for first in range(0, len(answers), ROWS):
        part = answers[first : first + ROWS]
        rows = padded([[*each.prompt_ids, *each.token_ids] for each in part], pad_id).to(model.token_embedding.weight.device)  # (B, T + 1)
        logprobs = chosen_logprobs(model(rows[:, :-1]), rows[:, 1:], temperature).cpu()  # (B, T)
        places = torch.arange(rows.shape[1] - 1)[None]  # (1, T): place t predicts token t + 1
        begins = torch.tensor([[len(each.prompt_ids) - 1] for each in part])
        ends = begins + torch.tensor([[len(each.token_ids)] for each in part])
        response_mask = (places >= begins) & (places < ends)  # (B, T) True = predicts a token of the response
        totals.append(torch.where(response_mask, logprobs, 0.0).double().sum(dim=1))
    return torch.cat(totals)


class Examiner:
    """One set of questions put to several models, each by the likeliest tokens and by a draw at temperature 1.

    `Examiner([{"prompt": [...], "reference": "Yes."}], [folder], seed=1, refusal=None, max_tokens=64).examine(folder)` are the figures.
    """

    def __init__(
        self,
        questions: Sequence[Mapping[str, Any]],
        folders: Sequence[Path],
        seed: int,
        *,
        refusal: str | None,
        max_tokens: int,
        device: str = "cpu",
    ) -> None:
        """A question is `{"prompt": [messages], "reference": right answer, None or absent}`; `folders` are all models that will read it.

        Questions that leave no room for an answer of `max_tokens` within the shortest seq_len are not put, and counted in `too_long`.
        """
        tokenizer = Tokenizer.load(folders[0] / "tokenizer.json")
        room = min(load_config(folder).seq_len for folder in folders) - max_tokens
        put = [question for question in questions if len(encode_prompt(tokenizer, question["prompt"])) <= room]
        if not put:
            raise ValueError(
                f"none of {len(questions)} questions leaves room for answer_tokens = {max_tokens} within the models' seq_len = "
                f"{room + max_tokens}; ask shorter ones, or set a lower answer_tokens"
            )
        self.too_long = len(questions) - len(put)
        self._prompts = [question["prompt"] for question in put]
        self._references = [question.get("reference") for question in put]
        self._seed = seed
        self._refusal = refusal
        self._max_tokens = max_tokens
        self._device = torch.device(device)
        self._scorer: RewardScorer | None = None
        self._missing_end_score = 0.0
        self._columns: dict[str, list[Any]] = {}

    def score_by(self, folder: Path, mean: float, std: float, *, missing_end_score: float) -> None:
        """From now on answers are scored too, by the reward model of this folder; one that was cut off gets the score for that."""
        self._scorer = RewardScorer(folder, mean, std, self._device)
        self._missing_end_score = missing_end_score

    def examine(self, folder: Path, *, best_of: int | None = None) -> dict[str, float]:
        """How the model of this folder does; `best_of` draws so many and takes the one that scores highest."""
        likeliest = self._answers(folder, "likeliest", temperature=0.0)
        drawn = self._answers(folder, "drawn", temperature=1.0)
        figures = self._figures(likeliest)
        figures |= {f"{name}_sampled": value for name, value in self._figures(drawn).items() if name == "exactly_right"}
        figures["truncated_share"] = _share(not each.stopped for each in likeliest)
        figures["response_tokens"] = sum(len(each.token_ids) for each in likeliest) / len(likeliest)
        self._columns = {"answer": [each.text for each in likeliest], "drawn": [each.text for each in drawn]}
        if self._scorer:
            scores = self._scores(drawn)
            figures |= {"score_mean": scores.mean().item(), "score_std": scores.std(correction=0).item()}
            self._columns["score"] = [round(score, 3) for score in scores.tolist()]
        if best_of:
            candidates = [drawn, *(self._answers(folder, f"drawn {number}", temperature=1.0) for number in range(2, best_of + 1))]
            scored = torch.stack([self._scores(each) for each in candidates])  # (best_of, questions)
            best = [candidates[number][place] for place, number in enumerate(scored.argmax(dim=0).tolist())]
            figures |= {f"best_of_{name}": value for name, value in self._figures(best).items()}
            figures["best_of_score_mean"] = scored.max(dim=0).values.mean().item()
        return figures

    def compare(self, folder: Path, baseline: Path) -> dict[str, float]:
        """What the baseline does with the same questions and draws, how far the model has gone from it, and what it gained by that."""
        likeliest = self._answers(baseline, "likeliest", temperature=0.0)
        drawn = self._answers(baseline, "drawn", temperature=1.0)
        figures = {f"baseline_{name}": value for name, value in self._figures(likeliest).items()}
        answers = self._answers(folder, "drawn", temperature=1.0)
        pad_id = Tokenizer.load(folder / "tokenizer.json").special["pad"]
        models = (load_model(each).to(self._device) for each in (folder, baseline))
        ours, theirs = (response_logprobs(each, answers, temperature=1.0, pad_id=pad_id) for each in models)
        figures["kl_nats_per_response"] = (ours - theirs).mean().item()
        self._columns |= {"baseline": [each.text for each in likeliest], "baseline_drawn": [each.text for each in drawn]}
        if self._scorer:
            scores, before = self._scores(answers), self._scores(drawn)
            figures["baseline_score_mean"] = before.mean().item()
            deviation = before.std(correction=0).item()
            if deviation:
                figures["score_gain_in_deviations"] = (scores.mean().item() - before.mean().item()) / deviation
        return figures

    def samples(self, n: int) -> list[dict[str, Any]]:
        """Of `n` questions, spread evenly, what was asked, what is right and what each model said."""
        n = min(n, len(self._prompts))
        places = [number * len(self._prompts) // n for number in range(n)]
        columns = {"prompt": [prompt[-1]["content"] for prompt in self._prompts], "reference": self._references, **self._columns}
        return [{name: column[place] for name, column in columns.items()} for place in places]

    @functools.cache  # noqa: B019  (an examiner lives as long as its evaluation)
    def _answers(self, folder: Path, name: str, *, temperature: float) -> list[Answer]:
        tokenizer = Tokenizer.load(folder / "tokenizer.json")
        return answer(
            load_model(folder).to(self._device),
            tokenizer,
            self._prompts,
            seed=self._seed,
            name=f"evaluate {name}",
            max_tokens=self._max_tokens,
            temperature=temperature,
        )

    def _figures(self, answers: Sequence[Answer]) -> dict[str, float]:
        known = [(each, reference) for each, reference in zip(answers, self._references, strict=True) if reference is not None]
        return answer_figures([each for each, _ in known], [reference for _, reference in known], self._refusal) if known else {}

    def _scores(self, answers: Sequence[Answer]) -> Tensor:
        assert self._scorer is not None, "score_by comes first"
        stopped = [each.stopped for each in answers]
        scores = self._scorer.scores([each.prompt_ids for each in answers], [each.token_ids for each in answers]).cpu()
        return torch.where(torch.tensor(stopped), scores, self._missing_end_score).double()


def _share(truths: Iterable[bool]) -> float:
    found = list(truths)
    return sum(found) / len(found)
