"""The settings that the training loops read, as frozen models without torch.

A stage's Config extends these, so a loop and the pipeline file use the same names.
Importing this module must stay cheap, because `gptline plan` does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, ValidationError, field_validator, model_validator
from pydantic_core import CoreSchema, core_schema


class Settings(BaseModel):
    """A frozen set of settings that refuses unknown names."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class _OperationalMark:
    """Marks a field that changes how work is done but not its result: it is not part of a stage's key."""

    def __repr__(self) -> str:
        return "operational"


OPERATIONAL = _OperationalMark()


def check_effect(settings: Settings, names: Sequence[str], where: str) -> None:
    """Raise ValueError if one of these settings differs from its default, although none has an effect `where` ("without a reward")."""
    fields = type(settings).model_fields
    changed = [f"{name} = {value!r}" for name, value in settings if name in names and value != fields[name].default]
    if changed:
        raise ValueError(f"{' and '.join(changed)} would have no effect {where}; remove {'it' if len(changed) == 1 else 'them'}")


T = TypeVar("T")
Operational = Annotated[T, OPERATIONAL]


class UserFunction(str):
    """A setting that names a function in a user's file, "./reward.py:score". The function's code is part of the stage's key."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(cls, core_schema.str_schema())


# Far above what anyone trains, so that a digit too many is an error in the file rather than a MemoryError late in the pipeline.
Count = Annotated[int, Field(ge=1, le=2**12)]
Width = Annotated[int, Field(ge=1, le=2**17)]
Size = Annotated[int, Field(ge=1, le=2**24)]
Share = Annotated[float, Field(ge=0, lt=1)]


class ModelShape(Settings):
    """A transformer's architecture, except for the vocabulary size, which the tokenizer determines.

    `ModelShape(n_layer=2, n_head=4, n_embd=64, seq_len=64)` is a small GPT-2.
    """

    n_layer: Count
    n_head: Count
    n_kv_head: Count | None = None
    """Key and value heads; fewer than `n_head` means grouped-query attention. None: as many as `n_head`."""
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
    """A transformer's whole architecture, as stored in `config.json` beside the weights."""

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
    """Settings of every training loop: its length, batches, optimizer, precision, engine and deadlines."""

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
    """AdamW's weight decay, on matrices only."""
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
    """How often a gang that lost a rank is restarted from its newest checkpoint."""
    start_deadline_s: Operational[float] = Field(default=300, gt=0)
    """Most seconds for the gang to start, for each part of preparing the first step, and for encoding 1,000 records. Also how long a gang
    waits for resources that no node has."""
    step_deadline_s: Operational[float] = Field(default=600, gt=0)
    """Most seconds for one step, evaluation or checkpoint."""

    @model_validator(mode="after")
    def _schedule_fits(self) -> TrainSettings:
        if self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps = {self.warmup_steps} is more than steps = {self.steps}")
        return self

    def rank_batch_size(self, world_size: int) -> int:
        """Sequences that one rank computes per optimizer step."""
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
    """Settings of a loop that evaluates on held-out data during training."""

    eval_every: Operational[int] = Field(default=100, ge=1)


class PretrainSettings(EvaluatedSettings):
    """`PretrainSettings(preset="gpt2-tiny", seq_len=64, steps=2000, global_batch_size=12, lr=1e-3)`."""

    preset: str
    """A key of `PRESETS`."""
    n_layer: Count | None = None
    """This setting and those up to `tied` override the preset's values if given."""
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
    """Held-out tokens that `val/loss` is measured on, the same ones each time; the `evaluate` stage reads all of them."""

    @field_validator("preset")
    @classmethod
    def _preset_exists(cls, preset: str) -> str:
        if preset not in PRESETS:
            close = get_close_matches(preset, PRESETS, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"unknown preset {preset!r}; expected one of {', '.join(PRESETS)}.{hint}")
        return preset

    @model_validator(mode="after")
    def _shape_fits(self) -> PretrainSettings:
        try:
            self.shape()
        except ValidationError as error:
            # Pydantic would print a second report inside its own. Here each size is within its bounds, but they do not fit together.
            raise ValueError("; ".join(each["msg"].removeprefix("Value error, ") for each in error.errors())) from None
        return self

    def shape(self) -> ModelShape:
        overrides = {name: getattr(self, name) for name in ModelShape.model_fields if getattr(self, name) is not None}
        return ModelShape(**{**PRESETS[self.preset].model_dump(), **overrides})


class SftSettings(EvaluatedSettings):
    """`SftSettings(steps=400, global_batch_size=16, lr=1e-3)`; a batch is made of whole conversations."""

    dropout: float | None = Field(default=None, ge=0.0, lt=1.0)
    """Overrides the policy's own dropout during this training."""
    eval_conversations: Operational[int] = Field(default=256, ge=1)
    """Held-out conversations that `val/loss` is measured on, the same ones each time."""


