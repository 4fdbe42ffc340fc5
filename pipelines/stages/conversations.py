"""Conversations: outside dialogues become messages in turn, for instruction tuning."""

from __future__ import annotations

from pipelines.artifacts import Conversations
from pipelines.ingest.dialogue_settings import DialogueConfig
from pipelines.ingest.dialogues import to_conversations
from pipelines.ingest.gather import gather
from pipelines.stage import StageContext


class ConversationsConfig(DialogueConfig):
    kind = "conversations"


def conversations(config: ConversationsConfig, stage: StageContext) -> Conversations:
    """Turn every record into a conversation, or count it under the reason why not."""
    return stage.publish(Conversations, **gather(config, stage, to_conversations, "conversations", columns=config.columns_read))
