"""Measure the pretraining loop on one GPU: tokens/s, MFU and peak memory of the plain engine and of DeepSpeed, each checked against fp32.

    python -m benchmarks.gpu                                                     under ten minutes on one GPU
    python -m benchmarks.gpu --device cpu --preset gpt2-nano --steps 5           the same code path, as far as a CPU can run it

It times `gpt.pretrain.train` itself, under a Rank with a stopwatch. Every measurement has a process of its own, so that leftover memory,
an out-of-memory error or a crash can't affect the next. It needs torch, numpy, pydantic and safetensors, and measures DeepSpeed if that is
installed; no Ray, no MLflow, no network.

It leaves out several GPUs, longer contexts and larger models. MFU: Chowdhery et al. 2022, appendix B.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from benchmarks import report
from benchmarks.timed_rank import TOKENS_DTYPE, TimedRank, write_random_tokens
from gpt.engine import Engine
from gpt.model import flops_per_token
from gpt.pretrain import train
from gpt.settings import GPTConfig, PretrainSettings, TrainSettings

T = TypeVar("T")

# Dense bf16 FLOP/s from the data sheets; the first name that is part of the device's name counts.
DATASHEET_FLOPS = (("H200", 989e12), ("H100 80GB HBM3", 989e12), ("H100 NVL", 835e12), ("H100 PCIe", 756e12), ("A100", 312e12))
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
CHECK_BATCH, CHECK_MICRO_BATCH = 8, 4
SEED = 1


@dataclass(frozen=True)
class Variant:
    """A row: which engine, and how."""

    row: str
    engine: str
    zero_stage: int = 0
    compiled: bool = False


@dataclass(frozen=True)
class Job:
    """One run of the loop, in a process of its own."""

    variant: Variant
    settings: PretrainSettings
    vocab_size: int
    tokens: Path
    device: str
    n_steps: int
    time_s: float
    """No step starts after this many seconds."""


@dataclass(frozen=True)
class Outcome:
    losses: list[float]
    step_s: list[float]
    setup_s: float
    """From entering `run_job` to the first step."""
    peak_allocated_bytes: int | None
    peak_reserved_bytes: int | None
    """What torch took from the device, including unused blocks. None on a CPU."""


@dataclass(frozen=True)
class Ceiling:
    """What this device reaches in a bare matrix product and a bare copy."""

    matmul_flops: float
    copy_bytes_per_s: float
    """Bytes read plus bytes written."""


class JobFailed(Exception):
    pass


class OutOfMemory(JobFailed):
    pass


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    # There is one process, so the loopback interface is all the network that NCCL needs.
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    if options.device == "cuda" and not torch.cuda.is_available():
        print("torch finds no CUDA device here; pass --device cpu --preset gpt2-nano --steps 5 to try the code path", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="gptline-benchmark-") as folder:
        return Benchmark(options, Path(folder)).run()


class Benchmark:
    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.started_at_s = time.monotonic()
        shape = PretrainSettings(preset=options.preset, seq_len=options.seq_len, steps=1, global_batch_size=1, lr=1.0).shape()
        self.config = GPTConfig(**shape.model_dump(), vocab_size=options.vocab_size)
        n_windows = max(CHECK_BATCH * options.check_steps, options.global_batch_size * (options.warmup_steps + options.steps))
        n_tokens = (min(n_windows, 2**14) + 2) * self.config.seq_len
        self.tokens = write_random_tokens(folder / "tokens", n_tokens=n_tokens, vocab_size=options.vocab_size, seed=SEED)

    def run(self) -> int:
        options = self.options
        ceiling = self._in_own_process(measure_ceiling, options.device)
        self._report(
            report.result(
                "gpu_ceiling",
                unit="TFLOP/s",
                device=self.device,
                ours=ceiling.matmul_flops / 1e12,
                goal=None,
                copy_bytes_per_s=ceiling.copy_bytes_per_s,
                precision="bf16",
            ),
            f"matrix product {ceiling.matmul_flops / 1e12:.3g} TFLOP/s in bf16, copy {ceiling.copy_bytes_per_s / 1e9:.4g} GB/s",
        )
        plain = Variant("gpu_train_torch", "torch")
        reference = self._in_own_process(run_job, self._check_job(plain, "fp32")).losses
        print(f"fp32 reference: loss {reference[0]:.4f} at step 1, {reference[-1]:.4f} at step {len(reference)}", flush=True)

        rows = [self._row(plain, options.micro_batch_sizes, reference, ceiling, until=0.4)]
        for zero_stage in options.zero_stages:
            variant = Variant(f"gpu_train_deepspeed_zero{zero_stage}", "deepspeed", zero_stage=zero_stage)
            if find_spec("deepspeed") is None:
                rows.append(self._failed(variant, "deepspeed is not installed here"))
            else:
                rows.append(self._row(variant, options.micro_batch_sizes, reference, ceiling, until=0.75, peer=rows[0]))
        if options.compile:
            variant = Variant("gpu_train_torch_compile", "torch", compiled=True)
            best = rows[0].get("micro_batch_size") or options.micro_batch_sizes[0]
            sizes = [size for size in (best, 2 * best) if options.global_batch_size % size == 0]
            rows.append(self._row(variant, sizes, reference, ceiling, until=1.0, peer=rows[0]))
        disagreeing = [row["row"] for row in rows if row.get("check") and not row["check"]["agrees"]]
        if disagreeing:
            print(f"the losses of {', '.join(disagreeing)} differ from fp32's by more than the tolerance", file=sys.stderr)
        return 1 if disagreeing or rows[0]["ours"] is None else 0

    def _row(
        self,
        variant: Variant,
        sizes: Sequence[int],
        reference: Sequence[float],
        ceiling: Ceiling,
        *,
        until: float,
        peer: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Check the losses, then try micro-batch sizes and keep the fastest.

        A size after the first is skipped if it might not end by `until`, a share of the budget.
        """
        trials: list[dict[str, Any]] = []
        outcomes: dict[int, Outcome] = {}
        longest_s = 0.0
        try:
            began_at_s = time.monotonic()
            check = _compare(
                self._in_own_process(run_job, self._check_job(variant, self.options.precision)).losses, reference, self.options
            )
            for size in sizes:
                longest_s = max(longest_s, time.monotonic() - began_at_s)
                began_at_s = time.monotonic()
                if outcomes and self._left_s() - longest_s < (1 - until) * self.options.budget_s:
                    trials.append({"micro_batch_size": size, "error": "skipped: it might exceed the time budget"})
                    continue
                if any(trial["micro_batch_size"] < size for trial in trials if trial.get("error") == "out of memory"):
                    continue
                try:
                    outcomes[size] = self._in_own_process(run_job, self._job(variant, size))
                    trials.append({"micro_batch_size": size} | self._speed(outcomes[size], ceiling))
                except OutOfMemory:
                    trials.append({"micro_batch_size": size, "error": "out of memory"})
                print(f"  {variant.row}, micro-batch {size}: {_trial_sentence(trials[-1])}", flush=True)
        except JobFailed as failure:
            if not outcomes:
                return self._failed(variant, str(failure))
            trials.append({"micro_batch_size": size, "error": str(failure)})
        if not outcomes:
            return self._failed(variant, f"no micro-batch of {', '.join(map(str, sizes))} sequences fits")
        best = max(outcomes, key=lambda size: self._speed(outcomes[size], ceiling)["tokens_per_s"])
        speed = self._speed(outcomes[best], ceiling)
        theirs = peer["ours"] if peer else None
        row = report.result(
            variant.row,
            unit="tokens/s",
            device=self.device,
            ours=speed["tokens_per_s"],
            peer="gpu_train_torch" if peer else None,
            theirs=theirs,
            ratio=speed["tokens_per_s"] / theirs if theirs else None,
            goal=0.97 if variant.engine == "deepspeed" else None,
            micro_batch_size=best,
            **speed,
            check=check,
            trials=trials,
            ceiling=vars(ceiling),
            flops_per_token=flops_per_token(self.config),
            config=self._settings(variant, self.options.precision, self.options.global_batch_size, best).model_dump(exclude_none=True),
            vocab_size=self.config.vocab_size,
            timed_steps=self.options.steps,
            warmup_steps=self.options.warmup_steps,
        )
        self._report(row, _sentence(row))
        return row

    def _speed(self, outcome: Outcome, ceiling: Ceiling) -> dict[str, Any]:
        timed = outcome.step_s[self.options.warmup_steps :]
        p10, p50, p90 = (float(value) for value in np.quantile(timed, (0.1, 0.5, 0.9)))
        tokens_per_s = self.options.global_batch_size * self.config.seq_len / p50
        flops = flops_per_token(self.config)
        causal_flops = flops - 6 * self.config.n_layer * self.config.n_embd * self.config.seq_len
        peak = _datasheet_flops(self.device)
        return {
            "tokens_per_s": tokens_per_s,
            "mfu": tokens_per_s * flops / peak if peak else None,
            "mfu_causal": tokens_per_s * causal_flops / peak if peak else None,
            "share_of_measured_matmul": tokens_per_s * flops / ceiling.matmul_flops,
            "peak_allocated_gib": _gib(outcome.peak_allocated_bytes),
            "peak_reserved_gib": _gib(outcome.peak_reserved_bytes),
            "step_s": {"p10": p10, "p50": p50, "p90": p90, "max": max(timed), "n": len(timed)},
            "first_step_s": outcome.step_s[0],
            "setup_s": outcome.setup_s,
        }

    def _check_job(self, variant: Variant, precision: str) -> Job:
        return self._job(variant, CHECK_MICRO_BATCH, precision, CHECK_BATCH, self.options.check_steps)

    def _job(
        self, variant: Variant, micro_batch_size: int, precision: str | None = None, batch: int | None = None, n_steps: int | None = None
    ) -> Job:
        options = self.options
        settings = self._settings(variant, precision or options.precision, batch or options.global_batch_size, micro_batch_size)
        n_steps = n_steps or options.warmup_steps + options.steps
        return Job(variant, settings, self.config.vocab_size, self.tokens, options.device, n_steps, time_s=0.8 * self._left_s())

    def _settings(self, variant: Variant, precision: str, batch: int, micro_batch_size: int) -> PretrainSettings:
        return PretrainSettings.model_validate(
            dict(
                preset=self.options.preset,
                seq_len=self.options.seq_len,
                steps=10_000,
                global_batch_size=batch,
                micro_batch_size=micro_batch_size,
                lr=6e-4,
                warmup_steps=10,
                precision=precision,
                engine=variant.engine,
                zero_stage=variant.zero_stage,
                log_every=1,
                eval_every=10**9,
                checkpoint_every=10**9,
            )
        )

    def _left_s(self) -> float:
        return self.started_at_s + self.options.budget_s - time.monotonic()

    def _in_own_process(self, function: Callable[[Any], T], argument: Any) -> T:
        """Return `function(argument)`, called in a new process. Raise JobFailed if it fails, or if the budget is spent first."""
        left_s = self._left_s()
        if left_s < 1:
            raise JobFailed(f"not started: the budget of {self.options.budget_s:.0f} s is spent; raise --budget-s")
        context = multiprocessing.get_context("spawn")
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_send_result, args=(sender, function, argument))
        process.start()
        sender.close()
        try:
            if not receiver.poll(left_s):
                raise JobFailed(f"stopped unfinished: the budget of {self.options.budget_s:.0f} s is spent; raise --budget-s")
            failure, value = receiver.recv()
            process.join(15)
        except EOFError:
            process.join()
            raise JobFailed(f"its process ended with exit code {process.exitcode}") from None
        finally:
            process.kill()
            process.join()
        if failure is not None:
            raise failure
        return value

    def _failed(self, variant: Variant, reason: str) -> dict[str, Any]:
        row = report.result(variant.row, unit="tokens/s", device=self.device, error=reason)
        self._report(row, f"no result: {reason}")
        return row

    def _report(self, row: Mapping[str, Any], sentence: str) -> None:
        print(f"{row['row']}: {sentence}", flush=True)
        if self.options.out is not None:
            report.write(self.options.out, row)


