"""Turn records into conversations, rated responses and prompts, from the forms in which dialogues are published.

    messages      {"messages": [{"role", "content"}, ...]}      several turns, as chat APIs write them
    sharegpt      {"conversations": [{"from", "value"}, ...]}   several turns
    alpaca        {"instruction", "input", "output"}            one question, one answer; system and history if there are any
    plain         {"prompt", "response"}                        two texts, or messages and a text
    transcript    {"text": "\\n\\nHuman: ...\\n\\nAssistant: ..."}  several turns in one text
    tree          {"prompt": {"text", "role", "replies"}}       several replies at each turn: one record becomes several

A format says where the messages so far are, and `keys` where a source keeps each of its parts. What answers them is `response` and `score`,
or `reference`, or a pair (in `pairs`): a text, a message, or messages of which the last one counts. A `system` column, or the setting
`system`, becomes the first message. Every function raises ValueError with the reason why a record can't be used.

The singular functions are for stages of one's own, `to_conversation({"prompt": ..., "response": ...}, settings)`; the plural ones also read
forms that hold several dialogues in a record, and return an empty list for a record that is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipelines.ingest import trees
from pipelines.ingest.dialogue_columns import Columns, as_template, empty, number_of, verdict_of
from pipelines.ingest.dialogue_settings import DialogueSettings
from pipelines.ingest.messages import Message, checked, ending_with_user, list_of, read_message, read_messages
from pipelines.ingest.templates import short
from pipelines.ingest.transcripts import MARKERS, begins_with_marker, is_transcript, read_transcript

# ---- one record becomes one ----


def to_conversation(columns: Mapping[str, Any], settings: DialogueSettings) -> dict[str, Any]:
    """Return `{"messages": [...]}`, which ends with an assistant's message: a user's last words teach nothing and are left out."""
    record = Columns(columns, settings)
    messages = read_prompt(record)
    if settings.format in ("alpaca", "plain"):
        name = "output" if settings.format == "alpaca" else "response"
        before, response = read_response(record, record.value(name), name)
        messages = [*(joined(messages, before, name) if before else messages), {"role": "assistant", "content": response}]
    conversation = _conversation(record, dialogue(record, messages))
    record.check_read()
    return conversation


def to_rating(columns: Mapping[str, Any], settings: DialogueSettings, score_range: tuple[float, float]) -> dict[str, Any]:
    """Return `{"prompt", "response", "score"}`, with the score moved from `score_range` to 0 to 1.

    Where a conversation has no response beside it, its last message is the response.
    """
    record = Columns(columns, settings)
    score = _score(record.value("score"), score_range)
    if record.has("response") or settings.format == "alpaca":
        before, response = read_response(record, record.value("response"), "response")
        prompt = prompt_of(record, before, "response")
    else:
        *prompt, last = checked(read_prompt(record), settings)
        if last["role"] != "assistant" and settings.format == "plain":
            record.value("response")  # raises: the column is missing
        if last["role"] != "assistant":
            raise ValueError(
                f"the conversation ends with the {last['role']}'s message, expected the response that was rated; "
                'keys = { response = "..." } names a column that has it'
            )
        response = last["content"]
    prompt = ending_with_user(dialogue(record, prompt))
    record.check_read()
    return {"prompt": prompt, "response": response, "score": score}


def to_prompt(columns: Mapping[str, Any], settings: DialogueSettings) -> dict[str, Any]:
    """Return `{"prompt", "reference"}`; the reference is an assistant's last message where the source has no other, or None."""
    record = Columns(columns, settings)
    reference = read_reference(record)
    messages = dialogue(record, read_prompt(record))
    if messages[-1]["role"] == "assistant":
        reference = reference or messages[-1]["content"]
        messages = messages[:-1]
    record.check_read()
    return {"prompt": ending_with_user(messages), "reference": reference}


# ---- one record becomes several, or none ----


def to_conversations(columns: Mapping[str, Any], settings: DialogueSettings) -> list[dict[str, Any]]:
    """Return the conversations of a record: one, or each path through a tree."""
    if settings.format != "tree":
        return [to_conversation(columns, settings)]
    record = Columns(columns, settings)
    found = [_conversation(record, dialogue(record, path)) for path in trees.conversations(record)]
    record.check_read()
    return found


def to_ratings(columns: Mapping[str, Any], settings: DialogueSettings, score_range: tuple[float, float]) -> list[dict[str, Any]]:
    """Return the rated responses of a record: one, or each of `keys.responses` with its score."""
    if "responses" not in settings.keys:
        return [to_rating(columns, settings, score_range)]
    record = Columns(columns, settings)
    scores = record.values("scores")
    prompt, responses = read_responses(record)
    record.check_read()
    require_as_many(responses, scores, "scores")
    return [
        {"prompt": prompt, "response": response, "score": _score(score, score_range)}
        for response, score in zip(responses, scores, strict=True)
    ]


