"""The settings that the training loops read, as frozen models without torch.

A stage's Config extends these, so a loop and the pipeline file speak of one set of names.
Importing this module must stay cheap: `gptline plan` does so.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, ValidationError, field_validator, model_validator
from pydantic_core import CoreSchema, core_schema


class Settings(BaseModel):
    """A frozen set of settings that refuses what it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class _OperationalMark:
    """Marks a field that says how work is carried out, not what comes out: it is not part of a stage's key."""

    def __repr__(self) -> str:
        return "operational"


OPERATIONAL = _OperationalMark()


def check_effect(settings: Settings, names: Sequence[str], where: str) -> None:
    """ValueError where one of these settings has another value than its own, though `where` ("without a reward") none has an effect."""
    fields = type(settings).model_fields
    given = [f"{name} = {value!r}" for name, value in settings if name in names and value != fields[name].default]
    if given:
        raise ValueError(f"{' and '.join(given)} would have no effect {where}; leave {'it' if len(given) == 1 else 'them'} out")


T = TypeVar("T")
Operational = Annotated[T, OPERATIONAL]


class UserFunction(str):
    """A setting that names a function in a file of the user's own, "./reward.py:score": its code is part of a stage's key."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(cls, core_schema.str_schema())


# Far above what anyone trains: a digit too many is a fault of the file, not a MemoryError late in the line.
Count = Annotated[int, Field(ge=1, le=2**12)]
Width = Annotated[int, Field(ge=1, le=2**17)]
Size = Annotated[int, Field(ge=1, le=2**24)]
Share = Annotated[float, Field(ge=0, lt=1)]


class ModelShape(Settings):
    """A transformer's architecture, less the vocabulary that its tokenizer decides.

    `ModelShape(n_layer=2, n_head=4, n_embd=64, seq_len=64)` is a small GPT-2.
    """

    n_layer: Count
    n_head: Count
    n_kv_head: Count | None = None
    """Key and value heads; fewer than `n_head` is grouped-query attention. None: as many as `n_head`."""
    n_embd: Width
    """Width C of the residual stream."""
    seq_len: Size
    """Longest sequence, in tokens."""
    dropout: Share = 0.0
    positions: Literal["learned", "sinusoidal", "rope"] = "learned"
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_first: bool = True
    """True: normalise before each sub-layer (GPT-2); False: after it (the 2017 paper)."""
    activation: Literal["gelu", "relu", "swiglu"] = "gelu"
    n_hidden: Size | None = None
    """Width of the feed-forward layer. None: 4 C, or 8/3 C rounded up to a multiple of 8 for SwiGLU."""
    bias: bool = True
    tied: bool = True
    """True: the output layer is the token embedding's transpose."""

    @model_validator(mode="after")
    def _heads_fit(self) -> ModelShape:
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd = {self.n_embd} is not a multiple of n_head = {self.n_head}; "
                f"the nearest widths that fit are {self.n_embd // self.n_head * self.n_head} "
                f"and {(self.n_embd // self.n_head + 1) * self.n_head}"
            )
        if self.n_head % self.kv_heads():
            raise ValueError(f"n_head = {self.n_head} is not a multiple of n_kv_head = {self.n_kv_head}")
        if self.positions == "rope" and self.head_dim() % 2:
            raise ValueError(f"rotary positions need an even head_dim, found n_embd / n_head = {self.head_dim()}")
        return self

    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    def hidden(self) -> int:
        if self.n_hidden is not None:
            return self.n_hidden
        if self.activation == "swiglu":
            return (8 * self.n_embd // 3 + 7) // 8 * 8
        return 4 * self.n_embd


class GPTConfig(ModelShape):
    """A transformer's whole architecture: what `config.json` beside the weights holds."""

    vocab_size: Size


_LLAMA = dict(positions="rope", norm="rmsnorm", activation="swiglu", bias=False, tied=False)
_PAPER = dict(positions="sinusoidal", activation="relu", norm_first=False)

PRESETS: dict[str, ModelShape] = {
    "gpt2-nano": ModelShape(n_layer=2, n_head=2, n_embd=32, seq_len=32),
    "gpt2-tiny": ModelShape(n_layer=4, n_head=4, n_embd=128, seq_len=128),
    "gpt2-mini": ModelShape(n_layer=6, n_head=6, n_embd=192, seq_len=256),
    "gpt2-124m": ModelShape(n_layer=12, n_head=12, n_embd=768, seq_len=1024),
    "llama-nano": ModelShape(n_layer=2, n_head=2, n_kv_head=1, n_embd=32, seq_len=32, **_LLAMA),
    "llama-tiny": ModelShape(n_layer=4, n_head=4, n_kv_head=2, n_embd=128, seq_len=128, **_LLAMA),
    "transformer-nano": ModelShape(n_layer=2, n_head=2, n_embd=32, seq_len=32, **_PAPER),
    "transformer-tiny": ModelShape(n_layer=4, n_head=4, n_embd=128, seq_len=128, **_PAPER),
}


class TrainSettings(Settings):
    """What every training loop reads: how long, how large, how fast, how exact, and on what."""

    steps: int = Field(ge=1)
    """Optimizer steps."""
    global_batch_size: Size
    """Sequences per optimizer step, over all ranks."""
    micro_batch_size: Operational[int | None] = Field(default=None, ge=1)
    """Sequences per rank per forward pass. None: the rank's whole share of the batch at once."""

    lr: float = Field(gt=0)
    """Highest learning rate, reached after `warmup_steps`."""
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = Field(default=0, ge=0)
    final_lr_share: float = Field(default=0.1, ge=0, le=1)
    """Learning rate of the last step as a share of `lr`."""
    weight_decay: float = Field(default=0.1, ge=0)
    """AdamW's decay, on matrices alone."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    eps: float = Field(default=1e-8, gt=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this global norm."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"

    engine: Operational[Literal["deepspeed", "torch"]] = "deepspeed"
    zero_stage: Operational[int] = Field(default=1, ge=0, le=3)
    """What DeepSpeed shards over ranks: 1 optimizer state, 2 also gradients, 3 also weights."""
    offload: Operational[bool] = False
    """Optimizer state in host memory (ZeRO 1 to 3)."""
    activation_checkpointing: Operational[bool] = False
    """Recompute each block in the backward pass instead of keeping what is inside it."""
    log_every: Operational[int] = Field(default=10, ge=1)
    checkpoint_every: Operational[int] = Field(default=200, ge=1)
    max_restarts: Operational[int] = Field(default=2, ge=0)
    """How often a gang that lost a rank starts again from its newest checkpoint."""
    start_deadline_s: Operational[float] = Field(default=300, gt=0)
    """Longest time from the gang's start to its first step; and how long a gang waits for room that no node has."""
    step_deadline_s: Operational[float] = Field(default=600, gt=0)
    """Longest time for one step, evaluation or checkpoint."""

    @model_validator(mode="after")
    def _schedule_fits(self) -> TrainSettings:
        if self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps = {self.warmup_steps} is more than steps = {self.steps}")
        return self

    def rank_batch_size(self, world_size: int) -> int:
        """Sequences of one optimizer step that one rank computes."""
        share, rest = divmod(self.global_batch_size, world_size)
        if rest:
            raise ValueError(
                f"global_batch_size = {self.global_batch_size} can't be shared by {world_size} ranks; "
                f"the nearest that fit are {_nearest(self.global_batch_size, world_size)}"
            )
        return share

    def micro_batch(self, world_size: int) -> int:
        return self.micro_batch_size or self.rank_batch_size(world_size)

    def gradient_accumulation_steps(self, world_size: int) -> int:
        """Forward and backward passes of one rank per optimizer step."""
        per_pass = self.micro_batch(world_size) * world_size
        passes, rest = divmod(self.global_batch_size, per_pass)
        if rest or not passes:
            raise ValueError(
                f"global_batch_size = {self.global_batch_size} is not a multiple of micro_batch_size * ranks "
                f"= {self.micro_batch(world_size)} * {world_size} = {per_pass}; "
                f"the nearest that fit are {_nearest(self.global_batch_size, per_pass)}"
            )
        return passes


class EvaluatedSettings(TrainSettings):
    """Of a loop that looks at held-out data as it goes."""

    eval_every: Operational[int] = Field(default=100, ge=1)


class PretrainSettings(EvaluatedSettings):
    """`PretrainSettings(preset="gpt2-tiny", seq_len=64, steps=2000, global_batch_size=12, lr=1e-3)`."""

    preset: str
    """A key of `PRESETS`."""
    n_layer: Count | None = None
    """This and what follows take the place of the preset's own values where they are given."""
    n_head: Count | None = None
    n_kv_head: Count | None = None
    n_embd: Width | None = None
    seq_len: Size | None = None
    dropout: Share | None = None
    positions: Literal["learned", "sinusoidal", "rope"] | None = None
    norm: Literal["layernorm", "rmsnorm"] | None = None
    norm_first: bool | None = None
    activation: Literal["gelu", "relu", "swiglu"] | None = None
    n_hidden: Size | None = None
    bias: bool | None = None
    tied: bool | None = None

    eval_tokens: Operational[int] = Field(default=65536, ge=1)
    """Held-out tokens that `val/loss` looks at, the same ones each time; the `evaluate` stage reads them all."""

    @field_validator("preset")
    @classmethod
    def _preset_exists(cls, preset: str) -> str:
        if preset not in PRESETS:
            close = get_close_matches(preset, PRESETS, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ValueError(f"no preset {preset!r}; {hint}There are {', '.join(PRESETS)}")
        return preset

    @model_validator(mode="after")
    def _shape_fits(self) -> PretrainSettings:
        try:
            self.shape()
        except ValidationError as error:
            # Pydantic would print a second report inside its own. Each size is in its bounds here: what is wrong is how they go together.
            raise ValueError("; ".join(fault["msg"].removeprefix("Value error, ") for fault in error.errors())) from None
        return self

    def shape(self) -> ModelShape:
        given = {name: getattr(self, name) for name in ModelShape.model_fields if getattr(self, name) is not None}
        return ModelShape(**{**PRESETS[self.preset].model_dump(), **given})


class SftSettings(EvaluatedSettings):
    """`SftSettings(steps=400, global_batch_size=16, lr=1e-3)`; a batch is made of whole conversations."""

    dropout: float | None = Field(default=None, ge=0.0, lt=1.0)
    """In place of the policy's own."""
    eval_conversations: Operational[int] = Field(default=256, ge=1)
    """Held-out conversations that `val/loss` looks at, the same ones each time."""


class RewardSettings(EvaluatedSettings):
    """`RewardSettings(steps=200, global_batch_size=16, lr=5e-4)`; a batch is made of whole pairs and of ratings."""

    dropout: float | None = Field(default=None, ge=0.0, lt=1.0)
    """In place of the policy's own."""
    centering_coef: float = Field(default=0.01, ge=0)
    """Weight of the square of a pair's two scores together. Pairs alone leave each prompt's level open, and scores of different prompts
    could not be compared."""
    eval_items: Operational[int] = Field(default=256, ge=1)
    """Held-out pairs and ratings that `val/loss` looks at, the same ones each time; the figures at the end are of all of them."""


class RlSettings(TrainSettings):
    """A step is one rollout phase with its updates; `global_batch_size` counts the rollouts of one update.

    `RlSettings(steps=40, prompts_per_step=32, global_batch_size=32, max_response_tokens=48, lr=1e-4)`
    """

    algorithm: Literal["ppo", "reinforce"] = "ppo"
    """"reinforce" is the theory's beginning: no value model, no clipping, no reuse of rollouts."""
    prompts_per_step: int = Field(ge=1)
    responses_per_prompt: int = Field(default=1, ge=1)
    max_response_tokens: int = Field(ge=1)
    temperature: float = Field(default=1.0, gt=0)
    """Of sampling and of training alike."""
    ppo_epochs: int = Field(default=1, ge=1)
    """How often each rollout is learned from."""
    clip_eps: float = Field(default=0.2, gt=0)
    value_clip_eps: float = Field(default=0.2, gt=0)
    value_lr: float | None = Field(default=None, gt=0)
    """Highest learning rate of the value model. None: as the policy's."""
    value_warmup_steps: int = Field(default=0, ge=0)
    """First steps in which the value model alone learns."""
    kl_coef: float = Field(default=0.05, ge=0)
    """Price in reward of a nat that a token's logprob lies above the reference policy's. 0: no reference policy."""
    entropy_coef: float = Field(default=0.0, ge=0)
    gamma: float = Field(default=1.0, gt=0, le=1)
    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    missing_end_score: float = -1.0
    """What a response is worth that was cut off, whatever it says, or that could not be judged."""
    max_failed_share: float = Field(default=0.05, ge=0, le=1)
    """Highest share of a step's responses that may be beyond judging, such as those that a reward function fails on."""

    @model_validator(mode="after")
    def _fit_together(self) -> RlSettings:
        rollouts = self.rollouts_per_step()
        if rollouts % self.global_batch_size:
            raise ValueError(
                f"prompts_per_step * responses_per_prompt = {self.prompts_per_step} * {self.responses_per_prompt} = {rollouts} is not "
                f"a multiple of global_batch_size = {self.global_batch_size}, the rollouts of an update"
            )
        if self.zero_stage == 3:
            raise ValueError("zero_stage = 3 shards the weights that sampling needs whole at every token; RL takes 0, 1 or 2")
        if self.algorithm == "reinforce" and (self.ppo_epochs > 1 or rollouts != self.global_batch_size):
            raise ValueError(
                'algorithm = "reinforce" learns once from the rollouts of its own policy: ppo_epochs = 1 and global_batch_size = '
                f"prompts_per_step * responses_per_prompt = {rollouts}, found {self.ppo_epochs} and {self.global_batch_size}"
            )
        if self.algorithm == "ppo" and self.value_warmup_steps >= self.steps:
            raise ValueError(
                f"value_warmup_steps = {self.value_warmup_steps} of steps = {self.steps} are the value model's alone, which leaves the "
                "policy none to learn in; give fewer value_warmup_steps, or more steps"
            )
        if self.algorithm == "reinforce":
            of_ppo = ("clip_eps", "value_clip_eps", "value_lr", "value_warmup_steps", "gae_lambda")
            check_effect(self, of_ppo, 'with algorithm = "reinforce", which clips nothing and has no value model')
        return self

    def rollouts_per_step(self) -> int:
        return self.prompts_per_step * self.responses_per_prompt


def _nearest(size: int, unit: int) -> str:
    below = size // unit * unit
    return f"{below} and {below + unit}" if below else f"{unit}"
