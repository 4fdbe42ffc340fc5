"""The reward model: a policy's trunk that learns to score responses, from pairs, from ratings, or from both.

    <|user|>Who are you?<|end|><|assistant|>A small model.<|end|>
                                                           ^^^^^^^ the score of the response is read here, and nowhere else

`train` is what every rank of the gang runs. A batch is made of whole items, each a pair or a rating; a pair's two responses go
through the model in one pass. Scores have no origin and no unit (pairs know differences alone), so training ends with the mean
and deviation of its own items' scores, and whoever uses the model takes the normalised ones: `RewardScorer`, `value_model`.

Left out: margins between more than two responses, and scores of unfinished ones. Christiano et al. 2017 (arXiv:1706.03741);
Ziegler et al. 2019 (arXiv:1909.08593); Ouyang et al. 2022 (arXiv:2203.02155), section 3.5.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt.batching import ShuffledRows, evenly, micro_batch_rows, padded
from gpt.chat import encode_prompt, encode_response
from gpt.engine import Engine, Rank
from gpt.folders import read_records, save_trained
from gpt.losses import reward_centering_loss, reward_pair_loss, reward_rating_loss
from gpt.model import RewardModel, count_parameters, load_config, load_model, load_reward_model, parameter_groups, set_weights, with_dropout
from gpt.pace import Pace
from gpt.random_streams import stream_seed
from gpt.schedule import check_grad_norm, lr_at
from gpt.settings import RewardSettings
from gpt.tokenizer import Tokenizer

NORMALISED_ITEMS = 4096
"""Training items whose scores make the mean and the deviation, if there are as many."""
ROWS_PER_PASS = 16
"""Conversations that are scored at a time, without gradients. Fixed, so that a score is the same for any ranks and micro-batch."""


@dataclass(frozen=True)
class Pair:
    """Two responses to one prompt, each as the whole conversation up to its end token."""

    chosen: list[int]
    rejected: list[int]
    kind: str | None = None
    """What sort of pair its record says it is, in a metric's letters."""


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
) -> dict[str, Any] | None:
    """Train on the pairs and the ratings and write the model to `output`; the model's metadata, or None when stopped before the end.

    `policy` is the folder of the model that training starts from.
    """
    with rank.section("start", config.start_deadline_s):
        tokenizer = Tokenizer.load(policy / "tokenizer.json")
        model = _first_model(config, policy, seed)
        items, counts = read_items(tokenizer, preferences, ratings, "train", model.config.seq_len)
        held_out_items, held_out_counts = read_items(tokenizer, preferences, ratings, "held_out", model.config.seq_len)
        if not items:
            raise ValueError(
                f"no training record is left to learn from: {counts['too_long']} are longer than the policy's seq_len = "
                f"{model.config.seq_len} tokens, and {counts['alike']} are pairs of equal responses; "
                "give shorter ones, or a policy with a longer seq_len"
            )
        if counts["too_long"] or counts["alike"]:
            rank.warn(
                f"of {len(items) + counts['too_long'] + counts['alike']} training records {counts['too_long']} are left out, being longer "
                f"than the policy's seq_len = {model.config.seq_len} tokens, and {counts['alike']} whose two responses are equal"
            )
        order = ShuffledRows(len(items), batch_size=config.global_batch_size, seed=seed, name="reward")
        accumulation_steps = config.gradient_accumulation_steps(rank.world_size)
        row_slices = micro_batch_rows(rank.rank, rank.world_size, config.global_batch_size, accumulation_steps)
        n_parameters = count_parameters(model)
        engine = rank.engine("reward", model, parameter_groups(model, config.weight_decay), config)
        start = rank.restore()

    pace = Pace()
    for step in range(start, config.steps):
        # Before the step, not after the one before it: so a run that resumes from this step's checkpoint evaluates it too.
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
                # Named by its step, dropout needs no generator restored (see gpt/pretrain.py).
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
        if finished % config.log_every == 0 or finished == config.steps:
            values = {"train/lr": lr, "train/grad_norm": grad_norm, **pace.metrics()}
            rank.log(finished, sums={"train/loss": loss_sum, "train/centering": centering_sum}, values=values)
        stopping = finished < config.steps and rank.should_stop()
        # After the last step too, whose evaluation is still to come.
        if stopping or finished == config.steps or finished % config.checkpoint_every == 0:
            with rank.section("checkpoint", config.step_deadline_s):
                rank.save(finished)
        if stopping:
            return None

    evaluate(rank, config, engine, held_out_items, config.steps)
    with rank.section("evaluate", config.step_deadline_s):
        # With the dropout that the policy came with: another one for this stage should not reach the stages after it.
        trained = RewardModel(load_config(policy)).eval()
        weights = engine.full_weights()
        set_weights(trained, weights)
        trained.to(rank.device)
    # In fp32 like those of `RewardScorer`: in another precision of the engine's, scores have another mean and deviation.
    held_out_scores = all_scores(rank, config, trained, conversations(held_out_items))
    mean, std = score_scale(all_scores(rank, config, trained, conversations(evenly(items, NORMALISED_ITEMS))))
    with rank.section("checkpoint", config.step_deadline_s):
        save_trained(rank, weights, trained.config, policy / "tokenizer.json", output, RewardModel)
    return {
        "role": "reward",
        "parameters": n_parameters,
        "steps": config.steps,
        "train": counts,
        "held_out": held_out_counts,
        "score_mean": mean,
        "score_std": std,
        "figures": held_out_figures(held_out_items, held_out_scores),
    }


