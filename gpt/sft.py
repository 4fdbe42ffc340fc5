"""Supervised fine-tuning: a policy learns from conversations how to answer, and where an answer ends.

`train` runs on every rank of the gang. Only what the assistant wrote counts in the loss, end tokens included: the targets where
`gpt.chat`'s loss mask is True. A stopped run resumes to the same bits, for the reasons given in gpt/pretrain.py.

Left out: packing (a micro-batch is padded to its longest conversation), and weights that make conversations count equally
regardless of length. Ouyang et al. 2022 (arXiv:2203.02155), section 3.5.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from gpt.batching import Batch, ShuffledRows, evenly, padded
from gpt.chat import Conversation, encode_conversation
from gpt.engine import Engine, Rank
from gpt.folders import records_in_sections, save_trained
from gpt.loop import Trained, check_grad_norm, log_is_due, new_engine, own_rows, save_or_stop
from gpt.losses import lm_loss
from gpt.model import GPT, count_parameters, load_config, load_model, with_dropout
from gpt.pace import Pace
from gpt.random_streams import stream_seed
from gpt.schedule import lr_at
from gpt.settings import SftSettings
from gpt.tokenizer import Tokenizer


def train(rank: Rank, config: SftSettings, policy: Path, conversations: Sequence[Path], seed: int, output: Path) -> Trained | None:
    """Train the policy in a folder and write the model to `output`. Return None if stopped before the last step.

    The metadata counts the training conversations that were used, those among them that were cut at a turn to fit the policy's
    seq_len, and those left out because even their first answer does not fit. `tokens_trained` counts the tokens in the loss of all steps.
    """
    with rank.section("start", config.start_deadline_s):
        tokenizer = Tokenizer.load(policy / "tokenizer.json")
        pad_id = tokenizer.special["pad"]
        model = _first_model(config, policy)
    max_tokens = model.config.seq_len + 1  # the last token is only a target

    def read(split: str) -> tuple[list[Conversation], int]:
        records = records_in_sections(rank, conversations, split, "conversations", config.start_deadline_s)
        return encode(tokenizer, records, max_tokens)

    (examples, n_too_long), (held_out, _) = read("train"), read("held_out")
    n_all, n_cut = len(examples) + n_too_long, sum(each.cut for each in examples)
    if not examples:
        raise ValueError(
            f"no conversation in {' and '.join(map(str, conversations))} can be used: in none of {n_all} does the first answer end within "
            f"the policy's seq_len + 1 = {max_tokens} tokens; use shorter conversations, or a policy with a longer seq_len"
        )
    if n_cut or n_too_long:
        rank.warn(
            f"of {n_all} conversations, {n_cut} are cut after the last answer that ends within the policy's seq_len + 1 = {max_tokens} "
            f"tokens, and {n_too_long} are left out because even their first answer does not"
        )
    with rank.section("start", config.start_deadline_s):
        n_counting = [sum(each.loss_mask) for each in examples]
        shuffled = ShuffledRows(len(examples), batch_size=config.global_batch_size, seed=seed, name="sft")
        row_slices = own_rows(rank, config)
        n_parameters = count_parameters(model)
        engine = new_engine(rank, "policy", model, config)
        start = rank.restore()

    pace = Pace()
    for step in range(start, config.steps):
        # Before this step rather than after the previous one, so that a run that resumes from a checkpoint here evaluates it too.
        if step and step % config.eval_every == 0:
            evaluate(rank, config, engine, held_out, pad_id, step)

        with rank.section("step", config.step_deadline_s):
            started_at_s = time.monotonic()
            engine.module.train()
            of_step = shuffled.of_step(step)
            tokens_of_step = sum(n_counting[example] for example in of_step)
            loss_sum = torch.zeros((), device=rank.device)
            for micro_step, rows in enumerate(row_slices):
                batch = conversation_batch([examples[of_step[row]] for row in rows], pad_id).to(rank.device)
                # Seeded per step, dropout needs no generator restored (see gpt/pretrain.py).
                torch.manual_seed(stream_seed(seed, "sft dropout", step, rank.rank, micro_step))
                loss = lm_loss(engine(batch.token_ids), batch.targets, batch.loss_mask, global_count=tokens_of_step)
                engine.backward(loss)
                loss_sum += loss.detach()
            lr = lr_at(step, config)
            grad_norm = engine.step(lr)
            check_grad_norm(grad_norm, step + 1, config)
            pace.add(tokens=tokens_of_step, seconds=time.monotonic() - started_at_s)

        finished = step + 1
        if log_is_due(config, finished):
            values = {"train/lr": lr, "train/grad_norm": grad_norm, **pace.metrics()}
            rank.log(finished, sums={"train/loss": loss_sum}, values=values)
        if save_or_stop(rank, config, finished):
            return None

    evaluate(rank, config, engine, held_out, pad_id, config.steps)
    with rank.section("checkpoint", config.step_deadline_s):
        # With the policy's own dropout: a dropout set for this stage should not reach later ones.
        save_trained(rank, engine.full_weights(), load_config(policy), policy / "tokenizer.json", output)
    return Trained(
        {
            "role": "policy",
            "parameters": n_parameters,
            "steps": config.steps,
            "tokens_trained": sum(n_counting[example] for step in range(config.steps) for example in shuffled.of_step(step)),
            "conversations": {"train": len(examples), "cut": n_cut, "too_long": n_too_long},
        }
    )


def encode(tokenizer: Tokenizer, records: Iterable[Mapping[str, Any]], max_tokens: int) -> tuple[list[Conversation], int]:
    """Encode the conversations that fit, cut at a turn where necessary, and count those that don't fit at all."""
    encoded = [encode_conversation(tokenizer, record["messages"], max_tokens) for record in records]
    fitting = [each for each in encoded if each is not None]
    return fitting, len(encoded) - len(fitting)


