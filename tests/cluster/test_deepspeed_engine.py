"""DeepSpeed against the plain torch engine, two ranks over gloo, tied weights: ZeRO changes where state is kept, not the result."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import process_functions
import pytest
import rank_functions
import torch
from process_functions import case_name, largest_difference, without_key_biases

from cluster.deepspeed_engine import DeepSpeedEngine

CASES: list[dict[str, Any]] = [
    *({"precision": "fp32", "zero_stage": stage} for stage in (0, 1, 2, 3)),
    *({"precision": "bf16", "zero_stage": stage} for stage in (0, 1, 2, 3)),
    *({"precision": "fp32", "zero_stage": stage, "offload": True} for stage in (1, 3)),
]
# fp32: only rounding. bf16: DeepSpeed's ZeRO 1 to 3 keep bf16 weights under fp32 masters, where autocast keeps fp32 weights.
LARGEST_DIFFERENCE = {"fp32": 1e-5, "bf16": 2e-2}
LARGEST_NORM_DIFFERENCE = {"fp32": 1e-5, "bf16": 5e-2}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of both ranks."""
    folder = tmp_path_factory.mktemp("deepspeed")
    torch.multiprocessing.spawn(process_functions.main, args=(2, str(folder / "rendezvous"), CASES, str(folder)), nprocs=2)
    return [torch.load(folder / f"results-{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_fifty_steps_agree_with_the_plain_engine(case: dict[str, Any], results: list[dict[str, Any]]) -> None:
    of = results[0][case_name(case)]
    assert set(of["sharded"]["weights"]) == set(of["plain"]["weights"])
    sharded, plain = (without_key_biases(of[engine]["weights"]) for engine in ("sharded", "plain"))
    assert largest_difference(sharded, plain) < LARGEST_DIFFERENCE[case["precision"]]
    norms = torch.tensor([of["sharded"]["norms"], of["plain"]["norms"]])
    assert (norms[0] - norms[1]).abs().max() < LARGEST_NORM_DIFFERENCE[case["precision"]]
    assert (norms > process_functions.MAX_NORM).any(), "a norm above max_grad_norm shows that it is the one before clipping"


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_every_tensor_moves_and_all_ranks_see_the_same_weights(case: dict[str, Any], results: list[dict[str, Any]]) -> None:
    first = {name: parameter.detach() for name, parameter in process_functions.first_model().named_parameters()}
    mine, theirs = (of[case_name(case)]["sharded"]["weights"] for of in results)
    for name, weight in mine.items():
        assert (weight.dtype, weight.device.type) == (torch.float32, "cpu")
        assert not torch.equal(weight, first[name]), f"{name} did not move"
        assert torch.equal(weight, theirs[name]), f"{name} differs between ranks"


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_an_engine_saved_and_loaded_continues_to_the_same_bits(case: dict[str, Any], results: list[dict[str, Any]]) -> None:
    of = results[0][case_name(case)]
    assert largest_difference(of["sharded"]["weights"], of["resumed"]["weights"]) == 0.0
    assert of["sharded"]["norms"][process_functions.SAVED_AFTER :] == of["resumed"]["norms"]


def make_engine(**changes: Any) -> DeepSpeedEngine:
    model = rank_functions.small_model()
    return DeepSpeedEngine(
        model, rank_functions.parameter_groups(model), rank_functions.settings(**changes), device=torch.device("cpu"), world_size=1
    )


def test_fp16_on_a_cpu_and_offload_without_sharding_are_refused() -> None:
    with pytest.raises(ValueError, match=r'precision = "fp16" needs a GPU'):
        make_engine(precision="fp16")
    with pytest.raises(ValueError, match="offload = true needs zero_stage 1, 2 or 3, found 0"):
        make_engine(offload=True, zero_stage=0)


@pytest.mark.slow
def test_a_single_process_needs_no_process_group_and_an_empty_folder_is_refused(tmp_path: Path) -> None:
    engine = make_engine(zero_stage=2)
    loss = engine(torch.ones(4, 5)).pow(2).sum()
    engine.backward(loss)
    assert engine.step(0.01) > 1.0
    with pytest.raises(ValueError, match="holds no state that DeepSpeed can load"):
        engine.load(tmp_path)


@pytest.mark.slow
def test_a_full_disk_is_reported_after_the_barriers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(zero_stage=1)
    monkeypatch.setattr(torch, "save", _full)
    with pytest.raises(OSError, match="No space left"):
        engine.save(tmp_path)
    monkeypatch.undo()
    engine.save(tmp_path)
    make_engine(zero_stage=1).load(tmp_path)


def _full(*arguments: Any, **options: Any) -> None:
    raise OSError(28, "No space left on device")


def test_importing_deepspeed_leaves_mlflow_out_and_user_code_can_still_import_it() -> None:
    lines = (
        "import sys, torch",
        "from cluster.deepspeed_engine import _import_deepspeed",
        "_import_deepspeed(torch.device('cpu'))",
        "assert 'deepspeed' in sys.modules and 'mlflow' not in sys.modules",
        "import mlflow",
        "assert mlflow.__version__",
    )
    subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=Path(__file__).parents[2], check=True)
