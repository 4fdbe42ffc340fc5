"""Turn coffee orders into dialogues: a customer, an assistant that calls the shop's ordering system, and ratings of its next turn.

The data hold the exchange between the assistant and the ordering system as JSON: as annotations of the customer's messages in the
dialogues, between the turns in the rated generations. Both become the same short text in brackets, which the customer doesn't see:

    user       can i get an espresso please
    assistant  [get_menu_items query: espresso]
    user       [items: [menu_item_id: espresso-0001, name: Espresso]]
    assistant  Single or double?

The ordering system's answers are user turns, since the assistant shouldn't learn to write them. Three things are changed: names that only
repeat the id beside them are left out; orders and their items are numbered instead of identified by up to 32 random digits, which would
be most of a dialogue's tokens; and the welcome, the same before every customer's first message, is left out.
"""

from __future__ import annotations

import json
from itertools import dropwhile, groupby
from typing import Any

from pipelines.artifacts import Conversations, Prompts, Ratings
from pipelines.ingest import DialogueConfig, DialogueSettings, Message, column_of, gather, to_conversation, to_prompt, to_rating
from pipelines.stage import StageContext

NUMBERED = {"order_id": "order", "order_item_id": "item"}
REPEATED = ("attribute_name", "menu_item_name", "modifier_name", "addon_type_name")
RENAMED = {"menu_items": "items"}
"""Names in the rated generations, and what the dialogues call the same thing."""


def conversations(config: DialogueConfig, stage: StageContext) -> Conversations:
    """Read whole dialogues, in which people wrote both sides."""

    def to_content(columns: dict[str, Any], source: DialogueSettings) -> dict[str, Any]:
        return to_conversation({"messages": dialogue(columns)}, source)

    return stage.publish(Conversations, **gather(config, stage, to_content, "conversations"))


def ratings(config: DialogueConfig, stage: StageContext) -> Ratings:
    """Read the assistant's next turn, written by a model, and whether a person rated it right (1) or wrong (0)."""

    def to_content(columns: dict[str, Any], source: DialogueSettings) -> dict[str, Any]:
        messages, response = before_and_next(columns)
        return to_rating({"messages": messages, "response": response, "score": column_of(columns, "reward")}, source, (0, 1))

    return stage.publish(Ratings, **gather(config, stage, to_content, "ratings"))


def prompts(config: DialogueConfig, stage: StageContext) -> Prompts:
    """Read dialogues up to the assistant's next turn; the model's turn is the reference if it was rated right."""

    def to_content(columns: dict[str, Any], source: DialogueSettings) -> dict[str, Any]:
        messages, response = before_and_next(columns)
        return to_prompt({"messages": messages, "reference": response if column_of(columns, "reward") == 1 else None}, source)

    return stage.publish(Prompts, **gather(config, stage, to_content, "prompts"))


def dialogue(columns: dict[str, Any]) -> list[Message]:
    """Return a dialogue with its calls, which annotate the customer's messages: a name, then its JSON arguments."""
    wording = Wording()
    messages = []
    for utterance in column_of(columns, "utterances"):
        messages.append({"role": utterance["speaker"], "content": utterance["text"]})
        for context, named in groupby(utterance["annotations"], key=lambda each: each["context"]):
            name, *texts = [each["value"] for each in named]
            value = json.loads(texts[0], strict=False) if texts else {}
            if context.startswith("api_call"):
                messages.append({"role": "agent", "content": wording.call(name, value)})
            else:
                messages.append({"role": "api", "content": wording.answer(name, value)})
    return messages


def before_and_next(columns: dict[str, Any]) -> tuple[list[Message], str]:
    """Return the messages from the customer's first one on, and the rated message of the assistant."""
    wording = Wording()
    messages = []
    for turn in [*json.loads(column_of(columns, "context")), json.loads(column_of(columns, "generation"))]:
        match turn:
            case {"text": text}:
                content = text
            case {"api": called}:
                content = " ".join(wording.call(name, value) for name, value in called.items())
            case {"response": answers}:
                content = " ".join(wording.answer(name, value) for name, value in answers.items())
        messages.append({"role": turn["role"], "content": content})
    *before, response = dropwhile(lambda message: message["role"] != "user", messages) if len(messages) > 1 else messages
    return before, response["content"]


class Wording:
    """Write JSON as words, within one dialogue.

    `Wording().call("add_order_item", {"order_id": "28740", "quantity": "1"}) == "[add_order_item order_id: order-1, quantity: 1]"`
    """

    def __init__(self) -> None:
        self._seen: dict[str, list[str]] = {key: [] for key in NUMBERED}

    def call(self, name: str, value: Any) -> str:
        return f"[{name} {self._words(value)}]".replace(" ]", "]")

    def answer(self, name: str, value: Any) -> str:
        """Write an answer without its name, which repeats that of the call before it, unless the answer has nothing else."""
        return f"[{self._words(value) or name}]"

    def _words(self, value: Any, key: str = "") -> str:
        match value:
            case dict():
                named = {RENAMED.get(key, key): each for key, each in value.items() if key not in REPEATED}
                if "attribute_id" in named:  # {"attribute_id": "milk-options", "option": "Oat Milk"} is "milk-options: Oat Milk"
                    named = {named.pop("attribute_id"): named.pop("option", None) or named.pop("options", ""), **named}
                return ", ".join(f"{key}: {self._words(each, key)}" for key, each in named.items() if each not in ({}, []))
            case list():
                return f"[{'; '.join(self._words(each) for each in value)}]"
            case str() if key in NUMBERED:
                seen = self._seen[key]
                if value not in seen:
                    seen.append(value)
                return f"{NUMBERED[key]}-{seen.index(value) + 1}"
            case str():
                return " ".join(value.split())
            case _:
                return json.dumps(value)