def to_prompts(columns: Mapping[str, Any], settings: DialogueSettings) -> list[dict[str, Any]]:
    """Return the prompts of a record: one, each user's turn in a tree, or none for a blank line of text."""
    if settings.format != "tree":
        blank = set(columns) == {"text"} and isinstance(columns["text"], str) and not columns["text"].strip()
        return [] if blank else [to_prompt(columns, settings)]
    record = Columns(columns, settings)
    found = [{"prompt": dialogue(record, path), "reference": reply} for path, reply in trees.prompts(record)]
    record.check_read()
    return found


# ---- parts of a record ----


def read_prompt(record: Columns) -> list[Message]:
    """Return the messages that a record's own format holds, unchecked."""
    match record.settings.format:
        case "alpaca":
            texts = [record.text("instruction"), record.text("input", optional=True)]
            return [*_history(record), {"role": "user", "content": "\n\n".join(text for text in texts if text)}]
        case "plain":
            name = "text" if not record.has("prompt") and set(record.columns) == {"text"} else "prompt"
            prompt = record.value(name)
            if isinstance(prompt, str):
                _refuse_transcript(prompt, record.called(name), "prompt" if name == "text" else name)
                return [{"role": "user", "content": prompt}]
            if advice := as_template(name, record.settings.where(name), prompt):
                raise ValueError(f"{record.called(name)} is {short(prompt)}, expected a text or a list of messages{advice}")
            return read_messages(prompt, record.settings, record.called(name))
        case "sharegpt":
            return read_messages(record.value("conversations"), record.settings, record.called("conversations"))
        case "messages":
            return read_messages(record.value("messages"), record.settings, record.called("messages"))
        case "transcript":
            return read_transcript(record.value("text"), record.settings, record.called("text"))
        case "tree":
            raise ValueError('format = "tree" makes several of one record; expected to_conversations, to_pairs or to_prompts')


def _refuse_transcript(text: str, what: str, name: str) -> None:
    if is_transcript(text):
        raise ValueError(
            f'{what} is a whole dialogue, {short(text)}, expected one message; format = "transcript" reads it'
            + (f' with keys = {{ text = "{name}" }}' if name in ("prompt", "response") else "")
        )


def _history(record: Columns) -> list[Message]:
    """Return alpaca's earlier turns: `[["Hello", "Hi."], ...]`."""
    history = list_of(record.optional("history"), record.called("history")) or []
    messages = []
    for turn in history if isinstance(history, list) else [history]:
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise ValueError(f"history has {short(turn)}, expected turns such as ['Hello', 'Hi.']: a user's text and the assistant's")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    return messages


def dialogue(record: Columns, messages: Sequence[Message]) -> list[Message]:
    """Return the messages, checked, after the record's system message or the one that is set for all."""
    own = messages[0]["content"] if messages and messages[0]["role"] == "system" else ""
    system = record.text("system", optional=True)
    if not system.strip():
        system = own or record.settings.system or ""
    if own and own in system:  # the column repeats it, or a template holds it
        messages = messages[1:]
    first: list[Message] = [{"role": "system", "content": system}] if system else []
    return checked([*first, *messages], record.settings)


def _conversation(record: Columns, messages: list[Message]) -> dict[str, Any]:
    while messages and messages[-1]["role"] != "assistant":
        messages = messages[:-1]
    if not messages:
        markers = ", ".join(map(repr, record.settings.markers or MARKERS))
        advice = (
            f"; expected turns that begin with {markers}, or others that markers names" if record.settings.format == "transcript" else ""
        )
        raise ValueError(f"no assistant's message, so there is nothing to learn from{advice}")
    if not any(message["role"] == "user" for message in messages):
        raise ValueError("no user's message before the assistant's, expected one that it answers")
    return {"messages": messages}