def run_job(job: Job) -> Outcome:
    """Train for the job's steps with gptline's own loop, from weights drawn with the seed."""
    entered_at_s = time.monotonic()
    device = torch.device(job.device)
    torch.set_float32_matmul_precision("highest")  # the reference is fp32, not TF32

    def make_engine(model: nn.Module, groups: Sequence[Mapping[str, Any]], settings: TrainSettings, *, device: torch.device) -> Engine:
        if job.variant.compiled:
            model.compile(dynamic=False)  # in place: parameters keep their names, and the engine sees a module like any other
        if job.variant.engine == "torch":
            from gpt.torch_engine import TorchEngine

            return TorchEngine(model, groups, settings, device=device)
        from cluster.deepspeed_engine import DeepSpeedEngine

        return DeepSpeedEngine(model, groups, settings, device=device)

    rank = TimedRank(device, make_engine, job.n_steps, stop_at_s=entered_at_s + job.time_s)
    train(rank, job.settings, [job.tokens], TOKENS_DTYPE, job.vocab_size, init=None, seed=SEED, output=job.tokens.parent / "model")
    if len(rank.losses) < job.n_steps:
        raise JobFailed(f"only {len(rank.losses)} of {job.n_steps} steps within {job.time_s:.0f} s; raise --budget-s or lower --steps")
    on_gpu = device.type == "cuda"
    return Outcome(
        losses=rank.losses,
        step_s=rank.step_s(),
        setup_s=rank.began_at_s[0] - entered_at_s,
        peak_allocated_bytes=torch.cuda.max_memory_allocated(device) if on_gpu else None,
        peak_reserved_bytes=torch.cuda.max_memory_reserved(device) if on_gpu else None,
    )


