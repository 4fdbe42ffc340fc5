"""Functions that the tests run in plain processes with a gloo group, without Ray: RL and reward model training."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

import gpt.reward
import gpt.rl.loop
from cluster.checkpoint import newest_checkpoint
from cluster.deepspeed_engine import DeepSpeedEngine
from cluster.rank import ProcessRank
from gpt.model import GPT, RewardModel, load_model, load_reward_model, save_model
from gpt.rl.scoring import Rollout, Scores
from gpt.settings import GPTConfig, RewardSettings, RlSettings
from gpt.tokenizer import byte_tokenizer

# A large eps, so that rounding of a gradient near 0 can't reverse a step.
BASE: dict[str, Any] = dict(lr=1e-2, lr_schedule="constant", eps=1e-3, weight_decay=0.0, log_every=1)
RL_STAGES = (0, 1, 2)
REWARD_STAGES = (0, 1, 2, 3)


class LengthScorer:
    """Scores 1/8 per token of a response, the end token included."""

    def open(self, device: torch.device) -> None: ...

    def scores(self, rollouts: Sequence[Rollout]) -> Scores:
        return Scores(torch.tensor([len(rollout.response_ids) / 8 for rollout in rollouts]))


class ConstantScorer(LengthScorer):
    """Scores every response -1, like one that was cut off."""

    def scores(self, rollouts: Sequence[Rollout]) -> Scores:
        return Scores(torch.full((len(rollouts),), -1.0))


def make_inputs(folder: Path) -> None:
    """Write a policy of random weights that ends a response after about seven tokens, prompts, and pairs."""
    tokenizer = byte_tokenizer()
    config = GPTConfig(n_layer=1, n_head=2, n_embd=32, seq_len=32, vocab_size=tokenizer.vocab_size)
    model = GPT(config, torch.Generator().manual_seed(1))
    with torch.no_grad():
        # Tied weights: the end token's logit is 32 * 0.12 = 3.84 above the 261 others', so its share is e^3.84 / (261 + e^3.84) = 0.15.
        model.final_norm.bias.fill_(1.0)
        model.token_embedding.weight[tokenizer.special["end"]] += 0.12
    save_model(folder / "policy", config, dict(model.named_parameters()))
    tokenizer.save(folder / "policy" / "tokenizer.json")
    prompts = [[{"role": "user", "content": text}] for text in ("x", "yy", "zzz", "xy")]
    pairs = [{"prompt": prompt, "chosen": "a" * n, "rejected": "b" * (5 - n)} for prompt in prompts for n in (1, 2, 3)]
    for name, records in (("prompts", [{"prompt": prompt} for prompt in prompts]), ("preferences", pairs)):
        (folder / name).mkdir()
        (folder / name / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        (folder / name / "held_out.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records[:3]))


def train_rl(
    folder: Path, name: str, rank: int, world_size: int, make_engine: Any, *, stop_at: int = 0, resume_from: str = "", **changes: Any
) -> dict[str, Any]:
    """Train for two steps, scored by length unless `changes` say otherwise; the `stop_at`-th check finds a stop request."""
    config = RlSettings(
        **{
            **BASE,
            **dict(steps=2, prompts_per_step=4, responses_per_prompt=2, global_batch_size=4, max_response_tokens=8, ppo_epochs=2),
            **changes,
        }
    )
    scorer = LengthScorer() if config.algorithm == "ppo" else ConstantScorer()
    checks = iter(range(1, 1000))
    (folder / name).mkdir(exist_ok=True)
    process_rank = ProcessRank(
        rank=rank,
        world_size=world_size,
        device=torch.device("cpu"),
        make_engine=make_engine,
        checkpoints=folder / name / "checkpoints",
        resume_from=newest_checkpoint([folder / resume_from / "checkpoints"])[0] if resume_from else None,
        on_event=lambda event: None,
        stop_requested=lambda: next(checks) == stop_at,
        identity={},
    )
    process_rank._checkpoints.mkdir(exist_ok=True)
    trained = gpt.rl.loop.train(process_rank, config, folder / "policy", [folder / "prompts"], [scorer], 1, folder / name / "model")
    models = {engine: process_rank._engines[engine].full_weights() for engine in process_rank._engines}
    return {
        "metadata": None if trained is None else {**trained.metadata, "figures": trained.figures},
        "weights": {f"{engine} {weight}": tensor for engine, weights in models.items() for weight, tensor in weights.items()},
        "points": {
            (name, point.step): point.value
            for name, points in process_rank.history.items()
            if not name.startswith(("time/", "rollout/tokens"))
            for point in points
        },
    }


def train_reward_model(folder: Path, name: str, rank: int, world_size: int, make_engine: Any, **changes: Any) -> dict[str, Any]:
    """Train for four steps on pairs."""
    config = RewardSettings(**{**BASE, **dict(steps=4, global_batch_size=4, eval_every=2), **changes})
    (folder / name).mkdir(exist_ok=True)
    process_rank = ProcessRank(
        rank=rank,
        world_size=world_size,
        device=torch.device("cpu"),
        make_engine=make_engine,
        checkpoints=folder / name,
        on_event=lambda event: None,
        stop_requested=lambda: False,
        identity={},
    )
    trained = gpt.reward.train(process_rank, config, folder / "policy", [folder / "preferences"], [], 1, folder / name / "model")
    return {"metadata": {**trained.metadata, "figures": trained.figures}, "weights": process_rank._engines["reward"].full_weights()}


def main(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    common: tuple[Any, ...] = (rank, world_size, DeepSpeedEngine)
    results: dict[str, Any] = {}
    for stage in RL_STAGES:
        results[f"rl {stage}"] = train_rl(Path(folder), f"rl-{stage}", *common, zero_stage=stage)
        # The loop checks twice per step: after the rollout and after the updates.
        train_rl(Path(folder), f"stopped-{stage}", *common, zero_stage=stage, stop_at=2)
        results[f"resumed {stage}"] = train_rl(Path(folder), f"resumed-{stage}", *common, zero_stage=stage, resume_from=f"stopped-{stage}")
        alike = dict(algorithm="reinforce", steps=1, global_batch_size=8, ppo_epochs=1, precision="bf16")
        results[f"alike {stage}"] = train_rl(Path(folder), f"alike-{stage}", *common, zero_stage=stage, **alike)
    for stage in REWARD_STAGES:
        results[f"reward {stage}"] = train_reward_model(Path(folder), f"reward-{stage}", *common, zero_stage=stage)
    if rank == 0:
        torch.save(results, Path(folder, "results.pt"))
    dist.destroy_process_group()


def first_policy(folder: Path) -> dict[str, Tensor]:
    return {f"policy {name}": parameter.detach() for name, parameter in load_model(folder / "policy").named_parameters()}


def written(folder: Path, name: str) -> dict[str, Tensor]:
    """The weights of the reward model that a training run wrote."""
    model: RewardModel = load_reward_model(folder / name / "model")
    return {weight: parameter.detach() for weight, parameter in model.named_parameters()}
