"""Prompts: what a policy is to answer, with the right answer where there is one."""

from __future__ import annotations

from pipelines.artifacts import Prompts
from pipelines.ingest.dialogues import DialogueConfig, to_prompt
from pipelines.records import gather
from pipelines.stage import StageContext


def prompts(config: DialogueConfig, stage: StageContext) -> Prompts:
    """Every record becomes a prompt, or is counted under the reason why not."""
    return stage.publish(Prompts, **gather(config, stage, to_prompt, "prompts"))
