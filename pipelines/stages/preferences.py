"""Preferences: a prompt and two responses, one of which somebody liked better."""

from __future__ import annotations

from pipelines.artifacts import Preferences
from pipelines.ingest.dialogues import DialogueConfig, to_pair
from pipelines.records import gather
from pipelines.stage import StageContext


def preferences(config: DialogueConfig, stage: StageContext) -> Preferences:
    """Every record becomes a pair, or is counted under the reason why not."""
    return stage.publish(Preferences, **gather(config, stage, to_pair, "pairs"))
