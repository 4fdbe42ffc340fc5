"""SFT: a policy learns from conversations to answer in turns."""

from __future__ import annotations

from gpt.settings import SftSettings
from pipelines.artifacts import Conversations, Model
from pipelines.stage import Models, StageConfig, StageContext, require_role

MODELS = Models(needs={"policy": "policy"}, makes="policy", makes_chat=True)


class SftConfig(StageConfig, SftSettings):
    pass


def sft(config: SftConfig, policy: Model, conversations: list[Conversations], stage: StageContext) -> Model:
    """Conversations of several datasets count by their number; the tokenizer is the policy's."""
    from gpt.chat import FORMAT
    from gpt.sft import train

    require_role(policy, "policy", "sft wants a policy, such as a pretrain stage makes")
    folders = [each.path for each in conversations]
    metadata = stage.gang(train, config, policy.path, folders, stage.seed, stage.output)
    return stage.publish(Model, tokenizer=policy.metadata["tokenizer"], chat_format=FORMAT, **metadata)
