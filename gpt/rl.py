"""Reinforcement learning: the policy writes responses, they are scored, and what was worth more than expected becomes likelier.

    prompts --> sampler --> token ids and logprobs, shared: every rank holds all rollouts of the step
                   ^                                |
                   |        +-------------+---------+----+--------------+
                   |        v             v              v              v
                   |     scorers      reference        policy         value
                   |        |             |              |              |
                   |   scores (B,)   ref_logprobs   old_logprobs   old_values (B, T)
                   |        |             |              |              |
                   |        |             +------ k1 ----+              |
                   |        |                      |                    |
                   |        +--> rewards (B, T) <--+                    |
                   |                    |                               |
                   |                    +------------> gae <------------+
                   |                                    |
                   |                       advantages, returns (B, T)
                   |                                    v
                   +---- weights ---- updates of policy and value model

Four models: the policy and the value model learn, the reference policy and the reward model are frozen. The sampler is a copy of the
policy's weights in fp32. A step has two phases, and every rank goes through both:

- the rollout samples and scores this rank's share of the responses. It waits for the last update of the step before, whose weights the
  ranks gather together; it is unblocked when all ranks have added up their shares, after which each holds all of them.
- the updates learn from them. Each reads this rank's micro-batches and waits for the gradients of all ranks (`engine.step`); the first
  is unblocked by the sums of old_logprobs, values and ref_logprobs over ranks.

`train` is what every rank of the gang runs. Nothing is carried from step to step but the engines' state, so that a run killed anywhere
resumes to the same bits. There is no dropout: it would be in the ratio of two passes over the same tokens.

Left out: groups as baselines, replay of old rollouts, sampling while the policy learns, an adaptive price of divergence.
Ziegler et al. 2019 (arXiv:1909.08593); Ouyang et al. 2022 (arXiv:2203.02155); Schulman et al. 2017 (PPO, arXiv:1707.06347).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gpt.advantages import gae, kl_k1, kl_k3, token_rewards, whiten
from gpt.batching import Batch, ShuffledRows, micro_batch_rows, padded
from gpt.chat import FORMAT, encode_prompt
from gpt.engine import Engine, Rank
from gpt.folders import read_records, save_trained
from gpt.losses import chosen_logprobs, mean_entropy, ppo_policy_loss, probability_ratio, reinforce_loss, value_loss
from gpt.model import GPT, RewardModel, count_parameters, load_config, load_model, parameter_groups, set_weights, with_dropout
from gpt.random_streams import permutation, stream_seed
from gpt.reward import RewardScorer, value_model
from gpt.sampling import Response, sample
from gpt.schedule import check_grad_norm, lr_at
from gpt.settings import RlSettings
from gpt.tokenizer import Tokenizer

FIGURES = ("reward/score_mean", "rollout/kl_k1_nats_per_response", "rollout/truncated_share")
SAMPLED_AT_ONCE = 64
"""Responses of a rank that are sampled together. Their keys and values are 75 MB each for GPT-2's 1,024 tokens, in fp32."""


@dataclass(frozen=True)
class Rollout:
    """A finished response: `Rollout({"prompt": [...], "reference": "4"}, prompt_ids=[256, 50, ...], response_ids=[52, 259], text="4")`."""

    record: Mapping[str, Any]
    """Of the prompt, as the prompts artifact has it."""
    prompt_ids: list[int]
    response_ids: list[int]
    """With the end token."""
    text: str
    """Of the response, without the end token."""


@dataclass(frozen=True)
class Scores:
    """What a scorer found: `Scores(torch.tensor([0.5, math.nan]), failures={1: "ZeroDivisionError in score() at 'x / 0'"})`."""

    scores: Tensor
    """(B,), one for each rollout; NaN = it could not be judged."""
    failures: Mapping[int, str] = field(default_factory=dict)
    """Why not, by row; a scorer that knows no reason gives none."""


class Scorer(Protocol):
    """A judge of responses. It is made where the stage runs, sent to every rank, and opened there."""

    def open(self, device: torch.device) -> None: ...

    def scores(self, rollouts: Sequence[Rollout]) -> Scores:
        """Of at least one rollout. It sees finished responses alone: one that was cut off is scored `missing_end_score`."""
        ...