def read_response(record: Columns, value: Any, name: str) -> tuple[list[Message], str]:
    """Return the text of a response, and the messages before it where it is given as a whole conversation."""
    what = record.called(name)
    messages: list[Message] = []
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        value = value[0]
    if isinstance(value, list) and value and isinstance(value[0], dict):
        messages = read_messages(value, record.settings, what)
    elif isinstance(value, dict):
        if not {record.settings.where("role"), record.settings.where("from")} & set(value):
            where = f"{record.settings.where(name)}{'.*' if name == 'responses' else ''}.{next(iter(value), 'text')}"
            found = f"an object with {', '.join(value) or 'no keys'}"
            raise ValueError(f'{what} is {found}, expected a text or a message; a path names it, such as keys = {{ {name} = "{where}" }}')
        messages = [read_message(value, record.settings)]
    elif record.settings.format == "transcript" and begins_with_marker(value, record.settings):
        messages = read_transcript(value, record.settings, what)
    elif isinstance(value, list) and len(value) > 1:
        one = f'keys = {{ {name} = "{record.settings.where(name)}.0" }}'
        raise ValueError(f"{what} is a list of {len(value)}, expected one response; {one} takes the first")
    elif not isinstance(value, str):
        advice = as_template(name, record.settings.where(name), value)
        raise ValueError(f"{what} is {short(value)}, expected a text or an assistant's message{advice}")
    elif not value.strip():
        raise ValueError(f"{what} is empty")
    else:
        _refuse_transcript(value, what, name)
    *before, last = checked(messages or [{"role": "assistant", "content": value}], record.settings)
    if last["role"] != "assistant":
        raise ValueError(f"{what} ends with the {last['role']}'s message, expected an assistant's")
    return before, last["content"].strip() if record.settings.format == "transcript" else last["content"]


def read_responses(record: Columns) -> tuple[list[Message], list[str]]:
    """Return the prompt and the texts of `keys.responses`."""
    found = [read_response(record, value, "responses") for value in record.values("responses")]
    befores = [before for before, _ in found if before]
    if any(before != befores[0] for before in befores):
        raise ValueError("the responses answer different prompts; only their last messages may differ")
    prompt = prompt_of(record, befores[0] if befores else [], "responses")
    return ending_with_user(dialogue(record, prompt)), [text for _, text in found]


def require_as_many(responses: Sequence[Any], values: Sequence[Any], name: str) -> None:
    if len(responses) != len(values):
        raise ValueError(f"found {len(responses)} responses and {len(values)} {name}, expected one for each response")


def prompt_of(record: Columns, before: list[Message], name: str) -> list[Message]:
    """Return what a response answers: the record's own messages, and those before it in its own conversation."""
    keys = {"messages": "messages", "sharegpt": "conversations", "alpaca": "instruction", "plain": "prompt", "transcript": "text"}
    if before and not record.has(keys[record.settings.format]):
        return before
    return joined(read_prompt(record), before, name)


def joined(prompt: list[Message], before: list[Message], name: str) -> list[Message]:
    """Return one dialogue of a prompt and the messages before a response; they may overlap, and must not contradict each other."""
    if not before:
        return prompt
    if before[0]["role"] == "assistant":
        return [*prompt, *before]
    while prompt and prompt[-1]["role"] == "assistant":
        prompt = prompt[:-1]
    ours, theirs = _compared(prompt), _compared(before)
    system = prompt[:1] if prompt and prompt[0]["role"] == "system" else []
    if theirs[: len(ours)] == ours:
        return before
    if ours[-len(theirs) :] == theirs:
        return prompt
    if theirs[: len(ours) - len(system)] == ours[len(system) :]:
        return [*system, *before]
    raise ValueError(
        f"{name} begins with {short(before[0]['content'])}, the prompt is {short(prompt[-1]['content'])}; expected one prompt for both, "
        "or only one of the two columns"
    )


def _compared(messages: Iterable[Message]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"].replace("\r\n", "\n").strip()) for message in messages]


def _score(value: Any, score_range: tuple[float, float]) -> float:
    """Return a score as 0 to 1: true is the highest of the range and false the lowest."""
    lowest, highest = score_range
    if (verdict := verdict_of(value)) is not None:
        return float(verdict)
    score = number_of(value, "score")
    if not lowest <= score <= highest:
        raise ValueError(f"score is {short(value)}, out of score_range = [{lowest:g}, {highest:g}]")
    return (score - lowest) / (highest - lowest)


def read_reference(record: Columns) -> str | None:
    """Return the one right answer, or None. Anything but text or a number would be compared as text that no one wrote."""
    value = record.optional("reference")
    if isinstance(value, list) and value and all(each == value[0] and isinstance(each, str | int | float) for each in value):
        value = value[0]  # also where several people gave the same answer
    if empty(value):
        return None
    where = record.settings.where("reference")
    if isinstance(value, list) and not isinstance(value[0], dict):
        others = f', or score all of them with a reward function of your own and fields = ["{where}"]' if where != "reference" else ""
        raise ValueError(
            f"{record.called('reference')} has {len(value)} alternatives, {short(value)}, expected one right answer; take one with "
            f'keys = {{ reference = "{where}.0" }}{others}'
        )
    if isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value)):
        advice = f'; keys = {{ reference = "{{{where}}}" }} writes true and false as texts' if isinstance(value, bool) else ""
        raise ValueError(f"{record.called('reference')} is {short(value)}, expected a text or a finite number{advice}")
    return str(value) if isinstance(value, int | float) else read_response(record, value, "reference")[1]
