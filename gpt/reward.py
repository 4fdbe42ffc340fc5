"""The reward model: a policy's trunk that learns to score responses, from pairs, from ratings, or from both.

    <|user|>Who are you?<|end|><|assistant|>A small model.<|end|>
                                                           ^^^^^^^ the score of the response is read here, and nowhere else

`train` runs on every rank of the gang. A batch is made of whole items, each a pair or a rating; a pair's two responses go through the
model in one pass. Scores have no origin and no unit, since pairs only determine differences. Training therefore ends by measuring the
mean and deviation of its own items' scores; `gpt/reward_scorer.py` normalises by them.

Left out: rankings of more than two responses, and scores of unfinished ones. Christiano et al. 2017 (arXiv:1706.03741);
Ziegler et al. 2019 (arXiv:1909.08593); Ouyang et al. 2022 (arXiv:2203.02155), section 3.5.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt.batching import ShuffledRows, evenly
from gpt.chat import encode_prompt, encode_response
from gpt.engine import Engine, Rank
from gpt.folders import records_in_sections, save_trained
from gpt.loop import Trained, check_grad_norm, log_is_due, new_engine, own_rows, save_or_stop
from gpt.losses import reward_centering_loss, reward_pair_loss, reward_rating_loss
from gpt.model import RewardModel, count_parameters, load_config, load_model, set_weights, with_dropout
from gpt.pace import Pace
from gpt.random_streams import stream_seed
from gpt.reward_scorer import ROWS_PER_PASS, end_scores
from gpt.schedule import lr_at
from gpt.settings import RewardSettings
from gpt.tokenizer import Tokenizer

NORMALISED_ITEMS = 4096
"""Most training items whose scores determine the mean and the deviation."""


@dataclass(frozen=True)
class Pair:
    """Two responses to one prompt, each as the whole conversation up to its end token."""

    chosen: list[int]
    rejected: list[int]
    kind: str | None = None
    """The record's `kind`, spelled as part of a metric name."""


@dataclass(frozen=True)
class Rating:
    """A response that was rated from 0.0 to 1.0, as the whole conversation up to its end token."""

    token_ids: list[int]
    rating: float


Item = Pair | Rating