@dataclass
class RewardModelScorer:
    """A reward model as a Scorer; the value model begins as the first of them. `mean` and `std` are its manifest's."""

    folder: Path
    mean: float
    std: float

    def open(self, device: torch.device) -> None:
        self._opened = RewardScorer(self.folder, self.mean, self.std, device)

    def scores(self, rollouts: Sequence[Rollout]) -> Scores:
        return Scores(self._opened.scores([each.prompt_ids for each in rollouts], [each.response_ids for each in rollouts]))


@dataclass(frozen=True)
class Prompt:
    record: Mapping[str, Any]
    token_ids: list[int]


@dataclass(frozen=True)
class Rollouts:
    """All that a step sampled, the same on every rank, on the CPU, in the order of the step's prompts."""

    # what the policy read and wrote
    tokens: Batch
    """Whole rows; True in its loss_mask = the policy wrote the target."""
    sampler_logprobs: Tensor
    """(B, T), of the targets that the policy wrote, when they were sampled; 0 elsewhere."""
    # what it is worth
    scores: Tensor
    """(B,)"""
    stopped: Tensor
    """(B,) True = it ended by itself."""
    n_failed: int
    """Responses that a scorer could not judge."""


@dataclass(frozen=True)
class Experience:
    """What updates learn from, all (B, T)."""

    tokens: Batch
    old_logprobs: Tensor
    """Under the policy of the step's beginning."""
    advantages: Tensor
    old_values: Tensor
    returns: Tensor

    def part(self, rows: Sequence[int], device: torch.device) -> Experience:
        tokens = batch_of(self.tokens, rows, device)
        width = tokens.targets.shape[1]
        others = (self.old_logprobs, self.advantages, self.old_values, self.returns)
        return Experience(tokens, *(tensor[rows, :width].to(device) for tensor in others))


def batch_of(tokens: Batch, rows: Sequence[int], device: torch.device) -> Batch:
    """These rows, less the padding that none of them needs."""
    width = int(tokens.loss_mask[rows].any(dim=0).nonzero().max()) + 1
    return Batch(tokens.token_ids[rows, :width], tokens.targets[rows, :width], tokens.loss_mask[rows, :width]).to(device)


