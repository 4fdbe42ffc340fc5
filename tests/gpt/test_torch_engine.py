from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks import as_two_ranks
from torch import nn

from gpt.batching import TrainingBatches, micro_batch_rows
from gpt.losses import lm_loss
from gpt.model import GPT, parameter_groups
from gpt.settings import PRESETS, GPTConfig, TrainSettings
from gpt.torch_engine import TorchEngine

CPU = torch.device("cpu")


def settings(**changes) -> TrainSettings:
    return TrainSettings(**{**dict(steps=10, global_batch_size=4, lr=0.1), **changes})


class Point(nn.Module):
    def __init__(self, *values: float) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.tensor(values))

    def forward(self, slope: torch.Tensor) -> torch.Tensor:
        return (self.values * slope).sum()


def engine_of(point: Point, decay: float = 0.0, **changes) -> TorchEngine:
    return TorchEngine(point, [{"params": list(point.parameters()), "weight_decay": decay}], settings(**changes), device=CPU)


def test_adamws_first_step_is_the_learning_rate_against_the_gradient_after_decay():
    # 2 * (1 - 0.1 * 0.5) - 0.1 = 1.8, whatever the gradient's size.
    point = Point(2.0)
    engine = engine_of(point, decay=0.5)
    engine.backward(engine(torch.tensor([0.3])))
    engine.step(0.1)
    assert point.values.item() == pytest.approx(1.8)


def test_the_norm_before_clipping_is_returned_and_gradients_of_all_passes_add_up():
    # (1, 4) + (2, 0) = (3, 4) has norm 5.
    engine = engine_of(Point(0.0, 0.0), max_grad_norm=1.0)
    engine.backward(engine(torch.tensor([1.0, 4.0])))
    engine.backward(engine(torch.tensor([2.0, 0.0])))
    assert engine.step(0.1) == pytest.approx(5.0)
    engine.backward(engine(torch.tensor([0.6, 0.8])))
    assert engine.step(0.1) == pytest.approx(1.0)  # the step has zeroed the gradients


def test_gradients_are_clipped_to_the_norm():
    # With beta1 0 and beta2 0 a step is lr * g / (|g| + eps): g = 0.5 * (0.6, 0.8) after clipping, so 0.3 / 1.3 and 0.4 / 1.4.
    point = Point(0.0, 0.0)
    engine = engine_of(point, max_grad_norm=0.5, beta1=0.0, beta2=0.0, eps=1.0)
    engine.backward(engine(torch.tensor([3.0, 4.0])))
    engine.step(1.0)
    assert point.values.tolist() == pytest.approx([-0.3 / 1.3, -0.4 / 1.4], rel=1e-4)


def test_a_restored_engine_takes_the_same_steps(tmp_path):
    def steps(engine: TorchEngine, slopes: list[float]) -> None:
        for slope in slopes:
            engine.backward(engine(torch.tensor([slope])))
            engine.step(0.1)

    whole = engine_of(Point(1.0))
    steps(whole, [0.5, -0.2])
    whole.save(tmp_path)
    steps(whole, [0.9, 0.1])
    restored = engine_of(Point(7.0))
    restored.load(tmp_path)
    steps(restored, [0.9, 0.1])
    assert torch.equal(restored.full_weights()["values"], whole.full_weights()["values"])


def test_full_weights_are_a_copy():
    engine = engine_of(Point(1.0))
    engine.full_weights()["values"].zero_()
    assert engine.module.values.item() == 1.0


def test_fp16_on_a_cpu_is_refused():
    with pytest.raises(ValueError, match='set "bf16" or "fp32"'):
        engine_of(Point(1.0), precision="fp16")


def one_step(rank: int, world_size: int, passes: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Take a real model's step over the same global batch. Return the gradient's norm and the new weights."""
    config = GPTConfig(**PRESETS["llama-nano"].model_dump(), vocab_size=40)
    model = GPT(config, torch.Generator().manual_seed(1))
    engine = TorchEngine(model, parameter_groups(model, 0.1), settings(eps=1e-3), device=CPU, world_size=world_size)
    tokens = torch.randint(40, (600,), generator=torch.Generator().manual_seed(2)).numpy()
    data = TrainingBatches([tokens], seq_len=32, global_batch_size=4, seed=1)
    for rows in micro_batch_rows(rank, world_size, 4, passes):
        batch = data.micro_batch(0, rows)
        engine.backward(lm_loss(engine(batch.token_ids), batch.targets, batch.loss_mask, global_count=4 * 32))
    return engine.step(0.01), engine.full_weights()


def splits_of_two(rank: int, folder: str) -> None:
    splits = [one_step(rank, 2, passes) for passes in (1, 2)]
    if rank == 0:
        torch.save(splits, Path(folder) / "splits.pt")


def test_splitting_a_batch_over_micro_batches_and_ranks_changes_a_step_only_by_rounding(tmp_path):
    norm, weights = one_step(0, 1, 1)
    as_two_ranks(splits_of_two, tmp_path)
    for split_norm, split_weights in [one_step(0, 1, 2), one_step(0, 1, 4), *torch.load(tmp_path / "splits.pt")]:
        assert split_norm == pytest.approx(norm, rel=1e-5)
        for name, tensor in weights.items():
            torch.testing.assert_close(split_weights[name], tensor, rtol=0, atol=1e-5)
