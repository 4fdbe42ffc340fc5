"""A message has a known role and a text, whatever its source calls them, and messages make a dialogue."""

from __future__ import annotations

import pytest

from pipelines.ingest.dialogue_settings import DialogueSettings
from pipelines.ingest.dialogues import to_conversation
from pipelines.ingest.messages import read_message

USER = {"role": "user", "content": "Hello"}
ASSISTANT = {"role": "assistant", "content": "Hi."}


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([USER], "no assistant's message, so there is nothing to learn from"),
        ([ASSISTANT], "no user's message before the assistant's, expected one that it answers"),
        ([{"role": "system", "content": "Be brief."}, ASSISTANT, USER], "no user's message before the assistant's"),
        ([USER, {"role": "assistant", "content": " "}], r"message 2 \(the assistant's\) is empty"),
        ([USER, {"role": "assistant", "content": None}], r"message 2 \(the assistant's\) is empty"),
        ([USER, {"role": ["user"], "content": "a"}], "a message's role is \\['user'\\], expected a text"),
        ([USER, {"role": None, "content": "a"}], "a message's role is None, expected a text"),
        ([USER, USER, ASSISTANT], "message 2 is the user's again; join_turns = true makes one message of the two"),
        (
            [USER, ASSISTANT, {"role": "system", "content": "a"}],
            r"message 3 is the system's, which only the first can be; roles = \{ system = \"user\" \} with join_turns = true",
        ),
        ([USER, {"role": "assistant", "content": 3}], "the assistant's message is 3, expected a text or a list of text parts"),
        ([USER, {"speaker": "a"}], r"a message has the keys speaker; expected role and content, or from and value: keys = \{ role ="),
        ([USER, "Hi."], "found 'Hi.', expected a message, such as"),
        ([], r"messages is \[\], expected a list of messages"),
        ("Hello", "messages is 'Hello', expected a list of messages"),
    ],
)
def test_a_conversation_that_teaches_nothing_is_refused_with_the_reason(messages, reason):
    with pytest.raises(ValueError, match=reason):
        to_conversation({"messages": messages}, DialogueSettings())


@pytest.mark.parametrize(
    ("role", "hint"),
    [
        ("tool", 'tool = "user"'),
        ("observation", 'observation = "user"'),
        ("function_call", 'function_call = "assistant"'),
        ("Agent 2", '"Agent 2" = "user"'),
    ],
)
def test_an_unknown_role_is_refused_with_the_setting_that_names_it(role, hint):
    with pytest.raises(
        ValueError, match=f"role '{role}' is unknown, expected user, assistant or system; name it with roles = {{ {hint} }}"
    ):
        to_conversation({"messages": [USER, {"role": role, "content": "4"}]}, DialogueSettings())


def test_successive_turns_of_one_role_are_joined_on_request():
    messages = to_conversation({"messages": [USER, USER, ASSISTANT]}, DialogueSettings(join_turns=True))["messages"]
    assert messages == [{"role": "user", "content": "Hello\nHello"}, ASSISTANT]


@pytest.mark.parametrize(
    "content",
    [
        "Hello\nthere",
        [{"type": "text", "text": "Hello"}, {"type": "text", "text": "there"}],
        [{"type": "input_text", "text": "Hello\nthere"}],
        ["Hello", "there"],
    ],
)
def test_text_parts_are_joined_by_newlines(content):
    assert read_message({"role": "user", "content": content}, DialogueSettings()) == {"role": "user", "content": "Hello\nthere"}


@pytest.mark.parametrize(
    ("part", "found"),
    [
        ({"type": "image_url", "image_url": {"url": "a.png"}}, "a part of type 'image_url'"),
        ({"type": "text", "text": None}, r"\{'type': 'text', 'text': None\}"),
        (4, "4"),
    ],
)
def test_a_part_that_is_not_text_is_refused_by_its_type(part, found):
    with pytest.raises(ValueError, match=f"the user's message has {found}, expected only text parts"):
        read_message({"role": "user", "content": [{"type": "text", "text": "See:"}, part]}, DialogueSettings())


ADD = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b":2}'}}
ADD_AS_TEXT = '{"name": "add", "arguments": {"a": 2, "b": 2}}'


@pytest.mark.parametrize(
    ("message", "content"),
    [
        ({"content": None, "tool_calls": [ADD]}, ADD_AS_TEXT),
        ({"content": "", "tool_calls": [ADD]}, ADD_AS_TEXT),
        ({"tool_calls": [ADD]}, ADD_AS_TEXT),
        ({"content": "Wait.", "tool_calls": [ADD, ADD]}, f"Wait.\n{ADD_AS_TEXT}\n{ADD_AS_TEXT}"),
        ({"content": None, "function_call": ADD["function"]}, ADD_AS_TEXT),
        ({"content": None, "tool_calls": [{"name": "now"}]}, '{"name": "now", "arguments": {}}'),
        ({"content": None, "tool_calls": [{"name": "say", "arguments": "not JSON"}]}, '{"name": "say", "arguments": "not JSON"}'),
        ({"content": "Hi.", "tool_calls": None}, "Hi."),
        ({"content": "Hi.", "tool_calls": []}, "Hi."),
    ],
)
def test_a_tool_call_is_a_line_of_json_after_the_text(message, content):
    assert read_message({"role": "assistant", **message}, DialogueSettings()) == {"role": "assistant", "content": content}


def test_a_call_without_a_name_is_refused():
    with pytest.raises(ValueError, match=r"a tool call is \{'id': '1'\}, expected a name and arguments"):
        read_message({"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}, DialogueSettings())


@pytest.mark.parametrize(
    ("name", "changes", "harmless"),
    [
        ("weight", 0, 1),
        ("weight", 0.5, 1.0),
        ("weight", "0", None),
        ("train", False, True),
        ("reasoning_content", "Let me see.", ""),
        ("refusal", "I can't.", None),
        ("images", ["a"], []),
    ],
)
def test_a_key_of_a_message_that_changes_what_it_teaches_is_refused_or_ignored_on_purpose(name, changes, harmless):
    message = {"role": "assistant", "content": "Hi."}
    with pytest.raises(ValueError, match=f'the assistant\'s message has {name} = .*, which is not read; set ignore = \\["{name}"\\]'):
        read_message({**message, name: changes}, DialogueSettings())
    assert read_message({**message, name: changes}, DialogueSettings(ignore=(name,))) == message
    assert read_message({**message, name: harmless}, DialogueSettings()) == message
