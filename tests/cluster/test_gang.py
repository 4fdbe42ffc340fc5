"""Gangs on a real Ray session: their ranks agree, survive deaths and hangs, stop at exceptions, and leave nothing behind."""

from __future__ import annotations

import importlib
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rank_functions
import torch

from cluster import checkpoint
from cluster.deepspeed_engine import DeepSpeedEngine
from cluster.events import Curves, GangStarted, Notice, Points, Restart, Stacks, StageEvent, Waiting
from cluster.failures import GangFailure
from cluster.gang import run_gang, run_inline
from cluster.gang_spec import GangResult, GangSpec
from cluster.room import Room, shortfall
from gpt.torch_engine import TorchEngine

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]

ENGINES = {"torch": TorchEngine, "deepspeed": DeepSpeedEngine}


class Gang:
    def __init__(self, folder: Path, *, ranks: int = 2, engine: str = "torch", **spec: Any) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.events: list[StageEvent] = []
        self.spec = GangSpec(
            name="pretrain", ranks=ranks, make_engine=ENGINES[engine], work=folder / "work", identity={"engine": engine}, **spec
        )

    def run(self, function: Callable[..., Any], *arguments: Any, should_stop: Callable[[], bool] = lambda: False) -> GangResult:
        return run_gang(function, arguments, spec=self.spec, on_event=self.events.append, should_stop=should_stop)

    def train(self, fault: str = "", should_stop: Callable[[], bool] = lambda: False, **changes: Any) -> GangResult:
        return self.run(rank_functions.train, rank_functions.settings(**changes), str(self.folder), fault, should_stop=should_stop)

    def train_inline(self) -> GangResult:
        arguments = (rank_functions.settings(), str(self.folder))
        return run_inline(rank_functions.train, arguments, spec=self.spec, on_event=self.events.append, should_stop=lambda: False)

    def weights(self) -> dict[str, torch.Tensor]:
        return torch.load(self.folder / "weights.pt", weights_only=True)

    def notices(self, kind: type[Notice]) -> list[str]:
        return [event.text for event in self.events if type(event) is kind]


def values(history: Curves) -> dict[str, list[tuple[int, float]]]:
    """The curves without the times, which no two runs share."""
    return {name: [(point.step, point.value) for point in points] for name, points in history.items()}


def all_cpus_are_free() -> bool:
    import ray

    until_s = time.monotonic() + 10
    while time.monotonic() < until_s:
        if ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"]:
            return True
        time.sleep(0.1)
    return False


def test_two_ranks_sum_1_and_2_to_3_and_each_uses_the_threads_requested(tmp_path: Path) -> None:
    gang = Gang(tmp_path)
    result = gang.run(rank_functions.add_ranks)
    assert result.value["total"] == [3.0, 20.0]
    assert (result.value["threads"], result.value["omp"]) == (1, "1")
    assert values(result.history) == {"eval/ranks": [(1, 2.0)], "eval/first": [(1, 7.0)]}
    assert [event.curves for event in gang.events if isinstance(event, Points)] == [result.history]
    assert re.fullmatch(r"started rank 0 \(pid \d+, node \S+\), rank 1 \(pid \d+, node \S+\)", gang.notices(GangStarted)[0])
    assert all_cpus_are_free()


def test_four_ranks_on_a_cluster_with_two_cpus_are_refused_at_once(tmp_path: Path) -> None:
    gang = Gang(tmp_path, ranks=4)
    with pytest.raises(GangFailure) as failure:
        gang.run(rank_functions.add_ranks)
    assert gang.events == []  # it did not wait
    assert str(failure.value).startswith(
        "pretrain asks for 4 ranks of 1 CPU, but the cluster has room for only 2 of them (2 CPUs, 0 GPUs and "
    )
    assert failure.value.cause == "resources"
    assert not (tmp_path / "work").exists()


def test_labels_and_gpus_that_no_node_has_are_refused(tmp_path: Path) -> None:
    with pytest.raises(GangFailure, match=r"1 CPU, 1 GPU and labels \{'tier': 'a100'\}, but no node .* 0 with these labels"):
        Gang(tmp_path, ranks=1, gpus_per_rank=1, labels={"tier": "a100"}).run(rank_functions.add_ranks)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rank_killed_in_the_middle_of_a_step_changes_no_bit_of_the_result(tmp_path: Path, ranks: int) -> None:
    undisturbed = Gang(tmp_path / "undisturbed", ranks=ranks, engine="deepspeed")
    # One rank gives the same bits in this process as in a gang.
    whole = undisturbed.train() if ranks > 1 else undisturbed.train_inline()
    killed = Gang(tmp_path / "killed", ranks=ranks, engine="deepspeed")
    result = killed.train(f"kill:{ranks - 1}:5")
    assert (result.restarts, result.resumed_from_step) == (1, 4)
    for name, weight in undisturbed.weights().items():
        assert torch.equal(weight, killed.weights()[name]), name
    assert values(result.history) == values(whole.history)
    (text,) = killed.notices(Restart)
    pattern = rf"rank {ranks - 1} \(pid \d+, node \S+\) was killed by SIGKILL at step [45]; start 2 of 3 resumes at step 4"
    assert re.fullmatch(pattern, text), text
    assert {path.name for path in (tmp_path / "killed" / "work").iterdir()} == {"1.1", "1.2"}


