"""Export: a model becomes a folder that `transformers` opens without custom code."""

from __future__ import annotations

from gpt.hf_folder import check_exportable
from gpt.settings import GPTConfig
from pipelines.artifacts import HfCheckpoint, Model
from pipelines.stage import StageContext, StageFailure


def export(model: Model, stage: StageContext) -> HfCheckpoint:
    """Export a model of GPT-2's architecture with equal logits and token ids. One that speaks in turns gets its chat template."""
    try:
        check_exportable(GPTConfig.model_validate_json((model.path / "config.json").read_text(encoding="utf-8")))
    except ValueError as error:
        raise StageFailure(f"model {model.digest[:12]}: {error}") from error

    from gpt.chat import FORMAT
    from gpt.hf import write_checkpoint

    chat_format = model.metadata.get("chat_format")
    if chat_format not in (None, FORMAT):
        raise StageFailure(
            f"model {model.digest[:12]}: expected chat format {FORMAT}, found {chat_format}; export it with the gptline that made it"
        )
    write_checkpoint(model.path, stage.output, chat=chat_format is not None)
    return stage.publish(HfCheckpoint, model=model.digest, tokenizer=model.metadata["tokenizer"])