def measure_ceiling(device_name: str) -> Ceiling:
    device = torch.device(device_name)
    on_gpu = device.type == "cuda"
    generator = torch.Generator(device).manual_seed(SEED)
    flops = []
    for size in (4096, 8192, 16384) if on_gpu else (512,):
        # Random numbers, not zeros: a chip that toggles fewer bits draws less power and runs at a higher clock rate.
        a, b = (torch.randn(size, size, device=device, generator=generator).bfloat16() for _ in range(2))
        product_s = _seconds_per_call(partial(torch.mm, a, b, out=torch.empty_like(a)), device)
        flops.append(2 * size**3 / product_s)
    source = torch.randn(2**28 if on_gpu else 2**24, device=device, generator=generator)
    target = torch.empty_like(source)
    copy_s = _seconds_per_call(partial(target.copy_, source), device)
    return Ceiling(matmul_flops=max(flops), copy_bytes_per_s=2 * source.nbytes / copy_s)


def _seconds_per_call(call: Callable[[], Any], device: torch.device) -> float:
    """The median over 7 rounds of 10 calls, after one round that isn't counted."""
    rounds = []
    for _ in range(8):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began_at_s = time.perf_counter()
        for _ in range(10):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        rounds.append((time.perf_counter() - began_at_s) / 10)
    return float(np.median(rounds[1:]))


