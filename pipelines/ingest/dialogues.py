"""From records to dialogues: conversations, pairs of responses, rated responses and prompts, out of the shapes that people publish.

    alpaca        {"instruction", "input", "output"}            one question, one answer
    sharegpt      {"conversations": [{"from", "value"}, ...]}   several turns
    messages      {"messages": [{"role", "content"}, ...]}      several turns, as chat APIs write them
    plain         {"prompt", "response"}                        two texts

Each says where the messages so far are, and each of its keys can be renamed (`keys = { prompt = "question" }`). What answers them
is `chosen` and `rejected`, or `response` and `score`, or `reference`, in whatever shape: a text, a message, or a list of messages
of which the last one counts. Every function here raises ValueError with the reason why a record can't be used.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from gpt.settings import Settings
from pipelines.reading import SourceSettings
from pipelines.records import IngestSettings, Weighted
from pipelines.stage import StageConfig

Message = dict[str, str]
Format = Literal["alpaca", "sharegpt", "messages", "plain"]

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "agent": "assistant",
}
"""What people call the three roles, in lower case."""

KEYS = ["conversations", "from", "value", "messages", "role", "content"]
KEYS += ["instruction", "input", "output", "system", "prompt", "response", "chosen", "rejected", "score", "reference"]
"""What `keys` can rename."""


class DialogueSettings(Settings):
    """How a source's columns become messages: `DialogueSettings(format="plain", keys={"prompt": "question", "response": "answer"})`."""

    format: Format = "messages"
    """Where the messages are: "alpaca", "sharegpt", "messages" or "plain"."""
    keys: dict[str, str] = Field(default_factory=dict)
    """The source's names for this format's own: keys = { messages = "utterances", role = "speaker", content = "text" }."""
    roles: dict[str, Literal["system", "user", "assistant"]] = Field(default_factory=dict)
    """The source's names for the three roles, beside the usual ones."""
    join_turns: bool = False
    """True: messages of one role in a row become one, joined by a newline. False: such a record is bad."""

    @field_validator("keys")
    @classmethod
    def _keys_exist(cls, keys: dict[str, str]) -> dict[str, str]:
        for name in keys:
            if name not in KEYS:
                near = difflib.get_close_matches(name, KEYS, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(KEYS)}"
                raise ValueError(f"renames {name!r}, which no format has; {hint}")
        return keys


class DialogueSource(SourceSettings, DialogueSettings):
    """Files of dialogues."""

    @model_validator(mode="after")
    def _has_columns(self) -> DialogueSource:
        if self.source == "text":
            raise ValueError('source = "text" has no columns to find messages in; wanted json, csv or parquet')
        if self.text != "text":
            raise ValueError(f"text = {self.text!r} has no effect on dialogues; say where messages are by format and keys")
        return self


class WeightedDialogueSource(DialogueSource, Weighted):
    """One source of a mixture of dialogues."""


class DialogueConfig(IngestSettings, StageConfig, DialogueSource):
    """One source, its keys inline, or a mixture of several, with the same keys and a `weight` each."""

    mixture: tuple[WeightedDialogueSource, ...] = ()
    """Several sources, instead of the inline one."""


def to_conversation(columns: Mapping[str, Any], settings: DialogueSettings) -> dict[str, Any]:
    """`{"messages": [...]}`, ending with an assistant's message: what a user says last teaches nothing and is left out."""
    match settings.format:
        case "alpaca" | "plain":
            answer = "output" if settings.format == "alpaca" else "response"
            messages = [*_prompt(columns, settings), _answer(columns, settings, answer)]
        case _:
            messages = _prompt(columns, settings)
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not messages:
        raise ValueError("no assistant's message, so there is nothing to learn from")
    if not any(message["role"] == "user" for message in messages):
        raise ValueError("no user's message before the assistant's, who answers nobody")
    return {"messages": messages}


def to_pair(columns: Mapping[str, Any], settings: DialogueSettings) -> dict[str, Any]:
    """`{"prompt", "chosen", "rejected"}`. Where chosen and rejected are whole conversations, the prompt is what they share."""
    chosen, rejected = (_value(columns, settings, name) for name in ("chosen", "rejected"))
    whole = [_messages(each, settings) for each in (chosen, rejected) if isinstance(each, list) and len(each) > 1]
    if len(whole) == 2:
        if whole[0][:-1] != whole[1][:-1]:
            raise ValueError("chosen and rejected answer two different prompts")
        prompt = whole[0][:-1]
    else:
        prompt = _prompt(columns, settings)
    texts = [_response(each, settings, name) for each, name in ((chosen, "chosen"), (rejected, "rejected"))]
    if texts[0] == texts[1]:
        raise ValueError("chosen and rejected are equal, which prefers nothing")
    return {"prompt": _ending_with_user(prompt), "chosen": texts[0], "rejected": texts[1]}


def to_rating(columns: Mapping[str, Any], settings: DialogueSettings, score_range: tuple[float, float]) -> dict[str, Any]:
    """`{"prompt", "response", "score"}`; a score of `score_range` is moved to 0 to 1."""
    score = _value(columns, settings, "score")
    lowest, highest = score_range
    if isinstance(score, bool) or not isinstance(score, int | float):
        raise ValueError(f"score is {_short(score)}, wanted a number")
    if not lowest <= score <= highest:
        raise ValueError(f"score is {_short(score)}, out of score_range = [{lowest:g}, {highest:g}]")
    response = _response(_value(columns, settings, "response"), settings, "response")
    prompt = _ending_with_user(_prompt(columns, settings))
    return {"prompt": prompt, "response": response, "score": (score - lowest) / (highest - lowest)}


