"""The benchmarks' code paths, as far as a CPU can run them; the figures measured here mean nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FIELDS = {"row", "peer", "ratio", "goal", "unit", "ours", "theirs", "hardware", "versions", "date"}


def run(module: str, *arguments: str, out: Path) -> dict[str, dict]:
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments, "--out", str(out)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    rows = [json.loads(path.read_text()) for path in sorted(out.iterdir())]
    assert all(row.keys() >= FIELDS for row in rows)
    return {row["row"]: row for row in rows}


def test_the_readme_table_shows_the_kept_results() -> None:
    checked = subprocess.run([sys.executable, "-m", "benchmarks.table", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_both_engines_in_bf16_have_the_losses_of_fp32(tmp_path: Path) -> None:
    shape = ["--preset", "gpt2-nano", "--vocab-size", "512", "--global-batch-size", "4", "--micro-batch-sizes", "2"]
    lengths = ["--steps", "5", "--warmup-steps", "1"]
    rows = run("gpu", "--device", "cpu", *shape, *lengths, out=tmp_path)

    expected = {"gpu_train_torch"} | ({"gpu_train_deepspeed_zero1"} if find_spec("deepspeed") else set())
    for name in expected:
        check = rows[name]["check"]
        assert len(check["losses"]) == 20
        assert check["agrees"], check
        assert check["fp32_losses"][-1] < check["fp32_losses"][0] - 0.05  # they moved, so their agreement means something
        assert rows[name]["ours"] > 0
        assert rows[name]["step_s"]["n"] == 5
        assert rows[name]["config"]["precision"] == "bf16"
    assert rows["gpu_ceiling"]["ours"] > 0


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_the_plain_loop_has_our_losses(tmp_path: Path) -> None:
    rows = run("train_step", "--rounds", "2", "--steps", "3", "--warmup-steps", "1", out=tmp_path)

    row = rows["train_step"]
    assert max(row["largest_loss_difference"].values()) < 1e-4
    assert len(row["peers"]) == 2
    assert row["ratio"] == min(peer["ratio"] for peer in row["peers"])


def test_a_plan_is_timed_on_two_stores_on_which_it_decides_alike(tmp_path: Path) -> None:
    row = run("plan_store", "--actions", "3", "5", "--rounds", "2", "--goal", "0", out=tmp_path)["plan_store"]

    assert (row["actions"], row["rounds"], row["unit"]) == (5, 2, "ms")
    assert row["ratio"] == pytest.approx(row["theirs"] / row["ours"])