def _send_result(sender: Any, function: Callable[[Any], Any], argument: Any) -> None:
    try:
        sender.send((None, function(argument)))
    except JobFailed as failure:
        sender.send((failure, None))
    except Exception as error:
        # cuBLAS reports a failed allocation in other words than torch.
        if isinstance(error, torch.cuda.OutOfMemoryError) or "ALLOC_FAILED" in str(error) or "out of memory" in str(error):
            sender.send((OutOfMemory(str(error)[:500]), None))
        else:
            traceback.print_exc()
            sender.send((JobFailed(f"{type(error).__name__}: {error}"[:500]), None))
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _compare(losses: Sequence[float], reference: Sequence[float], options: argparse.Namespace) -> dict[str, Any]:
    differences = [abs(ours - theirs) for ours, theirs in zip(losses, reference, strict=True)]
    tolerance = TOLERANCE[options.precision]
    return {
        "agrees": all(difference <= tolerance for difference in differences),  # NaN does not
        "largest_difference": max(differences),
        "tolerance": tolerance,
        "steps": len(losses),
        "losses": list(losses),
        "fp32_losses": list(reference),
    }


def _trial_sentence(trial: Mapping[str, Any]) -> str:
    return trial.get("error") or f"{trial['tokens_per_s']:,.0f} tokens/s"