def train(
    rank: Rank, config: RlSettings, policy: Path, prompts: Sequence[Path], scorers: Sequence[Scorer], seed: int, output: Path
) -> dict[str, Any] | None:
    """Train the policy of a folder on its own responses and write it to `output`; its metadata, or None when stopped before the end.

    What the scorers say is added up. The figures are those of the last step.
    """
    with rank.section("start", config.start_deadline_s):
        tokenizer = Tokenizer.load(policy / "tokenizer.json")
        first_policy = load_model(policy)
        reward_models = [scorer for scorer in scorers if isinstance(scorer, RewardModelScorer)]
        seq_len = min(model.seq_len for model in [first_policy.config, *(load_config(scorer.folder) for scorer in reward_models)])
        usable, n_too_long = read_prompts(rank, config, tokenizer, prompts, seq_len)
        shuffled = ShuffledRows(len(usable), batch_size=config.prompts_per_step, seed=seed, name="rl")
        accumulation_steps = config.gradient_accumulation_steps(rank.world_size)
        row_slices = micro_batch_rows(rank.rank, rank.world_size, config.global_batch_size, accumulation_steps)
        n_parameters = count_parameters(first_policy)
        engine = _engine(rank, "policy", first_policy, config)
        value_config = config if config.value_lr is None else config.model_copy(update={"lr": config.value_lr})
        value_engine = None
        if config.algorithm == "ppo":
            value_engine = _engine(rank, "value", _first_value_model(reward_models, first_policy), value_config)
        start = rank.restore()
        sampler = with_dropout(first_policy, 0.0).eval().to(rank.device)
        # In the engine's precision: what rounding alone tells apart from the policy would pass for divergence.
        reference = engine.frozen(first_policy) if config.kl_coef else None
        for scorer in scorers:
            scorer.open(rank.device)

    figures: dict[str, float] = {}
    warned = False
    for step in range(start, config.steps):
        with rank.section("rollout", config.step_deadline_s):
            started_at_s = time.monotonic()
            set_weights(sampler, engine.full_weights())
            of_step = [usable[index] for index in shuffled.of_step(step) for _ in range(config.responses_per_prompt)]
            rollouts = roll_out(rank, config, sampler, tokenizer, scorers, of_step, seed, step)
            rollout_s = time.monotonic() - started_at_s
        fault = nothing_to_learn(config, rollouts, step)
        if fault and not warned:
            rank.warn(fault)
            warned = True
        if rank.should_stop():
            # No update has seen these rollouts, so the engines are still what the step before left.
            if step > start:
                with rank.section("checkpoint", config.step_deadline_s):
                    rank.save(step)
            return None

        with rank.section("update", config.step_deadline_s):
            started_at_s = time.monotonic()
            updates = update_rows(config, seed, step)
            # Recomputed by what will learn, in the micro-batches that it will learn from first: so the first ratio is exactly 1.
            passes = [[update[row] for row in rows] for update in updates[0] for rows in row_slices]
            engine.module.eval()
            old_logprobs = read_all(rank, rollouts.tokens, passes, lambda batch: logprobs_of(config, engine, batch))  # (B, T)
            ref_logprobs = None
            if reference is not None:
                ref_logprobs = read_all(rank, rollouts.tokens, passes, lambda batch: logprobs_of(config, reference, batch))  # (B, T)
            written = rollouts.tokens.loss_mask  # (B, T)
            rewards = token_rewards(rollouts.scores, old_logprobs, ref_logprobs, written, kl_coef=config.kl_coef)  # (B, T)
            if value_engine is not None:
                value_engine.module.eval()
                old_values = read_all(rank, rollouts.tokens, passes, lambda batch: value_engine(batch.token_ids).float())  # (B, T)
                advantages = gae(rewards, old_values, written, gamma=config.gamma, gae_lambda=config.gae_lambda)
            else:
                old_values = torch.zeros_like(rewards)
                advantages = gae(rewards, old_values, written, gamma=config.gamma, gae_lambda=1.0)  # the whole return, as it came
            # Whitened over the responses of all ranks. What the value model is to learn keeps its unit.
            experience = Experience(rollouts.tokens, old_logprobs, whiten(advantages, written), old_values, advantages + old_values)

            policy_learns = value_engine is None or step >= config.value_warmup_steps
            lr, value_lr = lr_at(step, config), lr_at(step, value_config)
            grad_norms: list[float] = []
            value_grad_norms: list[float] = []
            metrics: list[dict[str, Tensor]] = []  # of each update, this rank's part
            engine.module.train()
            if value_engine is not None:
                value_engine.module.train()
            for update in chain.from_iterable(updates):
                global_count = int(written[update].sum())
                metrics.append({})
                for rows in row_slices:
                    part = experience.part([update[row] for row in rows], rank.device)
                    keep = part.tokens.loss_mask  # (B, T)
                    if policy_learns:
                        logits = engine(part.tokens.token_ids)  # (B, T, V)
                        logprobs = chosen_logprobs(logits, part.tokens.targets, config.temperature)  # (B, T)
                        if config.algorithm == "ppo":
                            loss = ppo_policy_loss(
                                logprobs, part.old_logprobs, part.advantages, clip_eps=config.clip_eps, keep=keep, global_count=global_count
                            )
                        else:
                            loss = reinforce_loss(logprobs, part.advantages, keep=keep, global_count=global_count)
                        doubted = logits if config.entropy_coef else logits.detach()
                        entropy = mean_entropy(doubted, config.temperature, keep=keep, global_count=global_count)
                        loss = loss - config.entropy_coef * entropy
                        engine.backward(loss)
                        _add(metrics[-1], {"train/loss": loss.detach(), "train/entropy": entropy.detach()})
                        is_first = len(metrics) == 1
                        moved = ratio_metrics(logprobs, part.old_logprobs, is_first, config.clip_eps, keep=keep, global_count=global_count)
                        _add(metrics[-1], moved)
                    if value_engine is not None:
                        values = value_engine(part.tokens.token_ids).float()  # (B, T)
                        loss = value_loss(
                            values,
                            part.old_values,
                            part.returns,
                            value_clip_eps=config.value_clip_eps,
                            keep=keep,
                            global_count=global_count,
                        )
                        value_engine.backward(loss)
                        _add(metrics[-1], {"train/value_loss": loss.detach()})
                if policy_learns:
                    grad_norms.append(engine.step(lr))
                    check_grad_norm(grad_norms[-1], step + 1, config)
                if value_engine is not None:
                    value_grad_norms.append(value_engine.step(value_lr))
                    check_grad_norm(value_grad_norms[-1], step + 1, value_config)
            update_s = time.monotonic() - started_at_s

        finished = step + 1
        described = describe(rollouts, rewards, old_logprobs, ref_logprobs)
        figures = {name: described[name] for name in described if name in FIGURES}
        if finished % config.log_every == 0 or finished == config.steps:
            sums = {name: torch.stack([of_update[name] for of_update in metrics if name in of_update]).mean() for name in metrics[0]}
            described |= {
                "time/rollout_s": rollout_s,
                "time/update_s": update_s,
                "time/step_s": rollout_s + update_s,
                "rollout/tokens_per_s": int(written.sum()) / rollout_s,
            }
            if policy_learns:
                described |= {"train/lr": lr, "train/grad_norm": sum(grad_norms) / len(grad_norms)}
            if value_engine is not None:
                described["train/value_grad_norm"] = sum(value_grad_norms) / len(value_grad_norms)
                described["train/explained_variance"] = explained_variance(old_values[written], experience.returns[written])
            rank.log(finished, sums=sums, values=described)
        stopping = finished < config.steps and rank.should_stop()
        # Not after the last step: a run that went on from there would know nothing of its rollouts, and its figures are theirs.
        if stopping or (finished < config.steps and finished % config.checkpoint_every == 0):
            with rank.section("checkpoint", config.step_deadline_s):
                rank.save(finished)
        if stopping:
            return None

    with rank.section("checkpoint", config.step_deadline_s):
        save_trained(rank, engine.full_weights(), load_config(policy), policy / "tokenizer.json", output)
    return {
        "role": "policy",
        "chat_format": FORMAT,
        "parameters": n_parameters,
        "steps": config.steps,
        "rollouts": config.steps * config.rollouts_per_step(),
        "prompts": {"train": len(usable), "too_long": n_too_long},
        "figures": figures,
    }


