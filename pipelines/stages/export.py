"""Export: a model as a folder that `transformers` opens, without custom code."""

from __future__ import annotations

from pipelines.artifacts import HfCheckpoint, Model
from pipelines.stage import StageContext


def export(model: Model, stage: StageContext) -> HfCheckpoint:
    """GPT-2's architecture alone: equal logits, equal token ids."""
    from gpt.hf import write_checkpoint

    write_checkpoint(model.path, stage.output)
    return stage.publish(HfCheckpoint, model=model.digest, tokenizer=model.metadata["tokenizer"])