def read_items(
    tokenizer: Tokenizer, preferences: Sequence[Path], ratings: Sequence[Path], split: str, seq_len: int
) -> tuple[list[Item], dict[str, int]]:
    """The split's pairs, then its ratings; and how many there are of each, and how many records were left out, for which reason."""
    pairs: list[Pair] = []
    rated: list[Rating] = []
    too_long = alike = 0
    for record in read_records(preferences, split):
        prompt = encode_prompt(tokenizer, record["prompt"])
        chosen, rejected = ([*prompt, *encode_response(tokenizer, record[name])] for name in ("chosen", "rejected"))
        if max(len(chosen), len(rejected)) > seq_len:
            too_long += 1
        elif chosen == rejected:
            alike += 1
        else:
            pairs.append(Pair(chosen, rejected, _as_in_a_metric(record.get("kind"))))
    for record in read_records(ratings, split):
        token_ids = [*encode_prompt(tokenizer, record["prompt"]), *encode_response(tokenizer, record["response"])]
        if len(token_ids) > seq_len:
            too_long += 1
        else:
            rated.append(Rating(token_ids, record["score"]))
    return [*pairs, *rated], {"pairs": len(pairs), "ratings": len(rated), "too_long": too_long, "alike": alike}


def conversations(items: Sequence[Item]) -> list[list[int]]:
    """The rows that these items are scored by: all chosen ones, then all rejected ones, then all that were rated."""
    pairs = [item for item in items if isinstance(item, Pair)]
    rated = [item.token_ids for item in items if isinstance(item, Rating)]
    return [*(pair.chosen for pair in pairs), *(pair.rejected for pair in pairs), *rated]