def read_prompts(rank: Rank, config: RlSettings, tokenizer: Tokenizer, folders: Sequence[Path], seq_len: int) -> tuple[list[Prompt], int]:
    """The training prompts that leave room for a response, and how many leave none; ValueError where none does."""
    usable, n_too_long = [], 0
    for record in read_records(folders, "train"):
        token_ids = encode_prompt(tokenizer, record["prompt"])
        if len(token_ids) <= seq_len - config.max_response_tokens:
            usable.append(Prompt(record, token_ids))
        else:
            n_too_long += 1
    room = f"room for max_response_tokens = {config.max_response_tokens} within the models' seq_len = {seq_len}"
    if not usable:
        raise ValueError(
            f"no prompt to respond to in {' and '.join(map(str, folders))}: of {n_too_long} none leaves {room}; give shorter prompts, "
            "fewer max_response_tokens, or models with a longer seq_len"
        )
    if n_too_long:
        rank.warn(f"{n_too_long} of {n_too_long + len(usable)} prompts are left out: they leave no {room}")
    return usable, n_too_long


def roll_out(
    rank: Rank,
    config: RlSettings,
    sampler: GPT,
    tokenizer: Tokenizer,
    scorers: Sequence[Scorer],
    prompts: Sequence[Prompt],
    seed: int,
    step: int,
) -> Rollouts:
    """One response to each prompt, scored. Each rank does its share, and adds it to what the others have."""
    end_id = tokenizer.special["end"]
    mine = range(rank.rank, len(prompts), rank.world_size)
    # By the prompt's place in the step, not in the file: of few prompts, a step has some twice.
    streams = [stream_seed(seed, "sample", step, *divmod(row, config.responses_per_prompt)) for row in mine]
    responses: list[Response] = []
    for first in range(0, len(mine), SAMPLED_AT_ONCE):
        rows_at_once = slice(first, first + SAMPLED_AT_ONCE)
        responses += sample(
            sampler,
            [prompts[row].token_ids for row in mine[rows_at_once]],
            streams=streams[rows_at_once],
            max_tokens=config.max_response_tokens,
            temperature=config.temperature,
            stop_ids=[end_id],
        )
    # Each row is written by one rank and 0 on the others, so that the sums over ranks are exact.
    shape = (len(prompts), config.max_response_tokens)
    token_ids = torch.zeros(shape, dtype=torch.int64)
    logprobs = torch.zeros(shape, dtype=torch.float32)
    lengths = torch.zeros(len(prompts), dtype=torch.int64)
    stopped = torch.zeros(len(prompts), dtype=torch.int64)
    scores = torch.zeros(len(prompts), dtype=torch.float32)
    finished: dict[int, Rollout] = {}
    for row, response in zip(mine, responses, strict=True):
        lengths[row] = len(response.token_ids)
        token_ids[row, : lengths[row]] = torch.tensor(response.token_ids)
        logprobs[row, : lengths[row]] = torch.tensor(response.logprobs)
        stopped[row] = response.stopped
        scores[row] = config.missing_end_score
        if response.stopped:
            text = tokenizer.decode(response.token_ids[:-1])
            finished[row] = Rollout(prompts[row].record, prompts[row].token_ids, response.token_ids, text)
    failures: list[str] = []
    if finished:
        scores[list(finished)], failures = score(config, scorers, list(finished.values()))
    token_ids, logprobs, lengths, stopped, scores = (rank.all_sum(each) for each in (token_ids, logprobs, lengths, stopped, scores))
    n_failed = _check_failures(rank, config, failures, step)

    rows = [[*prompt.token_ids, *token_ids[row, : lengths[row]].tolist()] for row, prompt in enumerate(prompts)]
    padded_rows = padded(rows, tokenizer.special["pad"])  # (B, T + 1)
    places = torch.arange(padded_rows.shape[1])  # (T + 1,)
    starts = torch.tensor([len(prompt.token_ids) for prompt in prompts])[:, None]  # (B, 1)
    written = (places >= starts) & (places < starts + lengths[:, None])  # (B, T + 1)
    tokens = Batch(padded_rows[:, :-1], padded_rows[:, 1:], written[:, 1:])
    sampler_logprobs = torch.zeros(tokens.targets.shape)  # (B, T)
    sampler_logprobs[tokens.loss_mask] = logprobs[torch.arange(config.max_response_tokens) < lengths[:, None]]
    return Rollouts(tokens, sampler_logprobs, scores, stopped.bool(), n_failed)