def test_an_exception_names_its_rank_and_is_not_retried(tmp_path: Path) -> None:
    gang = Gang(tmp_path)
    with pytest.raises(GangFailure) as failure:
        gang.train("raise:1:5")
    assert "rank 1 (pid " in str(failure.value)
    assert "raised at step 5: ValueError: the data of step 5 has no end ask for less" in str(failure.value)
    assert (failure.value.rank, failure.value.cause) == (1, "exception")
    assert "in _strike" in failure.value.traceback
    assert gang.notices(Restart) == []
    assert all_cpus_are_free()


def test_a_crash_in_native_code_is_distinguished_from_a_kill(tmp_path: Path) -> None:
    gang = Gang(tmp_path, max_restarts=0)
    with pytest.raises(GangFailure, match=r"crashed \(.* Segmentation fault\) at step [01]; .* start 1 of 1: run again to begin at step 0"):
        gang.train("crash:0:1")


DID = r"(did not finish|kept rank 0 \(pid .*\) from finishing)"
"""Which of two ranks entered its section first, and so is late first, is a matter of chance."""


def test_a_hung_rank_is_found_by_its_deadline_and_its_stack_is_reported(tmp_path: Path) -> None:
    gang = Gang(tmp_path)
    result = gang.train("sleep:1:5", step_deadline_s=5)
    assert (result.restarts, result.resumed_from_step) == (1, 4)
    (text,) = gang.notices(Restart)
    assert re.match(rf"rank 1 \(pid .*\) {DID} section 'step' within 5 s at step 5; start 2 of 3 resumes at step 4", text)
    waiting, sleeping = gang.notices(Stacks)
    assert "in all_reduce" in waiting
    assert "in _strike" in sleeping


def test_a_rank_that_hangs_between_sections_is_found_by_the_deadline_of_the_last_one(tmp_path: Path) -> None:
    gang = Gang(tmp_path, max_restarts=0)
    with pytest.raises(GangFailure, match=rf"rank 1 \(pid .*\) {DID} section 'after step' within 3 s at step 0; that was start 1"):
        gang.run(rank_functions.hang_between_sections)


def test_the_gang_restarts_when_a_rank_dies_during_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.gang_launch.RankProcess", rank_functions.KilledAtStart)
    gang = Gang(tmp_path)
    result = gang.run(rank_functions.add_ranks)
    assert (result.value["total"], result.restarts) == ([3.0, 20.0], 1)
    assert gang.notices(Restart) == [
        "rank 1 was killed by SIGKILL at step 0; start 2 of 3 begins at step 0, since there is no checkpoint yet"
    ]


def test_a_rank_that_does_not_start_before_the_deadline_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.gang_launch.RankProcess", rank_functions.SilentAtStart)
    with pytest.raises(GangFailure, match=r"rank 1 did not start within start_deadline_s = 15; that was start 1 of 1") as failure:
        Gang(tmp_path, max_restarts=0, start_deadline_s=15).run(rank_functions.add_ranks)
    assert failure.value.cause == "deadline"
    assert all_cpus_are_free()


def test_an_actor_that_raises_in_its_constructor_is_not_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.gang_launch.RankProcess", rank_functions.RefusesToStart)
    with pytest.raises(GangFailure, match=r"rank [01] raised at step 0: ImportError: libcuda\.so is missing on this node$") as failure:
        Gang(tmp_path).run(rank_functions.add_ranks)
    assert failure.value.cause == "exception"


def test_a_function_that_ranks_cannot_import_is_an_exception_not_a_death(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "only_the_driver_knows.py").write_text("def function(rank): return {}\n")
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("only_the_driver_knows")
    gang = Gang(tmp_path)
    with pytest.raises(GangFailure, match=r"raised at step 0: ModuleNotFoundError: No module named 'only_the_driver_knows'$") as failure:
        gang.run(module.function)
    assert failure.value.cause == "exception"
    assert gang.notices(Restart) == []


def test_a_stopped_gang_saves_and_resumes_only_with_as_many_ranks(tmp_path: Path) -> None:
    gang = Gang(tmp_path)
    stopped = gang.train(should_stop=lambda: any(isinstance(event, Points) for event in gang.events), steps=100_000)
    assert (stopped.stopped, stopped.value) == (True, None)
    found, _ = checkpoint.newest_checkpoint(checkpoint.attempts(gang.spec.work, 1))
    assert found is not None
    assert found.step == stopped.history["train/loss"][-1].step
    single = Gang(tmp_path, ranks=1)
    with pytest.raises(GangFailure, match="made with ranks = 2, but this run asks for ranks = 1"):
        single.train()
    assert single.events == []
    resumed = gang.train(steps=found.step + 2)
    assert (resumed.resumed_from_step, resumed.value) == (found.step, {"steps": found.step + 2})


def test_a_wait_for_resources_ends_when_the_cluster_no_longer_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def found_at_first(room: Room) -> str | None:
        seen.append(room)
        return None if len(seen) == 1 else shortfall(room)

    monkeypatch.setattr("cluster.gang.shortfall", found_at_first)
    monkeypatch.setattr("cluster.room.shortfall", found_at_first)
    assert all_cpus_are_free()
    gang = Gang(tmp_path, ranks=4, start_deadline_s=2)
    with pytest.raises(GangFailure, match=r"room for only 2 of them .* none replaced it within start_deadline_s = 2$") as failure:
        gang.run(rank_functions.add_ranks)
    assert failure.value.cause == "resources"
    (text,) = gang.notices(Waiting)
    assert re.fullmatch(r"waiting for 4 ranks of 1 CPU \(free now: 2 of 2 CPUs on \S+\)", text)
    assert all_cpus_are_free()