class RewardSettings(EvaluatedSettings):
    """`RewardSettings(steps=200, global_batch_size=16, lr=5e-4)`; a batch is made of whole pairs and ratings."""

    dropout: float | None = Field(default=None, ge=0.0, lt=1.0)
    """Overrides the policy's own dropout during this training."""
    centering_coef: float = Field(default=0.01, ge=0)
    """Weight of the squared sum of a pair's two scores. Pairs only determine differences within a prompt; centering makes scores of
    different prompts comparable."""
    eval_items: Operational[int] = Field(default=256, ge=1)
    """Held-out pairs and ratings that `val/loss` is measured on, the same ones each time; the final figures use all of them."""


class AlgorithmTraits(NamedTuple):
    """What is known of an RL algorithm without torch."""

    value_model: bool
    """A value model learns beside the policy, and its expectation is the baseline."""
    clipped: bool
    """The probability ratio is clipped, so rollouts may be learned from more than once."""


ALGORITHMS = {
    "ppo": AlgorithmTraits(value_model=True, clipped=True),
    "reinforce": AlgorithmTraits(value_model=False, clipped=False),
}
"""The values of `RlSettings.algorithm`; `gpt/rl/credit.py` has a function for each."""


class RlSettings(TrainSettings):
    """A step is one rollout phase with its updates; `global_batch_size` counts the rollouts of one update.

    `RlSettings(steps=40, prompts_per_step=32, global_batch_size=32, max_response_tokens=48, lr=1e-4)`
    """

    algorithm: Literal["ppo", "reinforce"] = "ppo"
    """"reinforce" is the simplest: no value model, no clipping, no reuse of rollouts."""
    prompts_per_step: int = Field(ge=1)
    responses_per_prompt: int = Field(default=1, ge=1)
    max_response_tokens: int = Field(ge=1)
    temperature: float = Field(default=1.0, gt=0)
    """Temperature at which responses are sampled, and at which their logprobs are computed in training."""
    ppo_epochs: int = Field(default=1, ge=1)
    """How often each rollout is learned from."""
    clip_eps: float = Field(default=0.2, gt=0)
    value_clip_eps: float = Field(default=0.2, gt=0)
    value_lr: float | None = Field(default=None, gt=0)
    """Highest learning rate of the value model. None: the same as `lr`."""
    value_warmup_steps: int = Field(default=0, ge=0)
    """First steps, in which only the value model learns."""
    kl_coef: float = Field(default=0.05, ge=0)
    """Reward subtracted per nat by which a token's logprob exceeds the reference policy's. 0: no reference policy."""
    entropy_coef: float = Field(default=0.0, ge=0)
    gamma: float = Field(default=1.0, gt=0, le=1)
    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    missing_end_score: float = -1.0
    """Score of a response that was cut off, whatever it says, or that could not be scored."""
    max_failed_share: float = Field(default=0.05, ge=0, le=1)
    """Highest share of a step's responses that may fail to be scored, for example because a reward function raises."""

    @model_validator(mode="after")
    def _fit_together(self) -> RlSettings:
        rollouts = self.rollouts_per_step()
        if rollouts % self.global_batch_size:
            raise ValueError(
                f"prompts_per_step * responses_per_prompt = {self.prompts_per_step} * {self.responses_per_prompt} = {rollouts} is not "
                f"a multiple of global_batch_size = {self.global_batch_size}, the rollouts per update"
            )
        if self.zero_stage == 3:
            raise ValueError("zero_stage = 3 shards the weights that sampling needs whole at every token; expected 0, 1 or 2 for RL")
        traits = self.traits()
        if not traits.clipped and (self.ppo_epochs > 1 or rollouts != self.global_batch_size):
            raise ValueError(
                f'algorithm = "{self.algorithm}" learns from each rollout once, in one update: expected ppo_epochs = 1 and '
                f"global_batch_size = prompts_per_step * responses_per_prompt = {rollouts}, found {self.ppo_epochs} and "
                f"{self.global_batch_size}"
            )
        if traits.value_model and self.value_warmup_steps >= self.steps:
            raise ValueError(
                f"value_warmup_steps = {self.value_warmup_steps} leaves the policy none of steps = {self.steps} to learn in; "
                "lower value_warmup_steps, or raise steps"
            )
        unused: tuple[str, ...] = () if traits.clipped else ("clip_eps",)
        if not traits.value_model:
            unused += ("value_clip_eps", "value_lr", "value_warmup_steps", "gae_lambda")
        check_effect(self, unused, f'with algorithm = "{self.algorithm}"')
        return self

    def traits(self) -> AlgorithmTraits:
        return ALGORITHMS[self.algorithm]

    def rollouts_per_step(self) -> int:
        return self.prompts_per_step * self.responses_per_prompt


def _nearest(size: int, unit: int) -> str:
    below = size // unit * unit
    return f"{below} and {below + unit}" if below else f"{unit}"
