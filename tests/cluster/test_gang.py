"""Gangs on a real Ray session: they agree, survive deaths and hangs, give up on errors, and leave nothing behind."""

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
from cluster.events import Curves, Notice, Points, Restart, Stacks, StageEvent, Waiting
from cluster.gang import GangFailure, GangResult, GangSpec, Room, held_up_by, run_gang, run_inline, shortfall
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


def all_room_is_free() -> bool:
    import ray

    until_s = time.monotonic() + 10
    while time.monotonic() < until_s:
        if ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"]:
            return True
        time.sleep(0.1)
    return False


def test_two_ranks_see_each_other_with_the_threads_that_were_asked_for(tmp_path: Path) -> None:
    gang = Gang(tmp_path)
    result = gang.run(rank_functions.add_ranks)
    assert result.value["total"] == [3.0, 20.0]
    assert (result.value["threads"], result.value["omp"]) == (1, "1")
    assert values(result.history) == {"eval/ranks": [(1, 2.0)], "eval/first": [(1, 7.0)]}
    assert [event.curves for event in gang.events if isinstance(event, Points)] == [result.history]
    assert all_room_is_free()


def test_more_ranks_than_the_cluster_holds_are_refused_at_once(tmp_path: Path) -> None:
    gang = Gang(tmp_path, ranks=4)
    with pytest.raises(GangFailure) as failure:
        gang.run(rank_functions.add_ranks)
    assert gang.events == []  # nothing was waited for
    assert str(failure.value).startswith("pretrain asks for 4 ranks of 1 CPU: the cluster has room for 2 of them (2 CPUs, 0 GPUs")
    assert failure.value.cause == "resources"
    assert not (tmp_path / "work").exists()


def test_labels_and_gpus_that_no_node_has_are_refused_too(tmp_path: Path) -> None:
    with pytest.raises(GangFailure, match=r"1 rank of 1 CPU and 1 GPU and labels \{'tier': 'a100'\}: .* 0 of them with these labels"):
        Gang(tmp_path, ranks=1, gpus_per_rank=1, labels={"tier": "a100"}).run(rank_functions.add_ranks)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rank_killed_in_mid_step_costs_no_bit_of_the_result(tmp_path: Path, ranks: int) -> None:
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
    pattern = rf"pretrain: rank {ranks - 1} \(pid \d+, node \S+\) killed by SIGKILL at step [45]; start 2 of 3 resumes at step 4"
    assert re.fullmatch(pattern, text), text
    assert {path.name for path in (tmp_path / "killed" / "work").iterdir()} == {"1.1", "1.2"}


def test_an_exception_names_its_rank_and_is_not_tried_again(tmp_path: Path) -> None:
    gang = Gang(tmp_path)
    with pytest.raises(GangFailure) as failure:
        gang.train("raise:1:5")
    assert "rank 1 (pid " in str(failure.value)
    assert "raised at step 5: ValueError: the data of step 5 has no end ask for less" in str(failure.value)
    assert (failure.value.rank, failure.value.cause) == (1, "exception")
    assert "in _strike" in failure.value.traceback
    assert gang.notices(Restart) == []
    assert all_room_is_free()


def test_a_crash_in_native_code_is_told_from_a_kill(tmp_path: Path) -> None:
    gang = Gang(tmp_path, max_restarts=0)
    with pytest.raises(GangFailure, match=r"crashed \(Fatal Python error: Segmentation fault\) at step [01]; that was start 1 of 1"):
        gang.train("crash:0:1")


DID = r"(did not finish|kept rank 0 \(pid .*\) from finishing)"
"""Which of two ranks began its section first is a matter of chance, and with it which is late first."""


def test_who_waits_in_a_collective_waits_for_those_who_do_not_be_they_late_or_not() -> None:
    waiting, sleeping = 'File "distributed_c10d.py" in all_reduce', 'File "loop.py" in _strike'
    assert held_up_by([0, 1], {0: waiting, 1: sleeping}) == [1]
    assert held_up_by([0], {0: waiting, 1: sleeping}) == [1]
    assert held_up_by([0, 1], {0: sleeping, 1: sleeping}) == [0, 1]
    assert held_up_by([0, 1], {0: waiting, 1: waiting}) == [0, 1]


