"""Conversations as token ids, with a mask of what the assistant wrote.

    <|system|>Be brief.<|end|><|user|>Who are you?<|end|><|assistant|>A small model.<|end|>
                                                                      ^^^^^^^^^^^^^^^^^^^^^^^^^  True in the loss mask

A message begins with its role's token and ends with <|end|>. The text between them is encoded by itself, so a prompt's ids are a prefix
of the conversation's ids, and text that spells a special token stays text. Left out: tools, images, speaker names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gpt.tokenizer import Tokenizer

FORMAT = "gptline-1"
"""The value of `chat_format` in the manifest of a model that was trained on conversations in this format."""
ROLES = ("system", "user", "assistant")

Message = Mapping[str, str]
"""`{"role": "user", "content": "Who are you?"}`"""


@dataclass(frozen=True)
class Conversation:
    token_ids: list[int]
    loss_mask: list[bool]
    """True = written by the assistant: its text and end token, but not the role token before them."""
    cut: bool = False
    """True: turns at the end were left out to fit."""


def encode_conversation(tokenizer: Tokenizer, messages: Sequence[Message], max_tokens: int | None = None) -> Conversation | None:
    """Encode a conversation. One longer than `max_tokens` is cut after the last assistant message that ends within the limit.

    None if not even the first assistant message does.
    """
    token_ids: list[int] = []
    loss_mask: list[bool] = []
    fitting = 0
    for message in messages:
        message_ids = encode_message(tokenizer, message)
        token_ids += message_ids
        loss_mask += [False] + [message["role"] == "assistant"] * (len(message_ids) - 1)
        if max_tokens is not None and len(token_ids) > max_tokens:
            break
        if message["role"] == "assistant":
            fitting = len(token_ids)
    if not fitting:
        return None
    return Conversation(token_ids[:fitting], loss_mask[:fitting], cut=fitting < len(token_ids))


def encode_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Encode what precedes a response: the messages so far, and the assistant's role token."""
    return [token_id for message in messages for token_id in encode_message(tokenizer, message)] + [tokenizer.special["assistant"]]


def encode_response(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encode a response as the policy would have written it, with its end token."""
    return [*tokenizer.encode(text), tokenizer.special["end"]]


def encode_message(tokenizer: Tokenizer, message: Message) -> list[int]:
    if message["role"] not in ROLES:
        raise ValueError(f"expected one of the roles {', '.join(ROLES)}, found {message['role']!r}")
    return [tokenizer.special[message["role"]], *tokenizer.encode(message["content"]), tokenizer.special["end"]]
