"""Conversations: outside dialogues become messages in turn, for instruction tuning."""

from __future__ import annotations

from pipelines.artifacts import Conversations
from pipelines.ingest.dialogues import DialogueConfig, to_conversation
from pipelines.records import gather
from pipelines.stage import StageContext


def conversations(config: DialogueConfig, stage: StageContext) -> Conversations:
    """Every record becomes a conversation, or is counted under the reason why not."""
    return stage.publish(Conversations, **gather(config, stage, to_conversation, "conversations"))