def test_a_hung_rank_is_found_by_its_deadline_and_its_stack_is_told(tmp_path: Path) -> None:
    gang = Gang(tmp_path)
    result = gang.train("sleep:1:5", step_deadline_s=5)
    assert (result.restarts, result.resumed_from_step) == (1, 4)
    (text,) = gang.notices(Restart)
    assert re.match(rf"pretrain: rank 1 \(pid .*\) {DID} section 'step' within its 5 s at step 5; start 2 of 3 resumes at step 4", text)
    waiting, sleeping = gang.notices(Stacks)
    assert "in all_reduce" in waiting
    assert "in _strike" in sleeping


def test_a_rank_that_hangs_between_sections_is_found_by_the_last_ones_deadline(tmp_path: Path) -> None:
    gang = Gang(tmp_path, max_restarts=0)
    with pytest.raises(GangFailure, match=rf"rank 1 \(pid .*\) {DID} section 'after step' within its 3 s at step 0; that was start 1"):
        gang.run(rank_functions.hang_between_sections)


def test_a_rank_that_dies_as_the_gang_starts_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.gang._RankProcess", rank_functions.KilledAtStart)
    gang = Gang(tmp_path)
    result = gang.run(rank_functions.add_ranks)
    assert (result.value["total"], result.restarts) == ([3.0, 20.0], 1)
    assert gang.notices(Restart) == [
        "pretrain: rank 1 killed by SIGKILL at step 0; start 2 of 3 begins at step 0, there being no checkpoint"
    ]


def test_a_rank_that_never_comes_up_is_named_after_the_starts_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.gang._RankProcess", rank_functions.SilentAtStart)
    with pytest.raises(GangFailure, match=r"rank 1 did not come up within the 15 s of start_deadline_s; that was start 1 of 1") as failure:
        Gang(tmp_path, max_restarts=0, start_deadline_s=15).run(rank_functions.add_ranks)
    assert failure.value.cause == "deadline"
    assert all_room_is_free()


def test_a_rank_that_can_not_be_made_says_why_and_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.gang._RankProcess", rank_functions.RefusesToStart)
    with pytest.raises(GangFailure, match=r"rank [01] raised at step 0: ImportError: libcuda\.so is missing on this node$") as failure:
        Gang(tmp_path).run(rank_functions.add_ranks)
    assert failure.value.cause == "exception"


def test_a_function_that_the_ranks_can_not_import_is_an_exception_and_no_death(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "only_the_driver_knows.py").write_text("def function(rank): return {}\n")
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("only_the_driver_knows")
    gang = Gang(tmp_path)
    with pytest.raises(GangFailure, match=r"raised at step 0: ModuleNotFoundError: No module named 'only_the_driver_knows'$") as failure:
        gang.run(module.function)
    assert failure.value.cause == "exception"
    assert gang.notices(Restart) == []


def test_asked_to_stop_it_saves_and_goes_on_later_with_as_many_ranks(tmp_path: Path) -> None:
    gang = Gang(tmp_path)
    stopped = gang.train(should_stop=lambda: any(isinstance(event, Points) for event in gang.events), steps=100_000)
    assert (stopped.stopped, stopped.value) == (True, None)
    found, _ = checkpoint.newest_checkpoint(checkpoint.attempts(gang.spec.work, 1))
    assert found is not None
    assert found.step == stopped.history["train/loss"][-1].step
    alone = Gang(tmp_path, ranks=1)
    with pytest.raises(GangFailure, match="made with ranks = 2 and this run asks for ranks = 1"):
        alone.train()
    assert alone.events == []
    resumed = gang.train(steps=found.step + 2)
    assert (resumed.resumed_from_step, resumed.value) == (found.step, {"steps": found.step + 2})


def test_room_that_is_lost_while_it_is_waited_for_is_not_waited_for_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def first_there(room: Room) -> str | None:
        seen.append(room)
        return None if len(seen) == 1 else shortfall(room)

    monkeypatch.setattr("cluster.gang.shortfall", first_there)
    assert all_room_is_free()
    gang = Gang(tmp_path, ranks=4, start_deadline_s=2)
    with pytest.raises(
        GangFailure, match=r"^pretrain asks for 4 ranks .* has room for 2 of them .* \(waited 2 s of start_deadline_s\)"
    ) as failure:
        gang.run(rank_functions.add_ranks)
    assert failure.value.cause == "resources"
    assert gang.notices(Waiting) == ["pretrain: waits for room for 4 ranks of 1 CPU; free now: 2 CPUs, 0 GPUs"]
    assert all_room_is_free()
