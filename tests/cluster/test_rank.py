"""A single inline rank: exact resume, checkpoints when writing or reading fails, metrics, stopping."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rank_functions
import torch

from cluster import checkpoint
from cluster.events import Curves, Notice, Points, Progress, StageEvent
from cluster.failures import GangFailure
from cluster.gang import run_inline
from cluster.gang_spec import GangResult, GangSpec
from cluster.rank import ProcessRank
from gpt.torch_engine import TorchEngine

Weights = dict[str, torch.Tensor]


class Run:
    """A stage's folder in which `train` can be run inline several times."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.events: list[StageEvent] = []
        self.spec = GangSpec(name="pretrain", make_engine=TorchEngine, work=folder / "work", identity={"engine": "torch"})

    def start(self, should_stop: Callable[[], bool] = lambda: False, **changes: Any) -> GangResult:
        arguments = (rank_functions.settings(**changes), str(self.folder))
        return run_inline(rank_functions.train, arguments, spec=self.spec, on_event=self.events.append, should_stop=should_stop)

    def weights(self) -> Weights:
        return torch.load(self.folder / "weights.pt", weights_only=True)

    def notices(self) -> list[str]:
        return [event.text for event in self.events if isinstance(event, Notice)]


def equal(a: Weights, b: Weights) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def stop_after(steps: int) -> Callable[[], bool]:
    """A stop request that is first answered yes at this step: `train` asks once per step."""
    asked = iter(range(1, 1000))
    return lambda: next(asked) >= steps


def values(history: Curves) -> dict[str, list[tuple[int, float]]]:
    """The curves without the times, which no two runs share."""
    return {name: [(point.step, point.value) for point in points] for name, points in history.items()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Weights, GangResult]:
    run = Run(tmp_path_factory.mktemp("undisturbed"))
    result = run.start()
    return run.weights(), result


@pytest.mark.parametrize("steps", range(1, 10))
def test_training_stopped_after_any_step_resumes_to_the_same_bits_and_curves(
    tmp_path: Path, steps: int, undisturbed: tuple[Weights, GangResult]
) -> None:
    run = Run(tmp_path)
    stopped = run.start(stop_after(steps))
    assert (stopped.stopped, stopped.value) == (True, None)
    torch.manual_seed(999)
    resumed = run.start()
    assert (resumed.resumed_from_step, resumed.stopped) == (steps, False)
    assert equal(run.weights(), undisturbed[0])
    assert values(resumed.history) == values(undisturbed[1].history)
    assert {name: points[:steps] for name, points in resumed.history.items()} == stopped.history


