"""Pretrain: next-token prediction on the training split, from nothing or from a saved model."""

from __future__ import annotations

from gpt.settings import PretrainSettings
from pipelines.artifacts import Model, Tokens
from pipelines.stage import Models, StageConfig, StageContext, StageFailure, require_role

MODELS = Models(needs={"model": "policy"}, makes="policy", makes_chat=False)


class PretrainConfig(StageConfig, PretrainSettings):
    pass


def pretrain(config: PretrainConfig, tokens: list[Tokens], model: Model | None, stage: StageContext) -> Model:
    """Tokens of several datasets count by their length; all must come from one tokenizer, and so must the model to start from."""
    from gpt.pretrain import train

    if model:
        require_role(model, "policy", "pretrain goes on from a policy, or begins from nothing")
    first = tokens[0]
    for each in [*tokens[1:], *([model] if model else [])]:
        if each.metadata["tokenizer"] != first.metadata["tokenizer"]:
            raise StageFailure(
                f"{each.kind} {each.digest[:12]} was made with tokenizer {each.metadata['tokenizer'][:12]}, "
                f"tokens {first.digest[:12]} with {first.metadata['tokenizer'][:12]}; tokenize the documents with one of the two"
            )
    folders = [each.path for each in tokens]
    dtype, vocab_size = first.metadata["dtype"], first.metadata["vocab_size"]
    metadata = stage.gang(train, config, folders, dtype, vocab_size, model.path if model else None, stage.seed, stage.output)
    return stage.publish(Model, tokenizer=first.metadata["tokenizer"], **metadata)
