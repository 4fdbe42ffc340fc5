"""Conversations as token ids, and which of them the assistant wrote.

    <|system|>Be brief.<|end|><|user|>Who are you?<|end|><|assistant|>A small model.<|end|>
                                                                      ^^^^^^^^^^^^^^^^^^^^^^^^^  True in the loss mask

A message is opened by its role's token and closed by <|end|>. Text is encoded between the two by itself, so that a prompt's ids
are a prefix of the conversation's, and text that spells a special token stays text. Left out: tools, images, names of speakers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gpt.tokenizer import Tokenizer

FORMAT = "gptline-1"
"""What a model's manifest says of its turns, as `chat_format`."""
ROLES = ("system", "user", "assistant")

Message = Mapping[str, str]
"""`{"role": "user", "content": "Who are you?"}`"""


@dataclass(frozen=True)
class Conversation:
    token_ids: list[int]
    loss_mask: list[bool]
    """True = written by the assistant: its text and its end token, but not the role token that opens it."""
    cut: bool = False
    """True: turns were left out at the end, to fit."""


def encode_conversation(tokenizer: Tokenizer, messages: Sequence[Message], max_tokens: int | None = None) -> Conversation | None:
    """The whole conversation; of one that is longer than `max_tokens`, the first turns up to an assistant's message that ends within.

    None where not even the first such message does.
    """
    token_ids: list[int] = []
    loss_mask: list[bool] = []
    fitting = 0
    for message in messages:
        of_message = encode_message(tokenizer, message)
        token_ids += of_message
        loss_mask += [False] + [message["role"] == "assistant"] * (len(of_message) - 1)
        if max_tokens is not None and len(token_ids) > max_tokens:
            break
        if message["role"] == "assistant":
            fitting = len(token_ids)
    if not fitting:
        return None
    return Conversation(token_ids[:fitting], loss_mask[:fitting], cut=fitting < len(token_ids))


def encode_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """What comes before a response: the messages so far, and the token that opens the assistant's."""
    return [token_id for message in messages for token_id in encode_message(tokenizer, message)] + [tokenizer.special["assistant"]]


def encode_response(tokenizer: Tokenizer, text: str) -> list[int]:
    """A response as the policy would have written it, with its end token."""
    return [*tokenizer.encode(text), tokenizer.special["end"]]


def encode_message(tokenizer: Tokenizer, message: Message) -> list[int]:
    if message["role"] not in ROLES:
        raise ValueError(f"role {message['role']!r} is unknown; wanted {', '.join(ROLES)}")
    return [tokenizer.special[message["role"]], *tokenizer.encode(message["content"]), tokenizer.special["end"]]