def conversation_batch(conversations: Sequence[Conversation], pad_id: int) -> Batch:
    """Whole conversations, padded on the right to the longest. Their masks say which tokens count, never `pad_id`."""
    token_ids = padded([each.token_ids for each in conversations], pad_id)  # (B, T + 1)
    loss_mask = padded([each.loss_mask for each in conversations], False).bool()  # (B, T + 1)
    return Batch(token_ids[:, :-1], token_ids[:, 1:], loss_mask[:, 1:])


@torch.no_grad()
def evaluate(rank: Rank, config: SftSettings, engine: Engine, held_out: Sequence[Conversation], pad_id: int, step: int) -> None:
    """Log val/loss in nats per counting token, over the same evenly spaced held-out conversations each time. The ranks share them."""
    if not held_out:
        return
    chosen = evenly(held_out, config.eval_conversations)
    global_count = sum(sum(each.loss_mask) for each in chosen)
    with rank.section("evaluate", config.step_deadline_s):
        engine.module.eval()
        loss_sum = torch.zeros((), device=rank.device)
        per_pass = config.micro_batch(rank.world_size) * rank.world_size
        # All ranks make the same number of passes, even if nothing in one counts: a sharded forward pass is collective.
        for first in range(0, len(chosen), per_pass):
            own = chosen[first : first + per_pass][rank.rank :: rank.world_size]
            batch = conversation_batch(own or chosen[:1], pad_id).to(rank.device)
            loss_mask = batch.loss_mask if own else torch.zeros_like(batch.loss_mask)
            loss_sum += lm_loss(engine(batch.token_ids), batch.targets, loss_mask, global_count=global_count)
        rank.log(step, sums={"val/loss": loss_sum})


def _first_model(config: SftSettings, policy: Path) -> GPT:
    model = load_model(policy)
    return model if config.dropout is None else with_dropout(model, config.dropout)
