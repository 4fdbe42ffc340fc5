"""How the ranks of a gang write one checkpoint together, verify it and load it.

    step-00000500/
        policy/...          an engine's state, one folder per engine; every rank writes its files
        random-0003.json    a rank's random number generators
        history.json        [[metric, step, value, time_ms], ...] in the order in which the points were logged
        manifest.json       sizes and hashes of all of these, and which gang can load them

Choosing the checkpoint to resume from needs no torch: `cluster/checkpoint.py`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from cluster import commit
from cluster.checkpoint import SCHEMA, Checkpoint, prune
from cluster.collectives import Collectives
from cluster.events import Point
from cluster.random_states import random_states, set_random_states

T = TypeVar("T")
Logged = Sequence[tuple[str, Point]]
"""Metric names and points, in the order in which they were logged."""

_HISTORY = "history.json"
_KEPT = 2


class CheckpointNotWritten(OSError):
    """A checkpoint could not be written on some rank; the older ones are untouched."""


def write(
    ranks: Collectives,
    temporary: Path,
    final: Path,
    *,
    finished_steps: int,
    engines: Mapping[str, Any],
    identity: Mapping[str, Any],
    logged: Logged,
) -> int:
    """Write all ranks' files into `temporary`; once all have succeeded, rank 0 commits it as `final`. Returns the bytes written.

    Between two agreements no rank waits for another, so one rank's error can't leave the others blocked.
    """
    folders = [temporary / name for name in engines]
    _agree(ranks, lambda: _make_folders(folders) if ranks.rank == 0 else None)
    _agree(ranks, lambda: _write_own_files(ranks.rank, temporary, engines, logged))
    listings = _agree(ranks, lambda: _listing(temporary))
    if any(listing != listings[0] for listing in listings):
        raise ValueError(
            f"the ranks do not see the same files in {temporary.parent}: rank 0 sees {len(listings[0])} files, "
            f"others {sorted({len(listing) for listing in listings[1:]})}; put the store on storage that all nodes share"
        )
    # Each rank hashes its share of all files; it doesn't matter who wrote a file once all ranks have finished.
    own = listings[0][ranks.rank :: ranks.world_size]
    described = _agree(ranks, lambda: [_describe_flushed(temporary, path) for path in own])
    entries = sorted((entry for share in described for entry in share), key=lambda entry: entry.path)
    manifest = {
        "schema": SCHEMA,
        "step": finished_steps,
        "engines": sorted(engines),
        "identity": dict(identity),
        "files": [asdict(entry) for entry in entries],
    }
    _agree(ranks, lambda: _commit(temporary, final, manifest) if ranks.rank == 0 else None)
    return sum(entry.bytes for entry in entries)


def load(ranks: Collectives, checkpoint: Checkpoint, engines: Mapping[str, Any]) -> None:
    """Restore the engines and this rank's random number generators, after checking every file."""
    if sorted(checkpoint.manifest["engines"]) != sorted(engines):
        raise ValueError(
            f"expected the engines of {checkpoint.folder}, {sorted(checkpoint.manifest['engines'])}, found {sorted(engines)}; "
            "create the same engines, all of them before restore()"
        )
    _verify(ranks, checkpoint)
    for name, engine in engines.items():
        engine.load(checkpoint.folder / name)
    # After the engines, since loading may draw random numbers.
    set_random_states(json.loads((checkpoint.folder / _random_file(ranks.rank)).read_bytes()))


def logged_before(checkpoint: Checkpoint) -> list[tuple[str, Point]]:
    """The points that were logged before this checkpoint was written."""
    points = json.loads((checkpoint.folder / _HISTORY).read_bytes())
    return [(name, Point(step, value, time_ms)) for name, step, value, time_ms in points]


def _write_own_files(rank: int, temporary: Path, engines: Mapping[str, Any], logged: Logged) -> None:
    for name, engine in engines.items():
        engine.save(temporary / name)
    (temporary / _random_file(rank)).write_text(json.dumps(random_states()))
    if rank == 0:
        # With json's NaN: a diverged loss must not keep its checkpoint from being written.
        (temporary / _HISTORY).write_text(json.dumps([[name, *point] for name, point in logged]))


def _commit(temporary: Path, final: Path, manifest: dict[str, Any]) -> None:
    commit.commit_folder(temporary, final, manifest)
    # An old checkpoint that can't be deleted only costs space.
    with contextlib.suppress(OSError):
        prune(final.parent, keep=_KEPT)


def _verify(ranks: Collectives, checkpoint: Checkpoint) -> None:
    """Check every file's sha256 right before loading, which unpickles; each rank reads its share."""
    entries = checkpoint.entries()
    own = {entry.path for entry in entries[ranks.rank :: ranks.world_size]}
    shares = _agree(ranks, lambda: commit.check(checkpoint.folder, entries, only=own))
    problems = sorted({problem for share in shares for problem in share})
    if problems:
        raise ValueError(
            f"{checkpoint.folder} is damaged and was not loaded: {'; '.join(problems)}; run again to resume from an older checkpoint"
        )


def _agree(ranks: Collectives, action: Callable[[], T]) -> list[T]:
    """Run `action` on every rank and return all results on all ranks; CheckpointNotWritten on all if any rank failed to write."""
    outcome: tuple[T | None, str]
    try:
        outcome = action(), ""
    except Exception as error:
        if not _is_write_error(error):
            raise
        outcome = None, f"rank {ranks.rank}: {type(error).__name__}: {error}"
    outcomes: list[Any] = ranks.gather(outcome)
    failures = [failure for _, failure in outcomes if failure]
    if failures:
        raise CheckpointNotWritten("; ".join(failures))
    return [result for result, _ in outcomes]


def _random_file(rank: int) -> str:
    return f"random-{rank:04d}.json"


def _make_folders(folders: list[Path]) -> None:
    for folder in folders:
        folder.mkdir(parents=True)


def _listing(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def _describe_flushed(folder: Path, relative: str) -> commit.FileEntry:
    path = folder / relative
    commit.fsync_file(path)
    return commit.FileEntry(relative, path.stat().st_size, commit.sha256_file(path))


def _is_write_error(error: Exception) -> bool:
    # torch's writer reports a full disk as a RuntimeError, from two places in its C++ code.
    return isinstance(error, OSError) or any(sign in repr(error) for sign in ("PytorchStreamWriter", "unexpected pos", "SafetensorError"))
