"""Reinforcement learning: the policy writes responses, they are scored, and responses that did better than expected become likelier.

    prompts --> sampler --> token ids and logprobs: every rank holds all rollouts of the step       rollouts.py
                   ^                                |
                   |        +-------------+---------+----+--------------+
                   |        v             v              v              v
                   |     scorers      reference        policy         value                         scoring.py, scorers.py
                   |        |             |              |              |
                   |   scores (B,)   ref_logprobs   old_logprobs   old_values (B, T)                experience.py
                   |        |             |              |              |
                   |        |             +------ k1 ----+              |
                   |        |                      |                    |
                   |        +--> rewards (B, T) <--+                    |                           advantages.py
                   |                    |                               |
                   |                    +-----------> credit <----------+                           credit.py
                   |                                    |
                   |                       advantages, returns (B, T)
                   |                                    v
                   +---- weights ---- updates of policy and value model                             updates.py

There are up to four models. The policy and the value model learn; the reference policy and the reward model are frozen. The sampler is a
copy of the policy's weights in fp32. Which algorithm runs is a setting: `credit.py` has one function for each, and the loop doesn't know
which. A step has two phases, and every rank goes through both:

- The rollout samples and scores this rank's share of the responses. It waits for the last update of the previous step, whose weights the
  ranks gather together; it ends when the ranks have summed their shares, after which each rank holds all of them.
- The updates learn from the rollouts. Each update reads this rank's micro-batches and waits for the gradients of all ranks
  (`engine.step`). The first one waits for old_logprobs, values and ref_logprobs to be summed over ranks.

`train` runs on every rank of the gang. Only the engines' state is carried from step to step, so a run that is killed anywhere resumes to
the same bits. There is no dropout: it would enter the ratio of two passes over the same tokens.

Left out: replay of old rollouts, sampling during updates, an adaptive KL coefficient.
Ziegler et al. 2019 (arXiv:1909.08593); Ouyang et al. 2022 (arXiv:2203.02155); Schulman et al. 2017 (PPO, arXiv:1707.06347).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from gpt.batching import ShuffledRows
from gpt.chat import FORMAT
from gpt.engine import Rank
from gpt.folders import save_trained
from gpt.loop import Trained, check_grad_norm, log_is_due, new_engine, own_rows, save_checkpoint, save_or_stop
from gpt.model import GPT, RewardModel, count_parameters, load_config, load_model, set_weights, with_dropout
from gpt.reward_scorer import value_model
from gpt.rl.advantages import token_rewards
from gpt.rl.credit import CREDIT, Judged
from gpt.rl.experience import Experience, logprobs_of, read_all, update_rows
from gpt.rl.figures import FIGURES, describe, explained_variance
from gpt.rl.rollouts import nothing_to_learn, read_prompts, roll_out
from gpt.rl.scorers import RewardModelScorer
from gpt.rl.scoring import Scorer
from gpt.rl.updates import add_to, mean_over_updates, policy_step_loss, value_step_loss
from gpt.schedule import lr_at
from gpt.settings import RlSettings
from gpt.tokenizer import Tokenizer


def train(
    rank: Rank, config: RlSettings, policy: Path, prompts: Sequence[Path], scorers: Sequence[Scorer], seed: int, output: Path
) -> Trained | None:
    """Train the policy in a folder on its own responses and write it to `output`. Return None if stopped before the last step.

    A response's score is the sum over the scorers. The figures are those of the last step.
    """
    with rank.section("start", config.start_deadline_s):
        tokenizer = Tokenizer.load(policy / "tokenizer.json")
        first_policy = load_model(policy)
        reward_models = [scorer for scorer in scorers if isinstance(scorer, RewardModelScorer)]
        seq_len = min(model.seq_len for model in [first_policy.config, *(load_config(scorer.folder) for scorer in reward_models)])
    usable, n_too_long = read_prompts(rank, config, tokenizer, prompts, seq_len)
    with rank.section("start", config.start_deadline_s):
        shuffled = ShuffledRows(len(usable), batch_size=config.prompts_per_step, seed=seed, name="rl")
        row_slices = own_rows(rank, config)
        n_parameters = count_parameters(first_policy)
        engine = new_engine(rank, "policy", with_dropout(first_policy, 0.0), config)
        value_config = config if config.value_lr is None else config.model_copy(update={"lr": config.value_lr})
        value_engine = None
        if config.traits().value_model:
            first_values = _first_value_model(reward_models, first_policy)
            value_engine = new_engine(rank, "value", with_dropout(first_values, 0.0), value_config)
        start = rank.restore()
        sampler = with_dropout(first_policy, 0.0).eval().to(rank.device)
        # In the engine's precision: otherwise the rounding that separates it from the policy would count as divergence.
        reference = engine.frozen(first_policy) if config.kl_coef else None
        for scorer in scorers:
            scorer.open(rank.device)

    figures: dict[str, float] = {}
    warned = False
    for step in range(start, config.steps):
        with rank.section("rollout", config.step_deadline_s):
            started_at_s = time.monotonic()
            set_weights(sampler, engine.full_weights())
            prompts_of_step = [usable[index] for index in shuffled.of_step(step) for _ in range(config.responses_per_prompt)]
            rollouts = roll_out(rank, config, sampler, tokenizer, scorers, prompts_of_step, seed, step)
            rollout_s = time.monotonic() - started_at_s
        problem = nothing_to_learn(config, rollouts, step)
        if problem and not warned:
            rank.warn(problem)
            warned = True
        if rank.should_stop():
            # No update has seen these rollouts, so the engines still hold the state after the previous step.
            if step > start:
                save_checkpoint(rank, config, step)
            return None

        with rank.section("update", config.step_deadline_s):
            started_at_s = time.monotonic()
            updates = update_rows(config, seed, step)
            # Recomputed by the engine that learns, in the micro-batches that it learns from first: so the first ratio is exactly 1.
            passes = [[update[row] for row in rows] for update in updates[0] for rows in row_slices]
            engine.module.eval()
            old_logprobs = read_all(rank, rollouts.tokens, passes, lambda batch: logprobs_of(config, engine, batch))  # (B, T)
            ref_logprobs = None
            if reference is not None:
                ref_logprobs = read_all(rank, rollouts.tokens, passes, lambda batch: logprobs_of(config, reference, batch))  # (B, T)
            written = rollouts.tokens.loss_mask  # (B, T)
            rewards = token_rewards(rollouts.scores, old_logprobs, ref_logprobs, written, kl_coef=config.kl_coef)  # (B, T)
            old_values = torch.zeros_like(rewards)
            if value_engine is not None:
                value_engine.module.eval()
                old_values = read_all(rank, rollouts.tokens, passes, lambda batch: value_engine(batch.token_ids).float())  # (B, T)
            credit = CREDIT[config.algorithm](config, Judged(rollouts.scores, rewards, old_values, written))
            experience = Experience(rollouts.tokens, old_logprobs, credit.advantages, old_values, credit.returns)

            policy_learns = value_engine is None or step >= config.value_warmup_steps
            lr, value_lr = lr_at(step, config), lr_at(step, value_config)
            grad_norms: list[float] = []
            value_grad_norms: list[float] = []
            metrics: list[dict[str, Tensor]] = []  # per update, this rank's part
            engine.module.train()
            if value_engine is not None:
                value_engine.module.train()
            for update in chain.from_iterable(updates):
                global_count = int(written[update].sum())
                metrics.append({})
                for rows in row_slices:
                    part = experience.part([update[row] for row in rows], rank.device)
                    if policy_learns:
                        loss, measured = policy_step_loss(config, engine, part, is_first=len(metrics) == 1, global_count=global_count)
                        engine.backward(loss)
                        add_to(metrics[-1], measured)
                    if value_engine is not None:
                        loss, measured = value_step_loss(config, value_engine, part, global_count=global_count)
                        value_engine.backward(loss)
                        add_to(metrics[-1], measured)
                if policy_learns:
                    grad_norms.append(engine.step(lr))
                    check_grad_norm(grad_norms[-1], step + 1, config)
                if value_engine is not None:
                    value_grad_norms.append(value_engine.step(value_lr))
                    check_grad_norm(value_grad_norms[-1], step + 1, value_config)
            update_s = time.monotonic() - started_at_s

        finished = step + 1
        values = describe(rollouts, rewards, old_logprobs, ref_logprobs)
        figures = {name: values[name] for name in values if name in FIGURES}
        if log_is_due(config, finished):
            values |= {
                "time/rollout_s": rollout_s,
                "time/update_s": update_s,
                "time/step_s": rollout_s + update_s,
                "rollout/tokens_per_s": int(written.sum()) / rollout_s,
            }
            if policy_learns:
                values |= {"train/lr": lr, "train/grad_norm": sum(grad_norms) / len(grad_norms)}
            if value_engine is not None:
                values["train/value_grad_norm"] = sum(value_grad_norms) / len(value_grad_norms)
                values["train/explained_variance"] = explained_variance(old_values[written], experience.returns[written])
            rank.log(finished, sums=mean_over_updates(metrics), values=values)
        # Not saved after the last step: a run that resumed from there would have no rollouts, and so no figures to return.
        if save_or_stop(rank, config, finished, save_last=False):
            return None

    with rank.section("checkpoint", config.step_deadline_s):
        save_trained(rank, engine.full_weights(), load_config(policy), policy / "tokenizer.json", output)
    return Trained(
        {
            "role": "policy",
            "chat_format": FORMAT,
            "parameters": n_parameters,
            "steps": config.steps,
            "rollouts": config.steps * config.rollouts_per_step(),
            "prompts": {"train": len(usable), "too_long": n_too_long},
        },
        figures,
    )


def _first_value_model(reward_models: Sequence[RewardModelScorer], policy: GPT) -> RewardModel:
    """The first reward model, or without one the policy's trunk with a head of zeros, which expects nothing of any response."""
    for first in reward_models:
        return value_model(first.folder, first.mean, first.std)
    model = RewardModel.from_policy(policy, torch.Generator())
    nn.init.zeros_(model.output.weight)
    return model
