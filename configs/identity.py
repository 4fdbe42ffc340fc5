"""Teach the assistant who it is: fill your names into conversations with {{name}} and {{author}}, as LLaMA-Factory publishes them."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from pipelines.artifacts import Conversations, Prompts
from pipelines.ingest import DialogueConfig, DialogueSettings, gather, to_conversation, to_prompt
from pipelines.stage import StageContext


class IdentityConfig(DialogueConfig):
    name: str = Field(min_length=1)
    """What the assistant calls itself."""
    author: str = Field(min_length=1)
    """Who it says made it."""

    def filled(self, columns: dict[str, Any]) -> dict[str, Any]:
        """Return a record with the two names filled in."""
        return {
            column: text.replace("{{name}}", self.name).replace("{{author}}", self.author) if isinstance(text, str) else text
            for column, text in columns.items()
        }


def conversations(config: IdentityConfig, stage: StageContext) -> Conversations:
    def to_content(columns: dict[str, Any], source: DialogueSettings) -> dict[str, Any]:
        return to_conversation(config.filled(columns), source)

    return stage.publish(Conversations, **gather(config, stage, to_content, "conversations"))


def prompts(config: IdentityConfig, stage: StageContext) -> Prompts:
    """Read the questions, with the answers as references: `keys = { reference = "output" }`."""

    def to_content(columns: dict[str, Any], source: DialogueSettings) -> dict[str, Any]:
        return to_prompt(config.filled(columns), source)

    return stage.publish(Prompts, **gather(config, stage, to_content, "prompts"))
