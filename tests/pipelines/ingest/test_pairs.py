"""A pair is one prompt and two responses; which one was preferred is given by name, votes, scores or ranks."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from pipelines.ingest.dialogue_settings import PairSettings
from pipelines.ingest.pairs import to_pair, to_pairs

HELLO = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}]
NO = {"role": "assistant", "content": "No."}
BRIEF = {"role": "system", "content": "Be brief."}


def settings(format: str = "messages", **others: object) -> PairSettings:
    return PairSettings.model_validate({"format": format, **others})


def texts(pairs: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(pair["chosen"], pair["rejected"]) for pair in pairs]


@pytest.mark.parametrize(
    ("columns", "how"),
    [
        ({"prompt": "Hello", "chosen": "Hi.", "rejected": "No."}, settings("plain")),
        (
            {"conversations": [{"from": "human", "value": "Hello"}], "chosen": {"from": "gpt", "value": "Hi."}, "rejected": NO},
            settings("sharegpt"),
        ),
        ({"instruction": "Hello", "input": "", "chosen": "Hi.", "rejected": "No."}, settings("alpaca")),
        ({"chosen": HELLO, "rejected": [HELLO[0], NO]}, settings()),
        ({"prompt": "Hello", "chosen": HELLO, "rejected": [HELLO[0], NO]}, settings("plain")),
        ({"messages": HELLO, "chosen": HELLO, "rejected": [HELLO[0], NO]}, settings()),
        ({"prompt": "Hello", "chosen": [HELLO[1]], "rejected": [NO]}, settings("plain")),
        ({"chosen": HELLO, "rejected": "No."}, settings()),
        ({"chosen": "\n\nHuman: Hello\n\nAssistant: Hi.", "rejected": "\n\nHuman: Hello\n\nAssistant: No."}, settings("transcript")),
        (
            {"prompt": "\n\nHuman: Hello\n\nAssistant:", "chosen": " Hi.", "rejected": " No."},
            settings("transcript", keys={"text": "prompt"}),
        ),
        ({"a": ["Hi.", "No."], "prompt": "Hello"}, settings("plain", keys={"chosen": "a.0", "rejected": "a.1"})),
    ],
)
def test_a_pair_is_one_prompt_and_two_responses(columns, how):
    assert to_pairs(columns, how) == [{"prompt": [HELLO[0]], "chosen": "Hi.", "rejected": "No."}]


def test_the_prompt_of_a_pair_of_conversations_is_every_turn_before_the_last():
    before = [*HELLO, {"role": "user", "content": "And you?"}]
    pair = to_pair({"chosen": [*before, HELLO[1]], "rejected": [*before, NO]}, settings())
    assert pair == {"prompt": before, "chosen": "Hi.", "rejected": "No."}


@pytest.mark.parametrize("prompt", [[BRIEF, HELLO[0]], [BRIEF, *HELLO]])
def test_a_prompts_system_message_is_kept_beside_whole_conversations(prompt):
    pair = to_pair({"prompt": prompt, "chosen": HELLO, "rejected": [HELLO[0], NO]}, settings("plain"))
    assert pair["prompt"] == [BRIEF, HELLO[0]]
    pair = to_pair({"chosen": HELLO, "rejected": [HELLO[0], NO], "system": "Be brief."}, settings())
    assert pair["prompt"] == [BRIEF, HELLO[0]]


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"prompt": "Hello", "chosen": "Hi.", "rejected": "Hi."}, "chosen and rejected are equal, which prefers nothing"),
        ({"prompt": "Hello", "chosen": "x\r\ny", "rejected": "x\ny"}, "chosen and rejected are equal, which"),
        ({"prompt": "Hello", "chosen": "x\n", "rejected": "x"}, "chosen and rejected are equal but for white space at their ends"),
        ({"prompt": "Hello", "chosen": "Hi.", "rejected": ""}, "rejected is empty"),
        ({"prompt": "Hello", "chosen": "Hi.", "rejected": ["No.", "Never."]}, "rejected is a list of 2, expected one response"),
        ({"prompt": HELLO, "chosen": "Hi.", "rejected": "No."}, "the prompt ends with the assistant's message, expected a user's"),
        ({"prompt": "Bye", "chosen": HELLO, "rejected": [HELLO[0], NO]}, "chosen begins with 'Hello', the prompt is 'Bye'"),
        ({"chosen": HELLO, "rejected": [{"role": "user", "content": "Bye"}, NO]}, "answer two different prompts: they differ at message 1"),
        (
            {"chosen": [*HELLO, *HELLO], "rejected": [HELLO[0], NO, *HELLO]},
            "answer two different prompts: they differ at message 2 already, and only their last messages may differ",
        ),
        ({"prompt": "Hello", "a": "Hi.", "b": "No."}, r"no column 'chosen'; .* responses = \[\"...\", \"...\"\]"),
        ({"prompt": "Hello", "chosen": "Hi.", "rejected": "No.", "context": "A text."}, "column 'context' holds 'A text.'"),
    ],
)
def test_a_pair_that_prefers_nothing_is_refused_with_the_reason(columns, reason):
    with pytest.raises(ValueError, match=reason):
        to_pairs(columns, settings("plain"))


# ---- votes ----

VOTED = {"prompt": "Hello", "a": "Hi.", "b": "No."}
TWO = {"responses": ["a", "b"]}


@pytest.mark.parametrize(
    ("votes", "expected"),
    [
        ([1, 1, 2], [("Hi.", "No.")]),
        ([2, 2, 0], [("No.", "Hi.")]),
        ([2, None, None], [("No.", "Hi.")]),
        (["1", "1", "2"], [("Hi.", "No.")]),
        ([1.0, 1.0, 2.0], [("Hi.", "No.")]),
        ([1, 2, 0], []),
        ([1, 0, 0], []),
        ([None, None, None], []),
    ],
)
def test_the_response_with_most_votes_is_chosen_and_a_tie_is_left_out(votes, expected):
    how = settings("plain", keys={**TWO, "votes": ["v1", "v2", "v3"]}, labels={"1": 1, "2": 2, "0": 0})
    assert texts(to_pairs({**VOTED, "v1": votes[0], "v2": votes[1], "v3": votes[2]}, how)) == expected
    how = settings("plain", keys={**TWO, "votes": "votes"}, labels={"1": 1, "2": 2, "0": 0})
    assert texts(to_pairs({**VOTED, "votes": votes}, how)) == expected


@pytest.mark.parametrize(
    ("label", "labels", "expected"),
    [
        ("model_a", {"model_a": 1, "model_b": 2, "tie": 0}, [("Hi.", "No.")]),
        ("tie", {"model_a": 1, "model_b": 2, "tie": 0}, []),
        (0, {"1": 1, "0": 2}, [("No.", "Hi.")]),
        (-2, {"-2": 1, "2": 2}, [("Hi.", "No.")]),
        (True, {"true": 1, "false": 2}, [("Hi.", "No.")]),
    ],
)
def test_labels_say_which_response_a_vote_is_for(label, labels, expected):
    how = settings("plain", keys={**TWO, "votes": "winner"}, labels=labels)
    assert texts(to_pairs({**VOTED, "winner": label}, how)) == expected


@pytest.mark.parametrize(
    ("label", "labels", "reason"),
    [
        ("both", {"a": 1, "b": 2}, r"a vote is 'both', expected one of a, b: labels = \{ \"both\" = 1 \} says what it means"),
        ("c", {"a": 1, "c": 3}, "labels says that 'c' is response 3, found 2 responses; expected 1 to 2, or 0 for a tie"),
    ],
)
def test_a_vote_without_a_meaning_is_refused(label, labels, reason):
    with pytest.raises(ValueError, match=reason):
        to_pairs({**VOTED, "winner": label}, settings("plain", keys={**TWO, "votes": "winner"}, labels=labels))


def test_whole_conversations_can_be_voted_on():
    how = settings(keys={**TWO, "votes": "winner"}, labels={"a": 1, "b": 2})
    pairs = to_pairs({"a": HELLO, "b": [HELLO[0], NO], "winner": "b"}, how)
    assert pairs == [{"prompt": [HELLO[0]], "chosen": "No.", "rejected": "Hi."}]
    with pytest.raises(ValueError, match="the responses answer different prompts"):
        to_pairs({"a": HELLO, "b": [{"role": "user", "content": "Bye"}, NO], "winner": "b"}, how)


# ---- scores and ranks ----

COMPLETIONS = [{"text": "bad", "score": 1}, {"text": "good", "score": 5.0}, {"text": "fair", "score": "3"}, {"text": "fine", "score": 3}]
SCORED = {"responses": "completions.*.text", "scores": "completions.*.score"}


def test_the_best_and_the_worst_score_make_a_pair():
    assert texts(to_pairs({"prompt": "Hello", "completions": COMPLETIONS}, settings("plain", keys=SCORED))) == [("good", "bad")]


def test_all_pairs_are_those_with_different_scores():
    pairs = to_pairs({"prompt": "Hello", "completions": COMPLETIONS}, settings("plain", keys=SCORED, pairs="all"))
    assert texts(pairs) == [("good", "fair"), ("good", "fine"), ("good", "bad"), ("fair", "bad"), ("fine", "bad")]


def test_the_lowest_rank_is_the_best():
    how = settings("plain", keys={"responses": "completions.*.text", "ranks": "completions.*.score"})
    assert texts(to_pairs({"prompt": "Hello", "completions": COMPLETIONS}, how)) == [("bad", "good")]


@pytest.mark.parametrize("completions", [[], COMPLETIONS[:1], COMPLETIONS[2:], [{"text": "x", "score": 1}, {"text": "x ", "score": 2}]])
def test_a_record_with_equal_scores_has_no_pair(completions):
    assert to_pairs({"prompt": "Hello", "completions": completions}, settings("plain", keys=SCORED)) == []


@pytest.mark.parametrize(
    ("columns", "keys", "reason"),
    [
        ({"t": ["a", "b"], "s": [1]}, {"responses": "t", "scores": "s"}, "found 2 responses and 1 scores, expected one for each response"),
        ({"t": ["a", "b"], "s": [1, None]}, {"responses": "t", "scores": "s"}, "scores is None, expected a number"),
        ({"t": [{"x": "a"}, {"x": "b"}], "s": [1, 2]}, {"responses": "t", "scores": "s"}, r"a path names it, such as .* \"t\.\*\.x\""),
    ],
)
def test_responses_that_cannot_be_compared_are_refused(columns, keys, reason):
    with pytest.raises(ValueError, match=reason):
        to_pairs({"prompt": "Hello", **columns}, settings("plain", keys=keys))


@pytest.mark.parametrize(
    ("others", "complaint"),
    [
        ({"keys": TWO}, "found nothing to compare them by, expected votes, scores or ranks"),
        ({"keys": {**TWO, "scores": "s", "ranks": "r"}}, "found scores and ranks to compare them by"),
        ({"keys": {"scores": "s"}}, "scores has no effect without keys = { responses"),
        ({"labels": {"a": 1}}, "labels has no effect without keys = { responses"),
        ({"keys": {**TWO, "votes": "v"}}, "labels and keys.votes go together"),
        ({"keys": {**TWO, "scores": "s"}, "labels": {"a": 1}}, "labels and keys.votes go together"),
        ({"keys": {**TWO, "scores": "s", "chosen": "c"}}, "keys.chosen has no effect beside keys.responses"),
        ({"keys": {**TWO, "votes": "v"}, "labels": {"a": 1}, "pairs": "all"}, 'pairs = "all" has no effect on votes'),
        ({"pairs": "all"}, 'pairs = "all" has no effect on chosen and rejected'),
    ],
)
def test_settings_that_compare_nothing_are_refused(others, complaint):
    with pytest.raises(ValidationError) as raised:
        settings("plain", **others)
    assert complaint in str(raised.value)