def score(config: RlSettings, scorers: Sequence[Scorer], rollouts: Sequence[Rollout]) -> tuple[Tensor, list[str]]:
    """The sums of all scorers' scores (B,), and why some have none: what any scorer could not judge is worth a response without an end."""
    total = torch.zeros(len(rollouts))
    failures: dict[int, str] = {}
    for scorer in scorers:
        found = scorer.scores(rollouts)
        scores = found.scores.detach().to("cpu", torch.float32)  # (B,)
        assert len(scores) == len(rollouts), f"{scorer} gave {len(scores)} scores for {len(rollouts)} rollouts"
        total += scores
        for row in (~total.isfinite()).nonzero().flatten().tolist():
            scored = f"{type(scorer).__name__} scored {rollouts[row].text!r} {scores[row].item()}"
            failures.setdefault(row, found.failures.get(row, scored))
    return torch.where(total.isfinite(), total, config.missing_end_score), list(failures.values())


def update_rows(config: RlSettings, seed: int, step: int) -> list[list[list[int]]]:
    """Which rollouts each update learns from, by epoch; every epoch has all of them, in an order of its own."""
    n, size = config.rollouts_per_step(), config.global_batch_size
    orders = [permutation(stream_seed(seed, "update", step, epoch), n).tolist() for epoch in range(config.ppo_epochs)]
    return [[order[first : first + size] for first in range(0, n, size)] for order in orders]


@torch.no_grad()
def read_all(rank: Rank, tokens: Batch, passes: Sequence[Sequence[int]], read: Callable[[Batch], Tensor]) -> Tensor:
    """What `read` says of every row (B, T), each rank reading its passes; on every rank."""
    found = torch.zeros(tokens.targets.shape)
    for rows in passes:
        batch = batch_of(tokens, rows, rank.device)
        found[list(rows), : batch.targets.shape[1]] = read(batch).cpu()
    return rank.all_sum(found)


def logprobs_of(config: RlSettings, model: Callable[[Tensor], Tensor], batch: Batch) -> Tensor:
    """Of the targets (B, T), at the temperature that they were sampled at."""
    return chosen_logprobs(model(batch.token_ids), batch.targets, config.temperature)


@torch.no_grad()
def ratio_metrics(
    logprobs: Tensor, old_logprobs: Tensor, is_first: bool, clip_eps: float, *, keep: Tensor, global_count: int
) -> dict[str, Tensor]:
    """How far the policy has moved since the step began, as means over tokens: this micro-batch's part of them.

    The first update's own is told: there it should be nothing, while the later ones are meant to move.
    """
    distance = (probability_ratio(logprobs, old_logprobs, keep) - 1).abs()  # (B, T)
    moved = torch.where(keep, kl_k3(old_logprobs, logprobs), 0.0)  # (B, T) the old policy drew the tokens
    metrics = {"train/clip_fraction": (distance > clip_eps).sum() / global_count, "train/approx_kl": moved.sum() / global_count}
    return metrics | {"train/ratio_first": distance.sum() / global_count} if is_first else metrics


