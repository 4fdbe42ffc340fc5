"""Turn records into pairs of a preferred and a rejected response to one prompt.

    {"prompt", "chosen", "rejected"}                              both named; each a text, a message or a whole conversation
    keys.responses with keys.votes and labels                     one or more people chose one of them
    keys.responses with keys.scores or keys.ranks                 each has a score, the highest is the best, or a rank, the lowest is
    format = "tree"                                               replies at each turn, with ranks

Records without a winner (ties, equal scores) prefer nothing and are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from pipelines.ingest import trees
from pipelines.ingest.dialogue_columns import Columns, empty, number_of
from pipelines.ingest.dialogue_settings import DialogueSettings, PairSettings
from pipelines.ingest.dialogues import dialogue, prompt_of, read_response, read_responses, require_as_many
from pipelines.ingest.messages import Message, ending_with_user
from pipelines.ingest.templates import render, short


def to_pair(columns: Mapping[str, Any], settings: DialogueSettings) -> dict[str, Any]:
    """Return `{"prompt", "chosen", "rejected"}`. Where chosen and rejected are whole conversations, the prompt is what they share."""
    record = Columns(columns, settings)
    (before, chosen), (other, rejected) = (read_response(record, record.value(name), name) for name in ("chosen", "rejected"))
    if before and other and before != other:
        number = next((at for at, (ours, theirs) in enumerate(zip(before, other, strict=False), start=1) if ours != theirs), 0)
        where = f"message {number}" if number else f"message {min(len(before), len(other)) + 1}"
        raise ValueError(
            f"chosen and rejected answer two different prompts: they differ at {where} already, and only their last messages may differ"
        )
    prompt = prompt_of(record, before or other, "chosen")
    if chosen == rejected:
        raise ValueError("chosen and rejected are equal, which prefers nothing")
    if chosen.strip() == rejected.strip():
        raise ValueError("chosen and rejected are equal but for white space at their ends, which prefers nothing")
    prompt = ending_with_user(dialogue(record, prompt))
    record.check_read()
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def to_pairs(columns: Mapping[str, Any], settings: PairSettings) -> list[dict[str, Any]]:
    """Return the pairs of a record; none where no response is better than another."""
    record = Columns(columns, settings)
    if settings.format == "tree":
        pairs = []
        for path, texts, ranks in trees.ranked(record):
            pairs += _pairs(dialogue(record, path), texts, [-rank for rank in ranks], settings.pairs)
        record.check_read()
        return pairs
    if "responses" not in settings.keys:
        return [to_pair(columns, settings)]
    prompt, responses = read_responses(record)
    if len(responses) < 2:
        return []
    scores = _by_votes(record, settings, len(responses)) if "votes" in settings.keys else _by_numbers(record, len(responses))
    record.check_read()
    return _pairs(prompt, responses, scores, settings.pairs)


def _pairs(prompt: list[Message], responses: Sequence[str], scores: Sequence[float], which: str) -> list[dict[str, Any]]:
    best_first = sorted(range(len(responses)), key=lambda index: -scores[index])
    chosen = combinations(best_first, 2) if which == "all" else [(best_first[0], best_first[-1])]
    return [
        {"prompt": prompt, "chosen": responses[better], "rejected": responses[worse]}
        for better, worse in chosen
        if scores[better] > scores[worse] and responses[better].strip() != responses[worse].strip()
    ]


def _by_numbers(record: Columns, count: int) -> list[float]:
    """Return each response's score, or its rank below zero."""
    name, sign = ("scores", 1) if "scores" in record.settings.keys else ("ranks", -1)
    values = record.values(name)
    require_as_many(range(count), values, name)
    return [sign * number_of(value, name) for value in values]


def _by_votes(record: Columns, settings: PairSettings, count: int) -> list[float]:
    """Return 1 for the response that most voters chose and 0 for the others; 0 for all without a majority over each other choice."""
    votes = Counter(_winner(value, settings, count) for value in record.values("votes") if not empty(value))
    (winner, most), *others = [*votes.most_common(), (0, 0)]
    if others and others[0][1] == most:
        winner = 0
    return [float(number == winner) for number in range(1, count + 1)]


def _winner(value: Any, settings: PairSettings, count: int) -> int:
    """Return the number of the response that a vote is for, from 1; 0 is a tie."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = render(value).strip() if isinstance(value, str | int | float) else short(value)
    if text not in settings.labels:
        raise ValueError(
            f'a vote is {short(value)}, expected one of {", ".join(settings.labels)}: labels = {{ "{text}" = 1 }} says what it means'
        )
    winner = settings.labels[text]
    if not 0 <= winner <= count:
        raise ValueError(f"labels says that {text!r} is response {winner}, found {count} responses; expected 1 to {count}, or 0 for a tie")
    return winner
