"""Prompts: what a policy is asked to answer, with the right answer where there is one."""

from __future__ import annotations

from pipelines.artifacts import Prompts
from pipelines.ingest.dialogue_settings import DialogueConfig
from pipelines.ingest.dialogues import to_prompts
from pipelines.ingest.gather import gather
from pipelines.stage import StageContext


class PromptsConfig(DialogueConfig):
    kind = "prompts"


def prompts(config: PromptsConfig, stage: StageContext) -> Prompts:
    """Turn every record into a prompt, or count it under the reason why not."""
    return stage.publish(Prompts, **gather(config, stage, to_prompts, "prompts", columns=config.columns_read))