def test_a_checkpoint_keeps_its_points_as_a_list_in_the_order_logged(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.start(stop_after(2))
    points = json.loads((run.spec.work / "1.1" / "step-00000002" / "history.json").read_text())
    assert [(name, step) for name, step, _, _ in points] == [("train/loss", 1), ("train/lr", 1), ("train/loss", 2), ("train/lr", 2)]
    assert [type(part) for part in points[0]] == [str, int, float, int]


def test_without_the_random_states_the_bits_would_differ(
    tmp_path: Path, undisturbed: tuple[Weights, GangResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path)
    run.start(stop_after(5))
    monkeypatch.setattr("cluster.rank_checkpoint.set_random_states", lambda states: None)
    run.start()
    assert not equal(run.weights(), undisturbed[0])


def test_a_flipped_bit_in_the_newest_checkpoint_costs_steps_but_not_the_result(
    tmp_path: Path, undisturbed: tuple[Weights, GangResult]
) -> None:
    run = Run(tmp_path)
    run.start(stop_after(7))
    newest = run.spec.work / "1.1" / "step-00000007" / "policy" / "torch_engine.pt"
    data = bytearray(newest.read_bytes())
    data[1000] ^= 1
    newest.write_bytes(data)
    assert run.start().resumed_from_step == 6
    assert "step-00000007: it is damaged (policy/torch_engine.pt has sha256" in run.notices()[0]
    assert equal(run.weights(), undisturbed[0])


def test_a_stage_whose_checkpoints_are_all_damaged_does_not_silently_start_from_scratch(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.start(stop_after(3))
    for file in run.spec.work.rglob("history.json"):
        file.unlink()
    with pytest.raises(GangFailure, match=r"no checkpoint can be read .*history.json is missing.*run again with --fresh pretrain"):
        run.start()


def test_damage_after_a_checkpoint_was_chosen_is_found_before_unpickling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path)
    run.start(stop_after(3))
    found, _ = checkpoint.newest_checkpoint([run.spec.work / "1.1"])
    assert found is not None
    (found.folder / "policy" / "torch_engine.pt").write_bytes(b"\x80\x04 other bytes")
    monkeypatch.setattr("cluster.checkpoint.newest_checkpoint", lambda folders: (found, []))
    monkeypatch.setattr(TorchEngine, "load", lambda self, folder: pytest.fail("it was loaded"))
    with pytest.raises(ValueError, match=r"is damaged and was not loaded: policy/torch_engine\.pt has"):
        run.start()


def test_a_checkpoint_of_another_engine_is_refused_before_the_start(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.start(stop_after(3))
    run.spec = GangSpec(name="pretrain", make_engine=TorchEngine, work=run.spec.work, identity={"engine": "deepspeed"})
    with pytest.raises(GangFailure, match="made with engine = torch, but this run asks for engine = deepspeed"):
        run.start()


def test_a_new_series_never_reads_the_checkpoints_of_another(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.start(stop_after(3))
    run.spec = GangSpec(name="pretrain", make_engine=TorchEngine, work=run.spec.work, series=2, identity={"engine": "torch"})
    assert run.start().resumed_from_step == 0


def test_a_full_disk_costs_one_checkpoint_but_does_not_stop_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: tuple[Weights, GangResult]
) -> None:
    full_at(monkeypatch, {4})
    run = Run(tmp_path)
    run.start()
    (text,) = run.notices()
    assert text.startswith("the checkpoint at step 4 could not be written: rank 0: OSError: [Errno 28] No space left on device")
    assert "the newest one is of step 2; training continues" in text
    assert sorted(path.name for path in (run.spec.work / "1.1").iterdir()) == ["step-00000008", "step-00000010"]
    assert equal(run.weights(), undisturbed[0])


def test_three_failed_checkpoints_in_a_row_stop_training_and_the_last_good_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_at(monkeypatch, {4, 6, 8})
    run = Run(tmp_path)
    with pytest.raises(OSError, match=r"^3 checkpoints in a row could not be written, .* run again: rank 0: OSError: .* No space left"):
        run.start()
    assert "training stops after 3 failures in a row" in run.notices()[-1]
    assert [path.name for path in (run.spec.work / "1.1").iterdir()] == ["step-00000002"]


def full_at(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    save = TorchEngine.save

    def failing(self: TorchEngine, folder: Path) -> None:
        (folder / "partial").write_bytes(b"half")
        if int(folder.parent.name.partition(".")[0].removeprefix("step-")) in steps:
            raise OSError(errno.ENOSPC, "No space left on device")
        (folder / "partial").unlink()
        save(self, folder)

    monkeypatch.setattr(TorchEngine, "save", failing)


def single_rank(tmp_path: Path, **changes: Any) -> ProcessRank:
    options: dict[str, Any] = dict(
        rank=0,
        world_size=1,
        device=torch.device("cpu"),
        make_engine=TorchEngine,
        checkpoints=tmp_path,
        on_event=lambda event: None,
        stop_requested=lambda: False,
        identity={},
    )
    return ProcessRank(**{**options, **changes})


def test_only_rank_0_reports_a_warning(tmp_path: Path) -> None:
    events: list[StageEvent] = []
    rank = single_rank(tmp_path, on_event=events.append)
    rank.warn("nothing was learned")
    rank.rank = 1
    rank.warn("nothing was learned")
    assert events == [Notice("nothing was learned")]


def test_rank_0_reports_progress_at_most_twice_a_second_and_always_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[StageEvent] = []
    rank = single_rank(tmp_path, on_event=events.append)
    now_s = 100.0
    monkeypatch.setattr("cluster.rank.time.monotonic", lambda: now_s)
    for done in range(1, 15):
        rank.progress(done, 14, "pairs encoded")
        now_s += 0.25
    rank.rank = 1
    rank.progress(14, 14, "pairs encoded")
    assert [event.done for event in events if isinstance(event, Progress)] == [1, 4, 7, 10, 13, 14]


@pytest.mark.parametrize("name", ["loss", "train/Loss", "memory/peak_gib", "train/tokens(tps)", "eval/pass@k"])
def test_a_metric_name_without_a_known_area_or_with_other_characters_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="expected area/name_unit in lower case"):
        single_rank(tmp_path).log(1, values={name: 1.0})


def test_a_rank_may_log_in_the_area_data(tmp_path: Path) -> None:
    events: list[StageEvent] = []
    single_rank(tmp_path, on_event=events.append).log(1, values={"data/documents": 3.0})
    (event,) = events
    assert isinstance(event, Points)
    assert values(event.curves) == {"data/documents": [(1, 3.0)]}


def test_the_heartbeat_reports_the_section_nearest_to_its_deadline(tmp_path: Path) -> None:
    rank = single_rank(tmp_path)
    assert rank.heartbeat().section is None
    with rank.section("evaluate", 60), rank.section("batch", 600):
        assert (rank.heartbeat().section, rank.heartbeat().deadline_s) == ("evaluate", 60)


def test_between_sections_the_last_deadline_starts_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 10.0, 13.0, 20.0, 25.0, 26.0])
    monkeypatch.setattr("cluster.rank.time.monotonic", lambda: next(clock))
    rank = single_rank(tmp_path)
    with rank.section("start", 300):  # entered at 0, left at 10
        pass
    beat = rank.heartbeat()  # at 13
    assert (beat.section, beat.elapsed_s, beat.deadline_s) == ("after start", 3.0, 300)
    with pytest.raises(KeyError), rank.section("step", 60):  # entered at 20, left at 25
        raise KeyError
    beat = rank.heartbeat()  # at 26
    assert (beat.section, beat.elapsed_s, beat.deadline_s) == ("after step", 1.0, 60)


def test_the_end_of_an_inner_section_leaves_the_deadline_of_the_outer_one(tmp_path: Path) -> None:
    rank = single_rank(tmp_path)
    with rank.section("checkpoint", 600):
        with rank.section("gather", 60):
            pass
        assert (rank.heartbeat().section, rank.heartbeat().deadline_s) == ("checkpoint", 600)


def test_the_sum_over_one_rank_is_a_copy(tmp_path: Path) -> None:
    tensor = torch.tensor([1.0, 2.0])
    total = single_rank(tmp_path).all_sum(tensor)
    total += 1
    assert tensor.tolist() == [1.0, 2.0]


def interrupted(rank: Any) -> None:
    raise KeyboardInterrupt


def nothing(rank: Any) -> None:
    return None


def test_ctrl_c_passes_through_an_inline_run(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run_inline(interrupted, (), spec=run.spec, on_event=run.events.append, should_stop=lambda: False)


def test_a_function_that_returns_none_without_a_stop_request_has_failed(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with pytest.raises(GangFailure, match=r"returned None on rank 0, .* but no stop was requested"):
        run_inline(nothing, (), spec=run.spec, on_event=run.events.append, should_stop=lambda: False)
