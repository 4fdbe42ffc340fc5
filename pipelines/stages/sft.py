"""SFT: a policy learns from conversations to answer in turns."""

from __future__ import annotations

from gpt.settings import SftSettings
from pipelines.artifacts import Conversations, Model
from pipelines.stage import Models, StageConfig, StageContext, require_role

MODELS = Models(needs={"policy": "policy"}, makes="policy", makes_chat=True)


class SftConfig(StageConfig, SftSettings):
    pass


def sft(config: SftConfig, policy: Model, conversations: list[Conversations], stage: StageContext) -> Model:
    """Train on the conversations of all datasets, each once per epoch, with the policy's tokenizer."""
    from gpt.chat import FORMAT
    from gpt.sft import train

    require_role(policy, "policy", "sft trains a policy, such as a pretrain stage makes")
    folders = [each.path for each in conversations]
    trained = stage.gang(train, config, policy.path, folders, stage.seed, stage.output)
    return stage.publish(Model, tokenizer=policy.metadata["tokenizer"], chat_format=FORMAT, **trained.metadata)