def nothing_to_learn(config: RlSettings, rollouts: Rollouts, step: int) -> str | None:
    """Why no response of a step is worth more than another, as a sentence."""
    n_responses = len(rollouts.scores)
    if not rollouts.stopped.any():
        return (
            f"all {n_responses} responses of step {step + 1} were cut off at max_response_tokens = {config.max_response_tokens}, "
            "so no scorer saw one: allow more tokens, or take a policy that has learned to end what it says"
        )
    if (rollouts.scores == rollouts.scores[0]).all():
        return (
            f"all {n_responses} responses of step {step + 1} got the same score, {rollouts.scores[0].item():g}: nothing can be learned "
            "from it; where that goes on, what scores them does not tell them apart, or the prompts are too easy or too hard"
        )
    return None


def describe(rollouts: Rollouts, rewards: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor | None) -> dict[str, float]:
    """The step's rollouts in numbers; `rewards` and the logprobs are (B, T)."""
    written = rollouts.tokens.loss_mask
    n_responses, n_tokens = len(written), int(written.sum())
    described = {
        "reward/score_mean": rollouts.scores.mean().item(),
        "reward/score_std": rollouts.scores.std(correction=0).item(),
        "reward/total_mean": rewards.sum().item() / n_responses,
        "rollout/response_tokens": n_tokens / n_responses,
        "rollout/truncated_share": 1 - rollouts.stopped.float().mean().item(),
        "rollout/failed_share": rollouts.n_failed / n_responses,
        "rollout/logprob_mismatch": (old_logprobs - rollouts.sampler_logprobs)[written].abs().mean().item(),
    }
    if ref_logprobs is not None:
        old, ref = old_logprobs[written], ref_logprobs[written]
        described["rollout/kl_k1_nats_per_response"] = kl_k1(old, ref).sum().item() / n_responses
        described["rollout/kl_k3_nats_per_token"] = kl_k3(old, ref).mean().item()
    return described


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns), both (N,): 1 = foreseen, 0 = as good as a constant; 0 too where returns do not vary."""
    variance = returns.var(correction=0)
    return float(1 - (returns - values).var(correction=0) / variance) if variance > 0 else 0.0


def _check_failures(rank: Rank, config: RlSettings, failures: Sequence[str], step: int) -> int:
    """How many there are on all ranks; ValueError on every rank where they are more than the settings allow."""
    n_failed = int(rank.all_sum(torch.tensor(len(failures))).item())
    n_responses = config.rollouts_per_step()
    if n_failed / n_responses > config.max_failed_share:
        # The words of every rank's first failure, so that all ranks end with the same message.
        words = torch.zeros(rank.world_size, 400, dtype=torch.int64)
        for place, byte in enumerate("".join(failures[:1]).encode()[: words.shape[1]]):
            words[rank.rank, place] = byte
        texts = [bytes(row[row > 0].tolist()).decode(errors="replace") for row in rank.all_sum(words)]
        raise ValueError(
            f"step {step + 1}: {n_failed} of {n_responses} responses could not be scored, which is more than max_failed_share = "
            f"{config.max_failed_share:g}. The first: {next(filter(None, texts))}. Mend what scores them, or allow more"
        )
    return n_failed


def _engine(rank: Rank, name: str, model: GPT, config: RlSettings) -> Engine:
    learner = with_dropout(model, 0.0)
    learner.activation_checkpointing = config.activation_checkpointing
    return rank.engine(name, learner, parameter_groups(learner, config.weight_decay), config)


def _first_value_model(reward_models: Sequence[RewardModelScorer], policy: GPT) -> RewardModel:
    for first in reward_models:
        return value_model(first.folder, first.mean, first.std)
    model = RewardModel.from_policy(policy, torch.Generator())
    nn.init.zeros_(model.output.weight)  # nothing is expected yet, of any response
    return model


def _add(totals: dict[str, Tensor], more: Mapping[str, Tensor]) -> None:
    for name, value in more.items():
        totals[name] = totals[name] + value if name in totals else value
