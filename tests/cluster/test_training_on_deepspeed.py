"""RL and reward model training on DeepSpeed's engine, two ranks over gloo, against the plain engine on one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import training_functions
from process_functions import largest_difference
from training_functions import REWARD_STAGES, RL_STAGES, make_inputs, train_reward_model, train_rl

from gpt.torch_engine import TorchEngine

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("training")
    make_inputs(path)
    return path


@pytest.fixture(scope="module")
def sharded(folder: Path) -> dict[str, Any]:
    """The results of two ranks with DeepSpeed's engine."""
    torch.multiprocessing.spawn(training_functions.main, args=(2, str(folder)), nprocs=2)
    return torch.load(folder / "results.pt", weights_only=True)


@pytest.fixture(scope="module")
def plain_rl(folder: Path) -> dict[str, Any]:
    return train_rl(folder, "rl-plain", 0, 1, TorchEngine)


@pytest.fixture(scope="module")
def plain_reward(folder: Path) -> dict[str, Any]:
    return train_reward_model(folder, "reward-plain", 0, 1, TorchEngine)


@pytest.mark.parametrize("stage", RL_STAGES)
def test_two_steps_of_ppo_move_policy_and_value_model_as_the_plain_engine_does(
    stage: int, folder: Path, sharded: dict[str, Any], plain_rl: dict[str, Any]
) -> None:
    before, mine = training_functions.first_policy(folder), sharded[f"rl {stage}"]
    assert largest_difference(before, plain_rl["weights"]) > 1e-2
    assert largest_difference(mine["weights"], plain_rl["weights"]) < 1e-5
    assert mine["metadata"]["figures"] == pytest.approx(plain_rl["metadata"]["figures"], abs=1e-4)
    assert 0 < mine["points"]["rollout/truncated_share", 1] < 1
    assert mine["points"]["train/ratio_first", 1] == mine["points"]["train/ratio_first", 2] == 0.0
    assert mine["points"]["train/value_loss", 2] == pytest.approx(plain_rl["points"]["train/value_loss", 2], abs=1e-5)


@pytest.mark.parametrize("stage", RL_STAGES)
def test_policy_and_value_model_stopped_after_the_first_step_resume_to_the_same_bits(stage: int, sharded: dict[str, Any]) -> None:
    whole, resumed = sharded[f"rl {stage}"], sharded[f"resumed {stage}"]
    assert largest_difference(whole["weights"], resumed["weights"]) == 0.0
    assert resumed["points"] == whole["points"]
    assert resumed["metadata"] == whole["metadata"]


@pytest.mark.parametrize("stage", RL_STAGES)
def test_in_bf16_the_policy_begins_as_its_reference_and_learns_nothing_from_equal_scores(
    stage: int, folder: Path, sharded: dict[str, Any]
) -> None:
    alike = sharded[f"alike {stage}"]
    assert alike["points"]["rollout/kl_k1_nats_per_response", 1] == 0.0
    assert alike["points"]["train/ratio_first", 1] == 0.0
    for name, weight in training_functions.first_policy(folder).items():
        # Under ZeRO 1 and 2 the masters are copies of weights that were cast.
        assert torch.equal(alike["weights"][name], weight.bfloat16().float() if stage else weight), name


@pytest.mark.parametrize("stage", REWARD_STAGES)
def test_a_reward_model_learns_the_same_pairs_to_the_same_weights_and_scale(
    stage: int, folder: Path, sharded: dict[str, Any], plain_reward: dict[str, Any]
) -> None:
    mine = sharded[f"reward {stage}"]
    assert largest_difference(mine["weights"], plain_reward["weights"]) < 1e-5
    assert mine["metadata"].pop("figures") == pytest.approx(plain_reward["metadata"]["figures"])
    for name in ("score_mean", "score_std"):
        assert mine["metadata"][name] == pytest.approx(plain_reward["metadata"][name], abs=1e-4)
    written = training_functions.written(folder, f"reward-{stage}")
    assert all(torch.equal(weight, mine["weights"][name]) for name, weight in written.items())
