"""Which checkpoint a gang resumes from when some are damaged, unfinished or made by another gang."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from cluster import checkpoint, commit

IDENTITY = {"world_size": 2, "engine": "deepspeed", "zero_stage": 1, "precision": "fp32"}


def write(attempt: Path, step: int) -> Path:
    final = checkpoint.step_folder(attempt, step)
    temporary = commit.temporary_for(final)
    temporary.mkdir(parents=True)
    (temporary / "weights").write_bytes(b"%d" % step * 100)
    files = [asdict(entry) for entry in commit.describe(temporary)]
    manifest = {"schema": checkpoint.SCHEMA, "step": step, "engines": ["policy"], "identity": IDENTITY, "files": files}
    commit.commit_folder(temporary, final, manifest)
    return final


def test_the_newest_step_of_all_starts_is_chosen(tmp_path: Path) -> None:
    write(tmp_path / "1.1", 100)
    write(tmp_path / "1.2", 50)
    found, skipped = checkpoint.newest_checkpoint(checkpoint.attempts(tmp_path, 1))
    assert found is not None
    assert (found.step, skipped) == (100, [])


def test_a_damaged_checkpoint_is_skipped_and_named(tmp_path: Path) -> None:
    write(tmp_path / "1.1", 50)
    cut, flipped, unmarked, garbled = (write(tmp_path / "1.1", step) for step in (100, 150, 200, 250))
    (cut / "weights").write_bytes(b"1")
    data = bytearray((flipped / "weights").read_bytes())
    data[7] ^= 1
    (flipped / "weights").write_bytes(data)
    (unmarked / "manifest.json").unlink()
    (garbled / "manifest.json").write_text('{"schema":')
    found, skipped = checkpoint.newest_checkpoint([tmp_path / "1.1"])
    assert found is not None
    assert found.step == 50
    assert ["is not JSON" in skipped[0], "no manifest" in skipped[1], "sha256" in skipped[2], "1 bytes" in skipped[3]] == [True] * 4


def test_unfinished_folders_and_other_series_are_ignored(tmp_path: Path) -> None:
    write(tmp_path / "2.1", 50)
    write(tmp_path / "1.1", 10).rename(tmp_path / "1.1" / "step-00000099.tmp-3")
    assert checkpoint.newest_checkpoint(checkpoint.attempts(tmp_path, 1)) == (None, [])
    assert checkpoint.new_attempt(tmp_path, 1).name == "1.2"
    assert checkpoint.new_attempt(tmp_path, 3).name == "3.1"


def test_a_checkpoint_can_be_loaded_by_a_gang_of_the_same_ranks_and_zero_stage(tmp_path: Path) -> None:
    write(tmp_path / "1.1", 50)
    found, _ = checkpoint.newest_checkpoint([tmp_path / "1.1"], verify=False)
    assert found is not None
    assert found.fits(IDENTITY) is None
    assert found.fits({**IDENTITY, "versions": {"torch": "2.14"}}) is None
    problem = found.fits({**IDENTITY, "world_size": 1, "zero_stage": 3})
    assert problem is not None
    assert "made with ranks = 2, zero_stage = 1, but this run asks for ranks = 1, zero_stage = 3" in problem


def test_the_zero_stage_of_an_engine_without_zero_is_not_mentioned(tmp_path: Path) -> None:
    write(tmp_path / "1.1", 50)
    found, _ = checkpoint.newest_checkpoint([tmp_path / "1.1"], verify=False)
    assert found is not None
    assert found.fits({**IDENTITY, "engine": "torch", "zero_stage": None}) == (
        "the checkpoint at step 50 was made with engine = deepspeed, zero_stage = 1, but this run asks for engine = torch and can't "
        "load it; set engine = deepspeed, zero_stage = 1 to resume, or rebuild the stage from step 0"
    )


def test_the_two_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (10, 20, 30, 100000000):
        write(tmp_path, step)
    checkpoint.prune(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000030", "step-100000000"]
