"""Export: a model as a folder that `transformers` opens, without custom code."""

from __future__ import annotations

from pipelines.artifacts import HfCheckpoint, Model
from pipelines.stage import StageContext, StageFailure


def export(model: Model, stage: StageContext) -> HfCheckpoint:
    """GPT-2's architecture alone: equal logits, equal token ids; a model that speaks in turns has its chat template with it."""
    from gpt.chat import FORMAT
    from gpt.hf import write_checkpoint

    chat_format = model.metadata.get("chat_format")
    if chat_format not in (None, FORMAT):
        raise StageFailure(
            f"model {model.digest[:12]} speaks {chat_format}, this gptline {FORMAT}; export it with the gptline that made it"
        )
    write_checkpoint(model.path, stage.output, chat=chat_format is not None)
    return stage.publish(HfCheckpoint, model=model.digest, tokenizer=model.metadata["tokenizer"])
