"""Supervised fine-tuning: a policy learns to answer from conversations, and where an answer ends.

`train` is what every rank of the gang runs. What counts in the loss is what the assistant wrote and its end token: the targets
where gpt.chat's loss mask is True. A stopped run goes on to the same bits, for the reasons that gpt/pretrain.py gives.

Left out: packing (a micro-batch is padded to its own longest conversation), and weights that make conversations count alike
whatever their length. Ouyang et al. 2022 (arXiv:2203.02155), section 3.5.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gpt.batching import Batch, ShuffledRows, evenly, micro_batch_rows, padded
from gpt.chat import Conversation, encode_conversation
from gpt.engine import Engine, Rank
from gpt.folders import read_records, save_trained
from gpt.losses import lm_loss
from gpt.model import GPT, count_parameters, load_config, load_model, parameter_groups, with_dropout
from gpt.pace import Pace
from gpt.random_streams import stream_seed
from gpt.schedule import check_grad_norm, lr_at
from gpt.settings import SftSettings
from gpt.tokenizer import Tokenizer


def train(rank: Rank, config: SftSettings, policy: Path, conversations: Sequence[Path], seed: int, output: Path) -> dict[str, Any] | None:
    """Train the policy of a folder and write the model to `output`; the model's metadata, or None when stopped before the end.

    Of the training conversations the metadata counts those trained on, those of them that were cut at a turn to fit the policy's
    seq_len, and those left out since not even their first answer fits; `tokens_trained` are the counting tokens of all steps.
    """
    with rank.section("start", config.start_deadline_s):
        tokenizer = Tokenizer.load(policy / "tokenizer.json")
        pad_id = tokenizer.special["pad"]
        model = _first_model(config, policy)
        max_tokens = model.config.seq_len + 1  # the last token is a target alone
        encoded = [encode_conversation(tokenizer, record["messages"], max_tokens) for record in read_records(conversations, "train")]
        examples = [each for each in encoded if each is not None]
        if not examples:
            raise ValueError(
                f"no conversation to train on in {' and '.join(map(str, conversations))}: of {len(encoded)} none has a first answer that "
                f"ends within the policy's seq_len + 1 = {max_tokens} tokens; give shorter ones, or a policy with a longer seq_len"
            )
        held_out_encoded = (
            encode_conversation(tokenizer, record["messages"], max_tokens) for record in read_records(conversations, "held_out")
        )
        held_out = [each for each in held_out_encoded if each is not None]
        n_cut, n_too_long = sum(each.cut for each in examples), len(encoded) - len(examples)
        if n_cut or n_too_long:
            rank.warn(
                f"of {len(encoded)} conversations {n_cut} are cut after the last answer that ends within the policy's seq_len + 1 = "
                f"{max_tokens} tokens, and {n_too_long}, whose first answer does not, are left out"
            )
        n_counting = [sum(each.loss_mask) for each in examples]
        shuffled = ShuffledRows(len(examples), batch_size=config.global_batch_size, seed=seed, name="sft")
        accumulation_steps = config.gradient_accumulation_steps(rank.world_size)
        row_slices = micro_batch_rows(rank.rank, rank.world_size, config.global_batch_size, accumulation_steps)
        n_parameters = count_parameters(model)
        engine = rank.engine("policy", model, parameter_groups(model, config.weight_decay), config)
        start = rank.restore()

    pace = Pace()
    for step in range(start, config.steps):
        # Before the step, not after the one before it: so a run that resumes from this step's checkpoint evaluates it too.
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
                # Named by its step, dropout needs no generator restored (see gpt/pretrain.py).
                torch.manual_seed(stream_seed(seed, "sft dropout", step, rank.rank, micro_step))
                loss = lm_loss(engine(batch.token_ids), batch.targets, batch.loss_mask, global_count=tokens_of_step)
                engine.backward(loss)
                loss_sum += loss.detach()
            lr = lr_at(step, config)
            grad_norm = engine.step(lr)
            check_grad_norm(grad_norm, step + 1, config)
            pace.add(tokens=tokens_of_step, seconds=time.monotonic() - started_at_s)

        finished = step + 1
        if finished % config.log_every == 0 or finished == config.steps:
            values = {"train/lr": lr, "train/grad_norm": grad_norm, **pace.metrics()}
            rank.log(finished, sums={"train/loss": loss_sum}, values=values)
        stopping = finished < config.steps and rank.should_stop()
        # After the last step too, whose evaluation is still to come.
        if stopping or finished == config.steps or finished % config.checkpoint_every == 0:
            with rank.section("checkpoint", config.step_deadline_s):
                rank.save(finished)
        if stopping:
            return None

    evaluate(rank, config, engine, held_out, pad_id, config.steps)
    with rank.section("checkpoint", config.step_deadline_s):
        # With the dropout that the policy came with: another one for this stage should not reach the stages after it.
        save_trained(rank, engine.full_weights(), load_config(policy), policy / "tokenizer.json", output)
    return {
        "role": "policy",
        "parameters": n_parameters,
        "steps": config.steps,
        "tokens_trained": sum(n_counting[example] for step in range(config.steps) for example in shuffled.of_step(step)),
        "conversations": {"train": len(examples), "cut": n_cut, "too_long": n_too_long},
    }


def conversation_batch(conversations: Sequence[Conversation], pad_id: int) -> Batch:
    """Whole conversations, padded on the right to the longest of them. What counts follows from their masks, never from `pad_id`."""
    token_ids = padded([each.token_ids for each in conversations], pad_id)  # (B, T + 1)
    loss_mask = padded([each.loss_mask for each in conversations], False).bool()  # (B, T + 1)
    return Batch(token_ids[:, :-1], token_ids[:, 1:], loss_mask[:, 1:])


@torch.no_grad()
def evaluate(rank: Rank, config: SftSettings, engine: Engine, held_out: Sequence[Conversation], pad_id: int, step: int) -> None:
    """Log val/loss, nats per counting token of the same held-out conversations each time, spread evenly and shared by the ranks."""
    if not held_out:
        return
    chosen = evenly(held_out, config.eval_conversations)
    global_count = sum(sum(each.loss_mask) for each in chosen)
    with rank.section("evaluate", config.step_deadline_s):
        engine.module.eval()
        loss_sum = torch.zeros((), device=rank.device)
        per_pass = config.micro_batch(rank.world_size) * rank.world_size
        # All ranks make the same number of passes, some perhaps with nothing that counts: a sharded forward is collective.
        for first in range(0, len(chosen), per_pass):
            mine = chosen[first : first + per_pass][rank.rank :: rank.world_size]
            batch = conversation_batch(mine or chosen[:1], pad_id).to(rank.device)
            loss_mask = batch.loss_mask if mine else torch.zeros_like(batch.loss_mask)
            loss_sum += lm_loss(engine(batch.token_ids), batch.targets, loss_mask, global_count=global_count)
        rank.log(step, sums={"val/loss": loss_sum})


def _first_model(config: SftSettings, policy: Path) -> GPT:
    model = load_model(policy)
    if config.dropout is not None:
        model = with_dropout(model, config.dropout)
    model.activation_checkpointing = config.activation_checkpointing
    return model