def train(
    rank: Rank,
    config: RewardSettings,
    policy: Path,
    preferences: Sequence[Path],
    ratings: Sequence[Path],
    seed: int,
    output: Path,
) -> Trained | None:
    """Train on the pairs and ratings, and write the model to `output`. Return None if stopped before the last step.

    `policy` is the folder of the model that training starts from.
    """
    with rank.section("start", config.start_deadline_s):
        tokenizer = Tokenizer.load(policy / "tokenizer.json")
        model = _first_model(config, policy, seed)

    def read(split: str) -> tuple[list[Item], dict[str, int]]:
        pairs, rated = (
            records_in_sections(rank, folders, split, unit, config.start_deadline_s)
            for folders, unit in ((preferences, "pairs"), (ratings, "ratings"))
        )
        return read_items(tokenizer, pairs, rated, model.config.seq_len)

    items, counts = read("train")
    held_out_items, held_out_counts = read("held_out")
    left_out = (
        f"{counts['too_long']} are longer than the policy's seq_len = {model.config.seq_len} tokens, "
        f"and {counts['alike']} are pairs of equal responses"
    )
    if not items:
        raise ValueError(f"no training record can be used: {left_out}; use shorter ones, or a policy with a longer seq_len")
    if counts["too_long"] or counts["alike"]:
        n_records = len(items) + counts["too_long"] + counts["alike"]
        rank.warn(f"{n_records - len(items)} of {n_records} training records are left out: {left_out}")
    with rank.section("start", config.start_deadline_s):
        order = ShuffledRows(len(items), batch_size=config.global_batch_size, seed=seed, name="reward")
        row_slices = own_rows(rank, config)
        n_parameters = count_parameters(model)
        engine = new_engine(rank, "reward", model, config)
        start = rank.restore()

    pace = Pace()
    for step in range(start, config.steps):
        # Before this step rather than after the previous one, so that a run that resumes from a checkpoint here evaluates it too.
        if step and step % config.eval_every == 0:
            evaluate(rank, config, engine, held_out_items, step)

        with rank.section("step", config.step_deadline_s):
            started_at_s = time.monotonic()
            engine.module.train()
            loss_sum = torch.zeros((), device=rank.device)
            centering_sum = torch.zeros_like(loss_sum)
            batch = [items[index] for index in order.of_step(step)]
            for micro_step, rows in enumerate(row_slices):
                micro_batch = [batch[row] for row in rows]
                # Seeded per step, dropout needs no generator restored (see gpt/pretrain.py).
                torch.manual_seed(stream_seed(seed, "reward dropout", step, rank.rank, micro_step))
                scores = end_scores(engine, conversations(micro_batch), rank.device)
                loss, centering = items_loss(micro_batch, scores, global_count=config.global_batch_size)
                engine.backward(loss + config.centering_coef * centering)
                loss_sum += loss.detach()
                centering_sum += centering.detach()
            lr = lr_at(step, config)
            grad_norm = engine.step(lr)
            check_grad_norm(grad_norm, step + 1, config)
            n_tokens = sum(len(token_ids) for token_ids in conversations(batch))  # without padding
            pace.add(tokens=n_tokens, seconds=time.monotonic() - started_at_s)

        finished = step + 1
        if log_is_due(config, finished):
            values = {"train/lr": lr, "train/grad_norm": grad_norm, **pace.metrics()}
            rank.log(finished, sums={"train/loss": loss_sum, "train/centering": centering_sum}, values=values)
        if save_or_stop(rank, config, finished):
            return None

    evaluate(rank, config, engine, held_out_items, config.steps)
    with rank.section("evaluate", config.step_deadline_s):
        # With the policy's own dropout: a dropout set for this stage should not reach later ones.
        trained = RewardModel(load_config(policy)).eval()
        weights = engine.full_weights()
        set_weights(trained, weights)
        trained.to(rank.device)
    # In fp32, as `RewardScorer` computes them: in the engine's precision the mean and the deviation might differ.
    held_out_scores = all_scores(rank, config, trained, conversations(held_out_items))
    mean, std = score_scale(all_scores(rank, config, trained, conversations(evenly(items, NORMALISED_ITEMS))))
    with rank.section("checkpoint", config.step_deadline_s):
        save_trained(rank, weights, trained.config, policy / "tokenizer.json", output, RewardModel)
    return Trained(
        {
            "role": "reward",
            "parameters": n_parameters,
            "steps": config.steps,
            "train": counts,
            "held_out": held_out_counts,
            "score_mean": mean,
            "score_std": std,
        },
        held_out_figures(held_out_items, held_out_scores),
    )


def read_items(
    tokenizer: Tokenizer, preferences: Iterable[Mapping[str, Any]], ratings: Iterable[Mapping[str, Any]], seq_len: int
) -> tuple[list[Item], dict[str, int]]:
    """Encode records of pairs, then records of ratings. Also count each, and the records left out by reason."""
    pairs: list[Pair] = []
    rated: list[Rating] = []
    too_long = alike = 0
    for record in preferences:
        prompt = encode_prompt(tokenizer, record["prompt"])
        chosen, rejected = ([*prompt, *encode_response(tokenizer, record[name])] for name in ("chosen", "rejected"))
        if max(len(chosen), len(rejected)) > seq_len:
            too_long += 1
        elif chosen == rejected:
            alike += 1
        else:
            pairs.append(Pair(chosen, rejected, _metric_part(record.get("kind"))))
    for record in ratings:
        token_ids = [*encode_prompt(tokenizer, record["prompt"]), *encode_response(tokenizer, record["response"])]
        if len(token_ids) > seq_len:
            too_long += 1
        else:
            rated.append(Rating(token_ids, record["score"]))
    return [*pairs, *rated], {"pairs": len(pairs), "ratings": len(rated), "too_long": too_long, "alike": alike}


def conversations(items: Sequence[Item]) -> list[list[int]]:
    """The rows to score for these items: all chosen responses, then all rejected ones, then all rated ones."""
    pairs = [item for item in items if isinstance(item, Pair)]
    rated = [item.token_ids for item in items if isinstance(item, Rating)]
    return [*(pair.chosen for pair in pairs), *(pair.rejected for pair in pairs), *rated]


def items_loss(items: Sequence[Item], scores: Tensor, *, global_count: int) -> tuple[Tensor, Tensor]:
    """The loss () and the centering term () of items whose `conversations` have these scores (B,), as parts of `global_count` items."""
    chosen, rejected, rated = _split(items, scores)
    ratings = scores.new_tensor([item.rating for item in items if isinstance(item, Rating)])
    pair_loss = reward_pair_loss(chosen, rejected, global_count=global_count)
    loss = pair_loss + reward_rating_loss(rated, ratings, global_count=global_count)
    return loss, reward_centering_loss(chosen, rejected, global_count=global_count)


