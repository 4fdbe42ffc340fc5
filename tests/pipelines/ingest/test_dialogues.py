"""Every shape of dialogue that people publish becomes the same few records, or says why not."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from pipelines.ingest.dialogues import DialogueSettings, to_conversation, to_pair, to_prompt, to_rating

HELLO = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}]
SHAREGPT = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi."}]


def said(format: str = "messages", **settings: object) -> DialogueSettings:
    return DialogueSettings.model_validate({"format": format, **settings})


@pytest.mark.parametrize(
    ("columns", "settings"),
    [
        ({"messages": HELLO}, said()),
        ({"conversations": SHAREGPT}, said("sharegpt")),
        ({"instruction": "Hello", "input": "", "output": "Hi."}, said("alpaca")),
        ({"instruction": "Hello", "output": "Hi."}, said("alpaca")),
        ({"prompt": "Hello", "response": "Hi."}, said("plain")),
        ({"question": "Hello", "answer": "Hi."}, said("plain", keys={"prompt": "question", "response": "answer"})),
        (
            {"utterances": [{"speaker": "CUSTOMER", "text": "Hello"}, {"speaker": "agent", "text": "Hi."}]},
            said(keys={"messages": "utterances", "role": "speaker", "content": "text"}, roles={"CUSTOMER": "user"}),
        ),
        ({"messages": [*HELLO, {"role": "user", "content": "And you?"}]}, said()),
    ],
)
def test_each_format_says_hello(columns, settings):
    assert to_conversation(columns, settings) == {"messages": HELLO}


def test_alpacas_input_follows_its_instruction_and_a_system_column_comes_first():
    columns = {"system": "Be brief.", "instruction": "Translate.", "input": "chat", "output": "cat"}
    messages = to_conversation(columns, said("alpaca"))["messages"]
    assert [message["content"] for message in messages] == ["Be brief.", "Translate.\n\nchat", "cat"]
    assert messages[0]["role"] == "system"


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([HELLO[0]], "no assistant's message, so there is nothing to learn from"),
        ([HELLO[1]], "no user's message before the assistant's, who answers nobody"),
        ([{"role": "system", "content": "Be brief."}, HELLO[1], HELLO[0]], "no user's message before the assistant's"),
        ([HELLO[0], {"role": "assistant", "content": " "}], r"message 2 \(the assistant's\) is empty"),
        ([HELLO[0], {"role": "tool", "content": "a"}], "role 'tool' is unknown; say what it is"),
        ([HELLO[0], {"role": ["user"], "content": "a"}], "a message's role is \\['user'\\], wanted a text"),
        ([HELLO[0], {"role": None, "content": "a"}], "a message's role is None, wanted a text"),
        ([HELLO[0], HELLO[0], HELLO[1]], "message 2 is the user's again; join_turns"),
        ([*HELLO, {"role": "system", "content": "a"}], "message 3 is the system's, which only the first can be"),
        ([HELLO[0], {"role": "assistant", "content": 3}], "the assistant's message is 3, wanted a text"),
        ([HELLO[0], {"speaker": "a"}], "a message has the keys speaker; wanted role and content"),
        ([], r"\[\] is no list of messages"),
        ("Hello", "'Hello' is no list of messages"),
    ],
)
def test_a_conversation_that_teaches_nothing_says_why(messages, reason):
    with pytest.raises(ValueError, match=reason):
        to_conversation({"messages": messages}, said())


def test_a_missing_column_is_named_beside_those_that_are_there():
    with pytest.raises(ValueError, match=r"no column 'messages'; there are: text; keys = \{ messages = "):
        to_conversation({"text": "a"}, said())


def test_turns_of_one_role_are_joined_when_asked_for():
    messages = to_conversation({"messages": [HELLO[0], HELLO[0], HELLO[1]]}, said(join_turns=True))["messages"]
    assert messages == [{"role": "user", "content": "Hello\nHello"}, HELLO[1]]


@pytest.mark.parametrize(
    ("columns", "settings"),
    [
        ({"prompt": "Hello", "chosen": "Hi.", "rejected": "No."}, said("plain")),
        ({"conversations": SHAREGPT[:1], "chosen": SHAREGPT[1], "rejected": {"from": "gpt", "value": "No."}}, said("sharegpt")),
        ({"chosen": HELLO, "rejected": [HELLO[0], {"role": "assistant", "content": "No."}]}, said()),
    ],
)
def test_a_pair_is_one_prompt_and_two_responses(columns, settings):
    assert to_pair(columns, settings) == {"prompt": [HELLO[0]], "chosen": "Hi.", "rejected": "No."}


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"prompt": "Hello", "chosen": "Hi.", "rejected": "Hi."}, "chosen and rejected are equal"),
        ({"prompt": "Hello", "chosen": "Hi.", "rejected": ""}, "rejected is empty"),
        ({"prompt": HELLO, "chosen": "Hi.", "rejected": "No."}, "does not end with a user's message"),
        ({"chosen": HELLO, "rejected": [{"role": "user", "content": "Bye"}, HELLO[1]]}, "answer two different prompts"),
    ],
)
def test_a_pair_that_prefers_nothing_says_why(columns, reason):
    with pytest.raises(ValueError, match=reason):
        to_pair(columns, said("plain"))


def test_a_score_of_one_to_five_becomes_nothing_to_one():
    columns = {"prompt": "Hello", "response": "Hi.", "score": 4}
    assert to_rating(columns, said("plain"), (1, 5)) == {"prompt": [HELLO[0]], "response": "Hi.", "score": 0.75}
    with pytest.raises(ValueError, match=r"score is 6, out of score_range = \[1, 5\]"):
        to_rating({**columns, "score": 6}, said("plain"), (1, 5))
    with pytest.raises(ValueError, match="score is 'good', wanted a number"):
        to_rating({**columns, "score": "good"}, said("plain"), (1, 5))


def test_a_prompt_has_a_reference_or_none():
    assert to_prompt({"prompt": "Hello"}, said("plain")) == {"prompt": [HELLO[0]], "reference": None}
    assert to_prompt({"prompt": "2 + 2?", "reference": 4.0}, said("plain"))["reference"] == "4.0"
    assert to_prompt({"messages": HELLO}, said()) == {"prompt": [HELLO[0]], "reference": "Hi."}


def test_a_key_that_no_format_has_is_a_fault():
    with pytest.raises(ValidationError, match="renames 'promt', which no format has; did you mean 'prompt'"):
        said("plain", keys={"promt": "question"})