def end_scores(model: Callable[[Tensor], Tensor], rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Raw scores (B,) in fp32, each read at the last token of its row."""
    token_ids = padded(rows, 0).to(device)  # (B, T); with any id, since no token looks at a later one
    last = torch.tensor([len(row) - 1 for row in rows], device=device)  # (B,)
    return model(token_ids).gather(1, last[:, None]).squeeze(1).float()


def items_loss(items: Sequence[Item], scores: Tensor, *, global_count: int) -> tuple[Tensor, Tensor]:
    """The loss () of items whose `conversations` have these scores (B,), and their centering term (): parts of `global_count` items."""
    chosen, rejected, rated = _by_place(items, scores)
    ratings = scores.new_tensor([item.rating for item in items if isinstance(item, Rating)])
    pair_loss = reward_pair_loss(chosen, rejected, global_count=global_count)
    loss = pair_loss + reward_rating_loss(rated, ratings, global_count=global_count)
    return loss, reward_centering_loss(chosen, rejected, global_count=global_count)


@torch.no_grad()
def all_scores(rank: Rank, config: RewardSettings, model: Callable[[Tensor], Tensor], rows: Sequence[Sequence[int]]) -> Tensor:
    """Raw scores (N,) of all rows, fp64 on the CPU of every rank; the ranks share the work, and their number changes no bit of it."""
    scores = torch.zeros(len(rows), dtype=torch.float64)
    passes = [slice(first, first + ROWS_PER_PASS) for first in range(0, len(rows), ROWS_PER_PASS)]
    for first in range(0, len(passes), rank.world_size):
        with rank.section("evaluate", config.step_deadline_s):
            mine = first + rank.rank
            # A rank that has none left goes along with the last one: a sharded forward is collective.
            rows_of_pass = passes[min(mine, len(passes) - 1)]
            found = end_scores(model, rows[rows_of_pass], rank.device)
            if mine < len(passes):
                scores[rows_of_pass] = found.double().cpu()
    return rank.all_sum(scores)  # each row has been scored by one rank and is 0 on the others


def evaluate(rank: Rank, config: RewardSettings, engine: Engine, items: Sequence[Item], step: int) -> None:
    """Log val/loss, nats per item over the same held-out items each time, spread evenly and shared by the ranks."""
    if items:
        engine.module.eval()
        chosen_items = evenly(items, config.eval_items)
        scores = all_scores(rank, config, engine, conversations(chosen_items))
        loss, _ = items_loss(chosen_items, scores, global_count=len(chosen_items))
        rank.log(step, values={"val/loss": loss.item()})


def held_out_figures(items: Sequence[Item], scores: Tensor) -> dict[str, float]:
    """How well the scores (B,) of these items' `conversations` tell good from bad; nothing about what there is none of."""
    figures: dict[str, float] = {}
    chosen, rejected, rated = _by_place(items, scores)
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
    """Mean and (biased) standard deviation of scores (N,); ValueError where they are no numbers, or equal but for rounding in fp32."""
    mean, std = scores.mean().item(), scores.std(correction=0).item()
    if not std > 1e-6 * max(1.0, abs(mean)):
        fault = "no numbers" if math.isnan(std) else "equal"
        raise ValueError(
            f"all scores are {fault}: {len(scores)} training responses have mean {mean:.6g} and deviation {std:.3g}, so this reward model "
            "tells nothing apart. Look at its train/loss and its data; a lower lr, or responses that differ more, may help"
        )
    return mean, std


class RewardScorer:
    """An open reward model: `RewardScorer(folder, mean=0.3, std=1.7, device=device).scores(prompts, responses)`.

    `mean` and `std` are the manifest's score_mean and score_std.
    """

    def __init__(self, folder: Path, mean: float, std: float, device: torch.device) -> None:
        self._model = load_reward_model(folder).to(device)
        self._mean = mean
        self._std = std
        self._device = device

    @torch.no_grad()
    def scores(self, prompts: Sequence[list[int]], responses: Sequence[list[int]]) -> Tensor:
        """Normalised scores (B,), each read at its response's last token; among the training items they had mean 0 and deviation 1.

        Of a response that was cut off, that is no end token, where training never looked: what it gets is the caller's to say.
        """
        rows = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
        passes = [rows[first : first + ROWS_PER_PASS] for first in range(0, len(rows), ROWS_PER_PASS)]
        raw = torch.cat([end_scores(self._model, rows_of_pass, self._device) for rows_of_pass in passes])  # (B,)
        return (raw - self._mean) / self._std


def value_model(folder: Path, mean: float, std: float) -> RewardModel:
    """The reward model as PPO's value model begins: its value at an end token is the normalised score, without a division of its own."""
    model = load_reward_model(folder)
    with torch.no_grad():
        model.output.weight /= std
        model.output.bias.sub_(mean).div_(std)
    return model


def _first_model(config: RewardSettings, policy: Path, seed: int) -> RewardModel:
    trunk = load_model(policy)
    if config.dropout is not None:
        trunk = with_dropout(trunk, config.dropout)
    model = RewardModel.from_policy(trunk, torch.Generator().manual_seed(stream_seed(seed, "reward head")))
    model.activation_checkpointing = config.activation_checkpointing
    return model


def _by_place(items: Sequence[Item], scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The scores (B,) of `conversations(items)`: of the chosen, of the rejected, of the rated."""
    n_pairs = sum(isinstance(item, Pair) for item in items)
    chosen, rejected, rated = scores.split([n_pairs, n_pairs, len(items) - n_pairs])
    return chosen, rejected, rated


def _as_in_a_metric(kind: Any) -> str | None:
    return None if kind is None else re.sub(r"[^a-z0-9]+", "_", str(kind).lower()).strip("_") or "other"