def _sentence(row: Mapping[str, Any]) -> str:
    parts = [f"{row['ours']:,.0f} tokens/s", f"micro-batch {row['micro_batch_size']}"]
    if row["mfu"] is not None:
        parts.append(f"MFU {row['mfu']:.1%} of the data sheet's peak ({row['mfu_causal']:.1%} counting causal attention)")
    parts.append(f"{row['share_of_measured_matmul']:.1%} of the measured matrix product")
    if row["peak_allocated_gib"] is not None:
        parts.append(f"peak {row['peak_allocated_gib']:.1f} GiB")
    step = row["step_s"]
    parts.append(f"step {1e3 * step['p50']:.1f} ms (p10 {1e3 * step['p10']:.1f}, p90 {1e3 * step['p90']:.1f}, max {1e3 * step['max']:.1f})")
    if row["ratio"] is not None:
        parts.append(f"{row['ratio']:.3f} of the plain engine")
    check = row["check"]
    verdict = "agrees with" if check["agrees"] else "DIFFERS FROM"
    parts.append(f"{verdict} fp32 over {check['steps']} steps: within {check['largest_difference']:.1e}, {check['tolerance']:.0e} allowed")
    return ", ".join(parts)


def _datasheet_flops(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in DATASHEET_FLOPS if part in name), None)


def _gib(n_bytes: int | None) -> float | None:
    return None if n_bytes is None else n_bytes / 2**30


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--preset", default="gpt2-124m")
    parser.add_argument("--vocab-size", type=int, default=50304)
    parser.add_argument("--seq-len", type=int, default=None, help="by default the preset's")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--global-batch-size", type=int, default=128, help="sequences per step")
    parser.add_argument("--micro-batch-sizes", type=int, nargs="+", default=[32, 16, 64, 8], help="tried in this order")
    parser.add_argument("--zero-stages", type=int, nargs="*", choices=(0, 1, 2, 3), default=[1])
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=None, help="add a row with torch.compile; the default on cuda"
    )
    parser.add_argument("--steps", type=int, default=20, help="timed steps")
    parser.add_argument("--warmup-steps", type=int, default=5)
    parser.add_argument("--check-steps", type=int, default=20, help="steps whose losses are compared with fp32's")
    parser.add_argument("--budget-s", type=float, default=540, help="skip what might not end within this time")
    parser.add_argument(
        "--out", type=Path, default=None, help="folder for the JSON results; by default benchmarks/results on cuda, none on cpu"
    )
    options = parser.parse_args(arguments)
    for size in options.micro_batch_sizes:
        if options.global_batch_size % size:
            parser.error(f"--global-batch-size {options.global_batch_size} is not a multiple of the micro-batch size {size}")
    if options.compile is None:
        options.compile = options.device == "cuda"
    if options.out is None and options.device == "cuda":
        options.out = report.RESULTS
    return options


if __name__ == "__main__":
    sys.exit(main())