@torch.no_grad()
def all_scores(rank: Rank, config: RewardSettings, model: Callable[[Tensor], Tensor], rows: Sequence[Sequence[int]]) -> Tensor:
    """Raw scores (N,) of all rows, in fp64 on the CPU of every rank. The ranks share the work; their number changes no bit."""
    scores = torch.zeros(len(rows), dtype=torch.float64)
    passes = [slice(first, first + ROWS_PER_PASS) for first in range(0, len(rows), ROWS_PER_PASS)]
    for first in range(0, len(passes), rank.world_size):
        with rank.section("evaluate", config.step_deadline_s):
            own = first + rank.rank
            # A rank without a pass of its own repeats the last one: a sharded forward pass is collective.
            rows_of_pass = passes[min(own, len(passes) - 1)]
            scores_of_pass = end_scores(model, rows[rows_of_pass], rank.device)
            if own < len(passes):
                scores[rows_of_pass] = scores_of_pass.double().cpu()
            rank.progress(min(len(rows), (first + rank.world_size) * ROWS_PER_PASS), len(rows), "responses scored")
    return rank.all_sum(scores)  # one rank has scored each row, which is 0 on the others


def evaluate(rank: Rank, config: RewardSettings, engine: Engine, items: Sequence[Item], step: int) -> None:
    """Log val/loss in nats per item, over the same evenly spaced held-out items each time. The ranks share them."""
    if items:
        engine.module.eval()
        chosen_items = evenly(items, config.eval_items)
        scores = all_scores(rank, config, engine, conversations(chosen_items))
        loss, _ = items_loss(chosen_items, scores, global_count=len(chosen_items))
        rank.log(step, values={"val/loss": loss.item()})


def held_out_figures(items: Sequence[Item], scores: Tensor) -> dict[str, float]:
    """How well the scores (B,) of these items' `conversations` separate good from bad. Figures without items to count are absent."""
    figures: dict[str, float] = {}
    chosen, rejected, rated = _split(items, scores)
    wins = (chosen > rejected).double() + (chosen == rejected).double() / 2  # (pairs,)
    if len(wins):
        figures["eval/pair_accuracy"] = wins.mean().item()
    kinds = [item.kind for item in items if isinstance(item, Pair)]
    for kind in sorted({kind for kind in kinds if kind is not None}):
        figures[f"eval/pair_accuracy_{kind}"] = wins[torch.tensor([each == kind for each in kinds])].mean().item()
    is_good = torch.tensor([item.rating >= 0.5 for item in items if isinstance(item, Rating)], dtype=torch.bool)
    good, bad = rated[is_good], rated[~is_good].sort().values
    if len(good) and len(bad):
        below = torch.searchsorted(bad, good) + torch.searchsorted(bad, good, right=True)  # twice the bad ones below; a tie counts once
        figures["eval/rating_auc"] = below.double().mean().item() / (2 * len(bad))
    return figures


def score_scale(scores: Tensor) -> tuple[float, float]:
    """Mean and biased standard deviation of scores (N,); ValueError if they are NaN, or equal up to rounding in fp32."""
    mean, std = scores.mean().item(), scores.std(correction=0).item()
    if not std > 1e-6 * max(1.0, abs(mean)):
        problem = "not finite" if math.isnan(std) else "equal"
        raise ValueError(
            f"the scores are {problem}: over {len(scores)} training responses they have mean {mean:.6g} and deviation {std:.3g}, so this "
            "reward model cannot rank responses. Check train/loss and the data; try a lower lr, or responses that differ more"
        )
    return mean, std


def _first_model(config: RewardSettings, policy: Path, seed: int) -> RewardModel:
    trunk = load_model(policy)
    if config.dropout is not None:
        trunk = with_dropout(trunk, config.dropout)
    return RewardModel.from_policy(trunk, torch.Generator().manual_seed(stream_seed(seed, "reward head")))


def _split(items: Sequence[Item], scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split the scores (B,) of `conversations(items)` into those of the chosen, the rejected and the rated responses."""
    n_pairs = sum(isinstance(item, Pair) for item in items)
    chosen, rejected, rated = scores.split([n_pairs, n_pairs, len(items) - n_pairs])
    return chosen, rejected, rated


def _metric_part(kind: Any) -> str | None:
    return None if kind is None else re.sub(r"[^a-z0-9]+", "_", str(kind).lower()).strip("_") or "other"
