"""A model's answers to prompts, and what can be counted about them: right to the letter, declined, cut off, and how far from another model.

Left out: answers that are right in other words. Who wants those judged brings a reward model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpt.batching import padded
from gpt.chat import Message, encode_prompt
from gpt.losses import chosen_logprobs
from gpt.model import GPT
from gpt.random_streams import stream_seed
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
    figures = {"truncated_share": _share(not each.stopped for each in answers)}
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
        rows = padded([[*each.prompt_ids, *each.token_ids] for each in part], pad_id)  # (B, T + 1)
        logprobs = chosen_logprobs(model(rows[:, :-1]), rows[:, 1:], temperature)  # (B, T)
        places = torch.arange(rows.shape[1] - 1)[None]  # (1, T): place t predicts token t + 1
        begins = torch.tensor([[len(each.prompt_ids) - 1] for each in part])
        ends = begins + torch.tensor([[len(each.token_ids)] for each in part])
        response_mask = (places >= begins) & (places < ends)  # (B, T) True = predicts a token of the response
        totals.append(torch.where(response_mask, logprobs, 0.0).double().sum(dim=1))
    return torch.cat(totals)


def _share(truths: Iterable[bool]) -> float:
    found = list(truths)
    return sum(found) / len(found)
