"""Pretraining: next-token prediction on windows of a token stream, from random or from saved weights.

`train` runs on every rank of the gang. A stopped run resumes to the same bits: the batch and the dropout of a step depend only on
(seed, step), and the engine's checkpoint holds the rest.

Left out: curricula and packing; ingest makes the mixtures. Radford et al. 2019 (GPT-2); Brown et al. 2020, appendix B.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from gpt.batching import HeldOutWindows, TrainingBatches, evenly, held_out_batch, open_tokens
from gpt.engine import Engine, Rank
from gpt.folders import save_trained
from gpt.loop import Trained, check_grad_norm, log_is_due, new_engine, own_rows, save_or_stop
from gpt.losses import lm_loss
from gpt.model import GPT, count_parameters, load_model, with_dropout
from gpt.pace import Pace
from gpt.random_streams import stream_seed
from gpt.schedule import lr_at
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
) -> Trained | None:
    """Train on the token folders and write the model to `output`. Return None if stopped before the last step.

    `init` is the folder of the model whose weights training starts from, if any.
    """
    with rank.section("start", config.start_deadline_s):
        train_files = [open_tokens(folder / "train.bin", dtype, vocab_size) for folder in tokens]
        held_out_files = [open_tokens(folder / "held_out.bin", dtype, vocab_size) for folder in tokens]
        model = _first_model(config, vocab_size, init, seed)
        seq_len = model.config.seq_len
        batches = TrainingBatches(train_files, seq_len=seq_len, global_batch_size=config.global_batch_size, seed=seed)
        row_slices = own_rows(rank, config)
        tokens_per_step = config.global_batch_size * seq_len
        n_parameters = count_parameters(model)
        engine = new_engine(rank, "policy", model, config)
        start = rank.restore()

    pace = Pace()
    for step in range(start, config.steps):
        # Before this step rather than after the previous one, so that a run that resumes from a checkpoint here evaluates it too.
        if step and step % config.eval_every == 0:
            evaluate(rank, config, engine, held_out_files, seq_len, step)

        with rank.section("step", config.step_deadline_s):
            started_at_s = time.monotonic()
            engine.module.train()
            loss_sum = torch.zeros((), device=rank.device)
            for micro_step, rows in enumerate(row_slices):
                batch = batches.micro_batch(step, rows).to(rank.device)
                # Dropout draws from torch's global generator, whose state cannot be restored under every engine. Seeded per step, it
                # needs no restoring: step 500 draws the same whether or not step 499 ran in this process.
                torch.manual_seed(stream_seed(seed, "dropout", step, rank.rank, micro_step))
                loss = lm_loss(engine(batch.token_ids), batch.targets, batch.loss_mask, global_count=tokens_per_step)
                engine.backward(loss)
                loss_sum += loss.detach()
            lr = lr_at(step, config)
            grad_norm = engine.step(lr)
            check_grad_norm(grad_norm, step + 1, config)
            pace.add(tokens=tokens_per_step, seconds=time.monotonic() - started_at_s)

        finished = step + 1
        if log_is_due(config, finished):
            values = {"train/lr": lr, "train/grad_norm": grad_norm, **pace.metrics()}
            rank.log(finished, sums={"train/loss": loss_sum}, values=values)
        if save_or_stop(rank, config, finished):
            return None

    evaluate(rank, config, engine, held_out_files, seq_len, config.steps)
    with rank.section("checkpoint", config.step_deadline_s):
        save_trained(rank, engine.full_weights(), model.config, tokens[0] / "tokenizer.json", output)
    tokens_seen = config.steps * tokens_per_step
    return Trained({"role": "policy", "parameters": n_parameters, "steps": config.steps, "tokens_seen": tokens_seen})


@torch.no_grad()
def evaluate(rank: Rank, config: PretrainSettings, engine: Engine, files: Sequence[np.ndarray], seq_len: int, step: int) -> None:
    """Log val/loss in nats per token, over the same evenly spaced held-out windows each time. The ranks share them."""
    all_windows = HeldOutWindows([len(tokens) for tokens in files], seq_len, stride=seq_len)
    if not all_windows:
        return
    windows = evenly(all_windows, max(1, config.eval_tokens // seq_len))
    global_count = sum(window.stop - window.score_from for window in windows)
    with rank.section("evaluate", config.step_deadline_s):
        engine.module.eval()
        loss_sum = torch.zeros((), device=rank.device)
        per_pass = config.micro_batch(rank.world_size) * rank.world_size
        # All ranks make the same number of passes, even if nothing in one counts: a sharded forward pass is collective.
        for first in range(0, len(windows), per_pass):
            own = windows[first : first + per_pass][rank.rank :: rank.world_size]
            batch = held_out_batch(files, own or windows[:1], seq_len).to(rank.device)
            loss_mask = batch.loss_mask if own else torch.zeros_like(batch.loss_mask)
            loss_sum += lm_loss(engine(batch.token_ids), batch.targets, loss_mask, global_count=global_count)
        rank.log(step, sums={"val/loss": loss_sum})


def _first_model(config: PretrainSettings, vocab_size: int, init: Path | None, seed: int) -> GPT:
    shape = GPTConfig(**config.shape().model_dump(), vocab_size=vocab_size)
    if init is None:
        return GPT(shape, torch.Generator().manual_seed(stream_seed(seed, "init")))
    model = load_model(init)
    expected, found = shape.model_dump(), model.config.model_dump()
    differing = [name for name in expected if name != "dropout" and expected[name] != found[name]]
    if differing:
        raise ValueError(
            f"the model to start from has another shape: expected {', '.join(f'{name} = {expected[name]}' for name in differing)}, found "
            f"{', '.join(f'{name} = {found[name]}' for name in differing)}. Set the same shape here, or start without a model"
        )
    return with_dropout(model, shape.dropout)
