"""Time our training loop against a plain one: a GPT of 4 layers, 4 heads, 128 channels, T 64, batch 12, vocabulary 262, on a CPU.

    python -m benchmarks.train_step [--compile-peer]

Ours is `gpt.pretrain.train` itself, with the plain engine. The peer is what people write first: a compact GPT, `get_batch` that slices at
random offsets, AdamW, clipping, the same schedule. It runs as commonly written, and with what speeds it up at no cost (fused AdamW;
`--compile-peer` adds torch.compile, which needs a C++ compiler). The headline compares with the fastest peer.

Both sides start each round from the same weights, log every 10 steps, and must have the same losses on the same batches. Rounds alternate
(ABBA); the ratio is that of the medians, with a bootstrap interval. It leaves out evaluation and checkpoints.
"""

from __future__ import annotations

import argparse
import math
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import report
from benchmarks.timed_rank import TOKENS_DTYPE, TimedRank, write_random_tokens
from gpt.batching import TrainingBatches, open_tokens
from gpt.model import GPT
from gpt.pretrain import train
from gpt.random_streams import stream_seed
from gpt.schedule import lr_at
from gpt.settings import GPTConfig, PretrainSettings
from gpt.torch_engine import TorchEngine

SEED = 1
VOCAB_SIZE = 262
CHECK_STEPS = 20
TOLERANCE = 1e-4
DEVICE = torch.device("cpu")
SETTINGS = PretrainSettings(
    preset="gpt2-tiny",
    seq_len=64,
    steps=2000,
    global_batch_size=12,
    lr=1e-3,
    warmup_steps=100,
    beta2=0.99,
    engine="torch",
    log_every=10,
    eval_every=10**9,
    checkpoint_every=10**9,
)
CONFIG = GPTConfig(**SETTINGS.shape().model_dump(), vocab_size=VOCAB_SIZE)
TOKENS_PER_STEP = SETTINGS.global_batch_size * CONFIG.seq_len


@dataclass(frozen=True)
class Round:
    wall_s: float
    cpu_s: float


class PlainBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        width = CONFIG.n_embd
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n_rows, n_tokens, width = x.shape
        q, k, v = (
            part.view(n_rows, n_tokens, CONFIG.n_head, width // CONFIG.n_head).transpose(1, 2)
            for part in self.qkv(self.norm_1(x)).split(width, dim=2)
        )  # each (B, H, T, D)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).contiguous().view(n_rows, n_tokens, width))
        return x + self.down(F.gelu(self.up(self.norm_2(x)), approximate="tanh"))


class PlainGPT(nn.Module):
    """A compact GPT that returns its own loss, as short scripts do."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB_SIZE, CONFIG.n_embd)
        self.positions = nn.Embedding(CONFIG.seq_len, CONFIG.n_embd)
        self.blocks = nn.ModuleList(PlainBlock() for _ in range(CONFIG.n_layer))
        self.norm = nn.LayerNorm(CONFIG.n_embd)
        self.head = nn.Linear(CONFIG.n_embd, VOCAB_SIZE, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, token_ids: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(token_ids) + self.positions(torch.arange(token_ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))


class PlainLoop:
    """The peer. It draws its own batches, except in the check for equal work."""

    def __init__(self, *, fused: bool, compiled: bool = False) -> None:
        self._fused = fused
        self._model = PlainGPT()  # the same in all rounds, so it is compiled once
        if compiled:
            self._model.compile()

    def run(
        self, get_batch: Callable[[int], tuple[Tensor, Tensor]], n_steps: int, warmup_steps: int = 0, log_every: int = SETTINGS.log_every
    ) -> tuple[Round, list[float]]:
        model = self._model
        _copy_our_first_weights(model)
        matrices = [p for p in model.parameters() if p.dim() >= 2]
        vectors = [p for p in model.parameters() if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": SETTINGS.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        betas = (SETTINGS.beta1, SETTINGS.beta2)
        optimizer = torch.optim.AdamW(groups, lr=SETTINGS.lr, betas=betas, eps=SETTINGS.eps, fused=self._fused or None)
        model.train()
        losses = []
        began = _clocks()
        for step in range(n_steps):
            if step == warmup_steps:
                began = _clocks()
            for group in optimizer.param_groups:
                group["lr"] = lr_at(step, SETTINGS)
            token_ids, targets = get_batch(step)
            loss = model(token_ids, targets)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), SETTINGS.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if (step + 1) % log_every == 0:
                losses.append(loss.item())
        return _since(began), losses


class Benchmark:
    def __init__(self, tokens: Path, options: argparse.Namespace) -> None:
        self.options = options
        self.tokens = tokens
        self.data = open_tokens(tokens / "train.bin", TOKENS_DTYPE, VOCAB_SIZE)
        self.offsets = torch.Generator().manual_seed(SEED)

    def ours(self) -> Round:
        rank = _LoopClock(self.options.warmup_steps, self.options.steps)
        self._train(rank, SETTINGS)
        return rank.round()

    def theirs(self, peer: PlainLoop) -> Round:
        n_steps = self.options.warmup_steps + self.options.steps
        return peer.run(self._get_batch, n_steps, self.options.warmup_steps)[0]

    def check_equal_work(self, peer: PlainLoop) -> float:
        """The largest difference between the two losses over the first steps, on our batches and from our weights."""
        rank = TimedRank(DEVICE, TorchEngine, CHECK_STEPS)
        self._train(rank, SETTINGS.model_copy(update={"log_every": 1}))
        batches = TrainingBatches([self.data], seq_len=CONFIG.seq_len, global_batch_size=SETTINGS.global_batch_size, seed=SEED)

        def same_batch(step: int) -> tuple[Tensor, Tensor]:
            batch = batches.micro_batch(step, range(SETTINGS.global_batch_size))
            return batch.token_ids, batch.targets

        _, losses = peer.run(same_batch, CHECK_STEPS, log_every=1)
        return max(abs(ours - theirs) for ours, theirs in zip(rank.losses, losses, strict=True))

    def _train(self, rank: TimedRank, settings: PretrainSettings) -> None:
        train(rank, settings, [self.tokens], TOKENS_DTYPE, VOCAB_SIZE, init=None, seed=SEED, output=self.tokens / "unused")

    def _get_batch(self, step: int) -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(self.data) - CONFIG.seq_len, (SETTINGS.global_batch_size,), generator=self.offsets)
        inputs = [torch.from_numpy(self.data[i : i + CONFIG.seq_len].astype(np.int64)) for i in starts]
        targets = [torch.from_numpy(self.data[i + 1 : i + 1 + CONFIG.seq_len].astype(np.int64)) for i in starts]
        return torch.stack(inputs), torch.stack(targets)


class _LoopClock(TimedRank):
    """Times the whole loop after the warm-up, including what happens between steps."""

    def __init__(self, warmup_steps: int, steps: int) -> None:
        super().__init__(DEVICE, TorchEngine, warmup_steps + steps)
        self._warmup_steps = warmup_steps
        self._began = self._ended = (0.0, 0.0)

    def should_stop(self) -> bool:
        if len(self.ended_at_s) == self._warmup_steps:
            self._began = _clocks()
        self._ended = _clocks()
        return super().should_stop()

    def round(self) -> Round:
        return Round(*(end - begin for begin, end in zip(self._began, self._ended, strict=True)))


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    load_before = os.getloadavg()[0]
    torch.set_num_threads(options.threads)
    peers = {"plain loop, as commonly written": PlainLoop(fused=False), "plain loop, fused AdamW": PlainLoop(fused=True)}
    if options.compile_peer:
        peers["plain loop, fused AdamW, torch.compile"] = PlainLoop(fused=True, compiled=True)
    with tempfile.TemporaryDirectory(prefix="gptline-benchmark-") as folder:
        tokens = write_random_tokens(Path(folder) / "tokens", n_tokens=1_000_000, vocab_size=VOCAB_SIZE, seed=SEED)
        benchmark = Benchmark(tokens, options)
        differences = {name: benchmark.check_equal_work(peer) for name, peer in peers.items()}
        unequal = {name: difference for name, difference in differences.items() if not difference <= TOLERANCE}
        if unequal:
            print(f"not the same work: over {CHECK_STEPS} steps, losses differ by {unequal}; expected at most {TOLERANCE}", file=sys.stderr)
            return 1
        ours: list[Round] = []
        theirs: dict[str, list[Round]] = {name: [] for name in peers}
        for number in range(options.rounds):
            forward = number % 2 == 0
            if forward:
                ours.append(benchmark.ours())
            for name in peers if forward else reversed(peers):
                theirs[name].append(benchmark.theirs(peers[name]))
            if not forward:
                ours.append(benchmark.ours())
            print(f"round {number + 1} of {options.rounds}: ours {_ms(ours[-1], options):.2f} ms a step, "
                  + ", ".join(f"{name} {_ms(rounds[-1], options):.2f}" for name, rounds in theirs.items()), flush=True)  # fmt: skip

    rows = [_compare(name, ours, rounds, options) for name, rounds in theirs.items()]
    headline = min(rows, key=lambda row: row["ratio"])
    self_ratio = _median_wall(ours[::2]) / _median_wall(ours[1::2])
    noisy = load_before > 0.3 or not 0.97 <= self_ratio <= 1.03
    row = report.result(
        "train_step",
        unit="tokens/s",
        device=DEVICE,
        **headline,
        goal=1.0,
        noisy=noisy,
        load_before=load_before,
        self_ratio=self_ratio,
        threads=options.threads,
        rounds=options.rounds,
        timed_steps=options.steps,
        warmup_steps=options.warmup_steps,
        largest_loss_difference=differences,
        peers=rows,
        config=SETTINGS.model_dump(exclude_none=True),
        vocab_size=VOCAB_SIZE,
    )
    for one in rows:
        low, high = one["interval_95"]
        print(f"{one['ratio']:.3f} ({low:.3f} to {high:.3f}) of {one['peer']}; in CPU seconds {one['cpu_ratio']:.3f}")
    print(f"ours {row['ours']:,.0f} tokens/s; over 1 is better for us; our own rounds {self_ratio:.3f}{'; noisy' if noisy else ''}")
    print(f"written: {report.write(options.out, row)}")
    return 0


def _compare(name: str, ours: Sequence[Round], theirs: Sequence[Round], options: argparse.Namespace) -> dict[str, Any]:
    wall_ours, wall_theirs = (np.array([one.wall_s for one in rounds]) for rounds in (ours, theirs))
    draws = np.random.default_rng(SEED).integers(len(ours), size=(10_000, len(ours)))
    ratios = np.median(wall_theirs[draws], axis=1) / np.median(wall_ours[draws], axis=1)  # resampled in pairs: a slow minute hits both
    tokens = options.steps * TOKENS_PER_STEP
    return {
        "peer": name,
        "ratio": float(np.median(wall_theirs) / np.median(wall_ours)),
        "interval_95": [float(value) for value in np.quantile(ratios, (0.025, 0.975))],
        "cpu_ratio": float(np.median([one.cpu_s for one in theirs]) / np.median([one.cpu_s for one in ours])),
        "ours": tokens / float(np.median(wall_ours)),
        "theirs": tokens / float(np.median(wall_theirs)),
    }


def _copy_our_first_weights(model: PlainGPT) -> None:
    ours = GPT(CONFIG, torch.Generator().manual_seed(stream_seed(SEED, "init")))
    pairs: list[tuple[nn.Module, nn.Module]] = [
        (model.tokens, ours.token_embedding),
        (model.positions, ours.position_embedding),
        (model.norm, ours.final_norm),
    ]
    theirs: Any
    block: Any
    for theirs, block in zip(model.blocks, ours.blocks, strict=True):
        pairs += [
            (theirs.norm_1, block.attention_norm),
            (theirs.qkv, block.attention.qkv),
            (theirs.project, block.attention.project),
            (theirs.norm_2, block.feed_forward_norm),
            (theirs.up, block.feed_forward.up),
            (theirs.down, block.feed_forward.down),
        ]
    for mine, source in pairs:
        mine.load_state_dict(source.state_dict())


def _clocks() -> tuple[float, float]:
    """Wall-clock and CPU seconds."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return time.perf_counter(), usage.ru_utime + usage.ru_stime


def _since(began: tuple[float, float]) -> Round:
    return Round(*(now - then for now, then in zip(_clocks(), began, strict=True)))


def _median_wall(rounds: Sequence[Round]) -> float:
    return float(np.median([one.wall_s for one in rounds])) if rounds else math.nan


def _ms(one: Round, options: argparse.Namespace) -> float:
    return 1e3 * one.wall_s / options.steps


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_step", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=200, help="timed steps per round")
    parser.add_argument("--warmup-steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1, help="for both sides; a model this small gains nothing from a second one")
    parser.add_argument("--compile-peer", action="store_true", help="add a third peer, with torch.compile")
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    options = parser.parse_args(arguments)
    if options.rounds < 2 or options.warmup_steps < 1:
        parser.error(f"expected --rounds 2 or more, --warmup-steps 1 or more; found {options.rounds} and {options.warmup_steps}")
    return options


if __name__ == "__main__":
    sys.exit(main())
