"""Pretrain: next-token prediction on the training split, from random weights or from a saved model."""

from __future__ import annotations

from gpt.settings import PretrainSettings
from pipelines.artifacts import Model, Tokens
from pipelines.stage import Models, StageConfig, StageContext, require_role, require_same_tokenizer

MODELS = Models(needs={"model": "policy"}, makes="policy", makes_chat=False)


class PretrainConfig(StageConfig, PretrainSettings):
    pass


def pretrain(config: PretrainConfig, tokens: list[Tokens], model: Model | None, stage: StageContext) -> Model:
    """Train on the windows of all tokens artifacts. They and the model to start from must have one tokenizer."""
    from gpt.pretrain import train

    if model:
        require_role(model, "policy", "pretrain starts from a policy, or without a model")
    first = tokens[0]
    require_same_tokenizer(first, *tokens[1:], *([model] if model else []))
    folders = [each.path for each in tokens]
    dtype, vocab_size = first.metadata["dtype"], first.metadata["vocab_size"]
    trained = stage.gang(train, config, folders, dtype, vocab_size, model.path if model else None, stage.seed, stage.output)
    return stage.publish(Model, tokenizer=first.metadata["tokenizer"], **trained.metadata)