def to_prompt(columns: Mapping[str, Any], settings: DialogueSettings) -> dict[str, Any]:
    """`{"prompt", "reference"}`; the reference is None where the source has none. An assistant's last message is the reference."""
    messages = _prompt(columns, settings)
    name = settings.keys.get("reference", "reference")
    given = columns.get(name)
    reference = None if given is None else str(given) if isinstance(given, int | float) else _response(given, settings, name)
    if messages[-1]["role"] == "assistant":
        reference = reference or messages[-1]["content"]
        messages = messages[:-1]
    return {"prompt": _ending_with_user(messages), "reference": reference}


def _prompt(columns: Mapping[str, Any], settings: DialogueSettings) -> list[Message]:
    """The messages that a record's own format holds."""
    match settings.format:
        case "alpaca":
            texts = [_text(columns, settings, "instruction"), _text(columns, settings, "input", optional=True)]
            system = _text(columns, settings, "system", optional=True)
            content = "\n\n".join(text for text in texts if text)
            messages = [{"role": "system", "content": system}] if system else []
            return _checked([*messages, {"role": "user", "content": content}], settings)
        case "plain":
            prompt = _value(columns, settings, "prompt")
            if isinstance(prompt, str):
                return _checked([{"role": "user", "content": prompt}], settings)
            return _messages(prompt, settings)
        case "sharegpt":
            return _messages(_value(columns, settings, "conversations"), settings)
        case "messages":
            return _messages(_value(columns, settings, "messages"), settings)


def _messages(value: Any, settings: DialogueSettings) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{_short(value)} is no list of messages")
    return _checked([_message(each, settings) for each in value], settings)


def _message(value: Any, settings: DialogueSettings) -> Message:
    """One message under its keys: role and content, or from and value."""
    if not isinstance(value, dict):
        raise ValueError(f"{_short(value)} is no message, such as {{'role': 'user', 'content': 'Hello'}}")
    names = [settings.keys.get(ours, ours) for ours in ("role", "content")]
    if not all(name in value for name in names):
        names = [settings.keys.get(ours, ours) for ours in ("from", "value")]
    if not all(name in value for name in names):
        raise ValueError(f"a message has the keys {', '.join(map(str, value))}; wanted role and content, or from and value")
    role, content = (value[name] for name in names)
    if not isinstance(role, str):
        raise ValueError(f"a message's {names[0]} is {_short(role)}, wanted a text")
    known = {**ROLES, **settings.roles}
    found = known.get(role) or known.get(role.lower())
    if found is None:
        raise ValueError(f'role {role!r} is unknown; say what it is, for example roles = {{ {role} = "user" }}')
    if not isinstance(content, str):
        raise ValueError(f"the {found}'s message is {_short(content)}, wanted a text")
    return {"role": found, "content": content}


def _checked(messages: list[Message], settings: DialogueSettings) -> list[Message]:
    joined: list[Message] = []
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        if not message["content"].strip():
            raise ValueError(f"message {number} (the {role}'s) is empty")
        message = {"role": role, "content": message["content"].replace("\r\n", "\n")}
        if role == "system" and number > 1:
            raise ValueError(f"message {number} is the system's, which only the first can be")
        if joined and joined[-1]["role"] == role:
            if not settings.join_turns:
                raise ValueError(f"message {number} is the {role}'s again; join_turns = true makes one of the two")
            joined[-1] = {"role": role, "content": f"{joined[-1]['content']}\n{message['content']}"}
        else:
            joined.append(message)
    return joined


def _ending_with_user(prompt: Sequence[Message]) -> list[Message]:
    if not prompt or prompt[-1]["role"] != "user":
        raise ValueError("the prompt does not end with a user's message, so there is nothing to answer")
    return list(prompt)


def _answer(columns: Mapping[str, Any], settings: DialogueSettings, name: str) -> Message:
    return {"role": "assistant", "content": _response(_value(columns, settings, name), settings, name)}


def _response(value: Any, settings: DialogueSettings, name: str) -> str:
    """The text of a response: itself, a message's, or the last message's of a list."""
    last = value[-1] if isinstance(value, list) and value else value
    if isinstance(last, dict):
        message = _message(last, settings)
        if message["role"] != "assistant":
            raise ValueError(f"{name} is the {message['role']}'s message, wanted an assistant's")
        last = message["content"]
    if not isinstance(last, str):
        raise ValueError(f"{name} is {_short(last)}, wanted a text or an assistant's message")
    if not last.strip():
        raise ValueError(f"{name} is empty")
    return last.replace("\r\n", "\n")


def _text(columns: Mapping[str, Any], settings: DialogueSettings, name: str, *, optional: bool = False) -> str:
    key = settings.keys.get(name, name)
    if optional and columns.get(key) is None:
        return ""
    value = _value(columns, settings, name)
    if not isinstance(value, str):
        raise ValueError(f"column {key!r} holds {_short(value)}, wanted a text")
    return value


def _value(columns: Mapping[str, Any], settings: DialogueSettings, name: str) -> Any:
    key = settings.keys.get(name, name)
    if key not in columns:
        renamed = "" if name in settings.keys else f'; keys = {{ {name} = "..." }} names another'
        raise ValueError(f"no column {key!r}; there are: {', '.join(columns) or 'none'}{renamed}")
    return columns[key]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
