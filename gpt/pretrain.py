"""Pretraining: next-token prediction on windows of a token stream, from nothing or from saved weights.

`train` is what every rank of the gang runs. A stopped run goes on to the same bits: the batch and the dropout of a step
follow from (seed, step) alone, and the engine's checkpoint holds the rest.

Left out: curricula and packing; mixtures are made at ingest. Radford et al. 2019 (GPT-2); Brown et al. 2020, appendix B.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpt.batching import TrainingBatches, evenly, held_out_batch, held_out_windows, micro_batch_rows, open_tokens
from gpt.engine import Engine, Rank
from gpt.folders import save_trained
from gpt.losses import lm_loss
from gpt.model import GPT, count_parameters, load_model, parameter_groups, with_dropout
from gpt.pace import Pace
from gpt.random_streams import stream_seed
from gpt.schedule import check_grad_norm, lr_at
from gpt.settings import GPTConfig, PretrainSettings


def train(
    rank: Rank,
    config: PretrainSettings,
    tokens: Sequence[Path],
    dtype: str,
    vocab_size: int,
    init: Path | None,
    seed: int,
    output: Path,
) -> dict[str, Any] | None:
    """Train on the token folders and write the model to `output`; the model's metadata, or None when stopped before the end.

    `init` is the folder of a model whose weights training starts from.
    """
    with rank.section("start", config.start_deadline_s):
        tokenizer = _common_tokenizer(tokens)
        train_files = [open_tokens(folder / "train.bin", dtype, vocab_size) for folder in tokens]
        held_out_files = [open_tokens(folder / "held_out.bin", dtype, vocab_size) for folder in tokens]
        model = _first_model(config, vocab_size, init, seed)
        seq_len = model.config.seq_len
        batches = TrainingBatches(train_files, seq_len=seq_len, global_batch_size=config.global_batch_size, seed=seed)
        accumulation_steps = config.gradient_accumulation_steps(rank.world_size)
        row_slices = micro_batch_rows(rank.rank, rank.world_size, config.global_batch_size, accumulation_steps)
        tokens_per_step = config.global_batch_size * seq_len
        n_parameters = count_parameters(model)
        engine = rank.engine("policy", model, parameter_groups(model, config.weight_decay), config)
        start = rank.restore()

    pace = Pace()
    for step in range(start, config.steps):
        # Before the step, not after the one before it: so a run that resumes from this step's checkpoint evaluates it too.
        if step and step % config.eval_every == 0:
            evaluate(rank, config, engine, held_out_files, seq_len, step)

        with rank.section("step", config.step_deadline_s):
            started_at_s = time.monotonic()
            engine.module.train()
            loss_sum = torch.zeros((), device=rank.device)
            for micro_step, rows in enumerate(row_slices):
                batch = batches.micro_batch(step, rows).to(rank.device)
                # Dropout draws from torch's own generator, which nobody could restore under every engine. Named by its
                # step instead, it needs no restoring: step 500 draws the same whether or not step 499 ran in this process.
                torch.manual_seed(stream_seed(seed, "dropout", step, rank.rank, micro_step))
                loss = lm_loss(engine(batch.token_ids), batch.targets, batch.loss_mask, global_count=tokens_per_step)
                engine.backward(loss)
                loss_sum += loss.detach()
            lr = lr_at(step, config)
            grad_norm = engine.step(lr)
            check_grad_norm(grad_norm, step + 1, config)
            pace.add(tokens=tokens_per_step, seconds=time.monotonic() - started_at_s)

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

    evaluate(rank, config, engine, held_out_files, seq_len, config.steps)
    with rank.section("checkpoint", config.step_deadline_s):
        save_trained(rank, engine.full_weights(), model.config, tokenizer, output)
    return {"role": "policy", "parameters": n_parameters, "steps": config.steps, "tokens_seen": config.steps * tokens_per_step}


@torch.no_grad()
def evaluate(rank: Rank, config: PretrainSettings, engine: Engine, files: Sequence[np.ndarray], seq_len: int, step: int) -> None:
    """Log val/loss, nats per token over the same held-out windows each time, spread evenly and shared by the ranks."""
    windows = held_out_windows([len(tokens) for tokens in files], seq_len, stride=seq_len)
    if not windows:
        return
    windows = evenly(windows, max(1, config.eval_tokens // seq_len))
    global_count = sum(window.stop - window.score_from for window in windows)
    with rank.section("evaluate", config.step_deadline_s):
        engine.module.eval()
        loss_sum = torch.zeros((), device=rank.device)
        per_pass = config.micro_batch(rank.world_size) * rank.world_size
        # All ranks make the same number of passes, some perhaps with nothing that counts: a sharded forward is collective.
        for first in range(0, len(windows), per_pass):
            mine = windows[first : first + per_pass][rank.rank :: rank.world_size]
            batch = held_out_batch(files, mine or windows[:1], seq_len).to(rank.device)
            loss_mask = batch.loss_mask if mine else torch.zeros_like(batch.loss_mask)
            loss_sum += lm_loss(engine(batch.token_ids), batch.targets, loss_mask, global_count=global_count)
        rank.log(step, sums={"val/loss": loss_sum})


def _first_model(config: PretrainSettings, vocab_size: int, init: Path | None, seed: int) -> GPT:
    wanted = GPTConfig(**config.shape().model_dump(), vocab_size=vocab_size)
    if init is None:
        model = GPT(wanted, torch.Generator().manual_seed(stream_seed(seed, "init")))
    else:
        earlier = load_model(init)
        theirs, ours = earlier.config.model_dump(), wanted.model_dump()
        differing = [name for name in ours if name != "dropout" and ours[name] != theirs[name]]
        if differing:
            raise ValueError(
                f"the model to start from has {', '.join(f'{name} = {theirs[name]}' for name in differing)}; this stage asks for "
                f"{', '.join(f'{name} = {ours[name]}' for name in differing)}. Set the same shape, or start from nothing"
            )
        model = with_dropout(earlier, wanted.dropout)
    model.activation_checkpointing = config.activation_checkpointing
    return model


def _common_tokenizer(tokens: Sequence[Path]) -> Path:
    paths = [folder / "tokenizer.json" for folder in tokens]
    for path in paths[1:]:
        if path.read_bytes() != paths[0].read_bytes():
            raise ValueError(f"{path} differs from {paths[0]}: tokens of two tokenizers can't be mixed; tokenize both with one of them")
    return paths[0]
