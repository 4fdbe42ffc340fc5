"""Turn what sources call a message into `{"role", "content"}`, and check that messages make a dialogue.

Content is a text, or a list of parts of which all are text: they are joined by newlines. A call of a tool becomes a line of JSON after the
message's text, `{"name": "add", "arguments": {"a": 2, "b": 2}}`, without its id. Every function raises ValueError with the reason why a
message can't be used.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.ingest.dialogue_columns import empty
from pipelines.ingest.dialogue_settings import IGNORABLE_IN_MESSAGES, DialogueSettings
from pipelines.ingest.templates import short

Message = dict[str, str]

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "agent": "assistant",
}
"""What sources call the three roles, in lower case."""
LIKELY_ROLES = {
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool_calls": "assistant",
    "chatgpt": "assistant",
    "ai": "assistant",
    "chosen": "assistant",
}
"""Names that are not read by themselves but suggested in messages; everything else is suggested as the user's, as tools' answers are."""
TEXT_PARTS = ("text", "input_text", "output_text")


def read_messages(value: Any, settings: DialogueSettings, what: str = "messages") -> list[Message]:
    """Return the messages of a list, unchecked; `what` is what error messages call it."""
    value = list_of(value, what)
    if isinstance(value, dict) and "replies" in value:
        raise ValueError(f'{what} is a tree of replies, expected a list of messages; set format = "tree"')
    if not isinstance(value, list) or not value:
        raise ValueError(f"{what} is {short(value)}, expected a list of messages, such as {{'role': 'user', 'content': 'Hello'}}")
    messages = [read_message(each, settings) for each in value]
    begins_empty = len(messages) > 1 and messages[0]["role"] == "system" and not messages[0]["content"].strip()
    return messages[1:] if begins_empty else messages


def list_of(value: Any, what: str) -> Any:
    """Return the list that a table keeps as JSON text, and anything else as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f"{what} is {short(value)}, expected a list as JSON: {error}") from None


def read_message(value: Any, settings: DialogueSettings) -> Message:
    """Return one message from its role and content, or from and value, under the names that `keys` gives them."""
    if not isinstance(value, dict):
        raise ValueError(f"found {short(value)}, expected a message, such as {{'role': 'user', 'content': 'Hello'}}")
    role_key, content_key = _keys_of(value, settings)
    role = _role(value[role_key], role_key, settings)
    for name in IGNORABLE_IN_MESSAGES:
        if name not in (role_key, content_key, *settings.ignore) and _changes_meaning(name, value.get(name)):
            raise ValueError(
                f'the {role}\'s message has {name} = {short(value[name])}, which is not read; set ignore = ["{name}"] to leave it out'
            )
    texts = [_content(value.get(content_key), role), *(_call(each) for each in _calls(value))]
    return {"role": role, "content": "\n".join(text for text in texts if text)}


def _keys_of(message: Mapping[str, Any], settings: DialogueSettings) -> tuple[str, str]:
    for names in (("role", "content"), ("from", "value")):
        role_key, content_key = (settings.where(name) for name in names)
        if role_key in message and (content_key in message or _calls(message)):
            return role_key, content_key
    raise ValueError(
        f"a message has the keys {', '.join(map(str, message)) or 'none'}; expected role and content, or from and value: "
        'keys = { role = "...", content = "..." } renames them'
    )


def _role(found: Any, key: str, settings: DialogueSettings) -> str:
    if not isinstance(found, str):
        raise ValueError(f"a message's {key} is {short(found)}, expected a text")
    known = {**ROLES, **settings.roles}
    role = known.get(found) or known.get(found.lower())
    if role is None:
        name = found if re.fullmatch("[A-Za-z0-9_-]+", found) else json.dumps(found, ensure_ascii=False)
        likely = LIKELY_ROLES.get(found.lower(), "user")
        raise ValueError(f'role {found!r} is unknown, expected user, assistant or system; name it with roles = {{ {name} = "{likely}" }}')
    return role


def _content(content: Any, role: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"the {role}'s message is {short(content)}, expected a text or a list of text parts")
    return "\n".join(_part(part, role) for part in content)


def _part(part: Any, role: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and part.get("type", "text") in TEXT_PARTS and isinstance(part.get("text"), str):
        return str(part["text"])
    found = short(part)
    if isinstance(part, dict) and part.get("type", "text") not in TEXT_PARTS:
        found = f"a part of type {part['type']!r}"
    raise ValueError(f"the {role}'s message has {found}, expected only text parts")


def _calls(message: Mapping[str, Any]) -> list[Any]:
    calls = message.get("tool_calls") or ([message["function_call"]] if message.get("function_call") else [])
    return calls if isinstance(calls, list) else [calls]


def _call(call: Any) -> str:
    function = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"a tool call is {short(call)}, expected a name and arguments")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError):  # some models write arguments that aren't JSON: they stay the text that they are
            arguments = json.loads(arguments)
    return json.dumps({"name": function["name"], "arguments": arguments}, ensure_ascii=False)


def _changes_meaning(name: str, value: Any) -> bool:
    match name:
        case "weight":
            return value is not None and value != 1
        case "train":
            return value is False
    return not empty(value)


# ---- dialogues ----


def checked(messages: Sequence[Message], settings: DialogueSettings) -> list[Message]:
    """Return the messages as a dialogue: none empty, the system's only first, the other roles in turn."""
    dialogue: list[Message] = []
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        if not message["content"].strip():
            raise ValueError(f"message {number} (the {role}'s) is empty")
        message = {"role": role, "content": message["content"].replace("\r\n", "\n")}
        if dialogue and dialogue[-1]["role"] == role:
            if not settings.join_turns:
                raise ValueError(f"message {number} is the {role}'s again; join_turns = true makes one message of the two")
            dialogue[-1] = {"role": role, "content": f"{dialogue[-1]['content']}\n{message['content']}"}
        elif role == "system" and dialogue:
            raise ValueError(
                f"message {number} is the system's, which only the first can be; "
                'roles = { system = "user" } with join_turns = true reads it as the user\'s'
            )
        else:
            dialogue.append(message)
    return dialogue


def ending_with_user(prompt: Sequence[Message]) -> list[Message]:
    if not prompt or prompt[-1]["role"] != "user":
        found = f"the {prompt[-1]['role']}'s message" if prompt else "no message"
        raise ValueError(f"the prompt ends with {found}, expected a user's message that can be answered")
    return list(prompt)
