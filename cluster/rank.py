"""One process of a gang, as a training loop sees it: `ProcessRank` has the shape of gpt's Rank.

It serves a rank of many (torch.distributed is initialised) and a single one inline. A loop calls its methods in the same
order on all ranks. The heartbeat alone is read by a second thread. Leaves out starting and ending processes: `cluster/gang.py`.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist

from cluster import commit
from cluster.checkpoint import SCHEMA, Checkpoint, prune, step_folder
from cluster.events import CheckpointSaved, Curves, Notice, Point, Points, StageEvent
from cluster.metric_names import check_metric_name

T = TypeVar("T")

_ENGINE_NAME = re.compile(r"[a-z][a-z0-9_]*")
_HISTORY = "history.json"
_KEPT_CHECKPOINTS = 2
_MISSES_IN_A_ROW = 3


class CheckpointNotWritten(OSError):
    """A checkpoint could not be written on some rank; the older ones are untouched."""


@dataclass(frozen=True)
class Heartbeat:
    """What a rank is doing: the open section that is nearest to its deadline.

    Between sections it is "after" the last one, with that one's deadline: there are collectives in which a rank can hang as well.
    """

    section: str | None
    """None before the first one."""
    elapsed_s: float
    deadline_s: float
    step: int
    """The last step that was logged or committed."""


class ProcessRank:
    def __init__(
        self,
        *,
        rank: int,
        world_size: int,
        device: torch.device,
        make_engine: Callable[..., Any],
        checkpoints: Path,
        resume_from: Checkpoint | None = None,
        on_event: Callable[[StageEvent], None],
        stop_requested: Callable[[], bool],
        identity: Mapping[str, Any],
    ) -> None:
        """`make_engine(model, parameter_groups, settings, device=..., world_size=...)` makes an Engine.

        `checkpoints` is this attempt's folder, `resume_from` a checkpoint of an earlier one. `identity` goes into each
        checkpoint's manifest: who may load it.
        """
        assert world_size == 1 or dist.is_initialized(), "a rank of many needs torch.distributed first"
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self._make_engine = make_engine
        self._checkpoints = checkpoints
        self._resume_from = resume_from
        self._on_event = on_event
        self._stop_requested = stop_requested
        self._identity = dict(identity)
        self._engines: dict[str, Any] = {}
        self._sections: tuple[tuple[str, float, float], ...] = ()
        """Name, deadline and start of those that are open; where none is, of the time after the last one."""
        self._open = 0
        self._step = 0
        self._logged: list[tuple[str, Point]] = []
        """Every point in the order in which it was logged, those before a resume included. Only rank 0 has them."""
        self._saves = 0
        self._misses = 0
        self._last_saved: int | None = None

    @property
    def history(self) -> Curves:
        """Every curve so far, the points before a resume included. Only rank 0 has them."""
        return _curves(self._logged)

    def engine(self, name: str, model: nn.Module, parameter_groups: Sequence[Mapping[str, Any]], settings: Any) -> Any:
        if not _ENGINE_NAME.fullmatch(name) or name in self._engines:
            raise ValueError(
                f"engine name {name!r}: want lower case letters, digits and _, each name once; there are {sorted(self._engines)}"
            )
        engine = self._make_engine(model, parameter_groups, settings, device=self.device, world_size=self.world_size)
        self._engines[name] = engine
        return engine

    def log(self, step: int, *, sums: Mapping[str, Tensor | float] | None = None, values: Mapping[str, float] | None = None) -> None:
        for name in [*(sums or {}), *(values or {})]:
            check_metric_name(name)
        self._step = step
        totals = self._summed(dict(sums or {}))
        if self.rank == 0:
            now_ms = int(time.time() * 1000)
            self._keep([(name, Point(step, float(value), now_ms)) for name, value in {**totals, **(values or {})}.items()])

    def warn(self, text: str) -> None:
        if self.rank == 0:
            self._on_event(Notice(text))

    @contextlib.contextmanager
    def section(self, name: str, deadline_s: float) -> Iterator[None]:
        outer = self._sections[: self._open]
        self._sections = (*outer, (name, deadline_s, time.monotonic()))
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1
            self._sections = outer or ((f"after {name}", deadline_s, time.monotonic()),)

    def heartbeat(self) -> Heartbeat:
        """For the second thread: a snapshot that needs no lock, since the tuple of sections is replaced whole."""
        now_s = time.monotonic()
        sections = self._sections
        if not sections:
            return Heartbeat(None, 0.0, float("inf"), self._step)
        name, deadline_s, started_at_s = min(sections, key=lambda section: section[2] + section[1])
        return Heartbeat(name, now_s - started_at_s, deadline_s, self._step)

    def should_stop(self) -> bool:
        flag = torch.tensor([1.0 if self._stop_requested() else 0.0])
        return bool(self.all_sum(flag).item())

    def all_sum(self, tensor: Tensor) -> Tensor:
        total = tensor.detach().clone()
        if self.world_size > 1:
            there = self._for_collective(total)
            dist.all_reduce(there)
            total = there.to(tensor.device)
        return total

    def save(self, finished_steps: int) -> None:
        """All ranks write into one temporary folder, agree that all went well, and rank 0 commits it.

        A failed write is told as an event and training goes on with the older checkpoints; the third in a row raises.
        """
        self._step = finished_steps
        self._saves += 1
        started_at_s = time.monotonic()
        final = step_folder(self._checkpoints, finished_steps)
        # The same name on all ranks: no rank may invent its own. An attempt's folder has one gang, ever.
        temporary = final.with_name(f"{final.name}.tmp-{self._saves}")
        try:
            written = self._write_checkpoint(finished_steps, temporary, final)
        except CheckpointNotWritten as error:
            self._missed(finished_steps, temporary, error)
            return
        self._misses = 0
        self._last_saved = finished_steps
        seconds = time.monotonic() - started_at_s
        if self.rank == 0:
            self._on_event(CheckpointSaved(finished_steps, written, seconds))

    def restore(self) -> int:
        checkpoint = self._resume_from
        if checkpoint is None:
            return 0
        if sorted(checkpoint.manifest["engines"]) != sorted(self._engines):
            raise ValueError(
                f"{checkpoint.folder} holds the engines {sorted(checkpoint.manifest['engines'])}, this loop made "
                f"{sorted(self._engines)}; make them all before restore()"
            )
        self._verify(checkpoint)
        for name, engine in self._engines.items():
            engine.load(checkpoint.folder / name)
        # After the engines: a load may draw random numbers.
        set_random_states(json.loads((checkpoint.folder / _random_file(self.rank)).read_bytes()))
        if self.rank == 0:
            self._keep(_read_history(checkpoint.folder / _HISTORY))
        self._step = checkpoint.step
        self._last_saved = checkpoint.step
        return checkpoint.step

    def _write_checkpoint(self, finished_steps: int, temporary: Path, final: Path) -> int:
        """Bytes written. Between two agreements no rank waits for another, so that one rank's error can't strand the rest."""
        folders = [temporary / name for name in self._engines]
        self._agree(lambda: _make_folders(folders) if self.rank == 0 else None)
        self._agree(lambda: self._write_own_files(temporary))
        listings = self._agree(lambda: _listing(temporary))
        if any(listing != listings[0] for listing in listings):
            raise ValueError(
                f"the ranks do not see the same files in {temporary.parent}: it must lie on storage that all nodes share; "
                f"rank 0 sees {len(listings[0])} files, others {sorted({len(listing) for listing in listings[1:]})}"
            )
        # Each rank hashes its share of all files; who wrote a file does not matter once all have finished.
        mine = listings[0][self.rank :: self.world_size]
        described = self._agree(lambda: [_describe_flushed(temporary, path) for path in mine])
        entries = sorted((entry for share in described for entry in share), key=lambda entry: entry.path)
        manifest = {
            "schema": SCHEMA,
            "step": finished_steps,
            "engines": sorted(self._engines),
            "identity": self._identity,
            "files": [asdict(entry) for entry in entries],
        }
        self._agree(lambda: self._commit(temporary, final, manifest) if self.rank == 0 else None)
        return sum(entry.bytes for entry in entries)

    def _write_own_files(self, temporary: Path) -> None:
        for name, engine in self._engines.items():
            engine.save(temporary / name)
        (temporary / _random_file(self.rank)).write_text(json.dumps(random_states()))
        if self.rank == 0:
            # json's own NaN is kept: a diverged loss must not keep its checkpoint from being written.
            (temporary / _HISTORY).write_text(json.dumps([[name, *point] for name, point in self._logged]))

    def _commit(self, temporary: Path, final: Path, manifest: dict[str, Any]) -> None:
        commit.commit_folder(temporary, final, manifest)
        # An old checkpoint that can't be deleted costs space alone.
        with contextlib.suppress(OSError):
            prune(self._checkpoints, keep=_KEPT_CHECKPOINTS)

    def _missed(self, step: int, temporary: Path, error: CheckpointNotWritten) -> None:
        self._misses += 1
        if self.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            free_gib = shutil.disk_usage(self._checkpoints).free / 2**30
            last = "there is no earlier one" if self._last_saved is None else f"the last good one is of step {self._last_saved}"
            then = "training goes on" if self._misses < _MISSES_IN_A_ROW else f"training stops after {self._misses} misses in a row"
            self.warn(f"checkpoint at step {step} not written: {error} ({free_gib:.1f} GiB free at {self._checkpoints}); {last}; {then}")
        if self._misses >= _MISSES_IN_A_ROW:
            raise error

    def _verify(self, checkpoint: Checkpoint) -> None:
        """Loading unpickles, so every file's sha256 is checked right before it, each rank reading its share."""
        entries = checkpoint.entries()
        shares = self._agree(
            lambda: commit.check(checkpoint.folder, entries, only={entry.path for entry in entries[self.rank :: self.world_size]})
        )
        problems = sorted({problem for share in shares for problem in share})
        if problems:
            raise ValueError(
                f"{checkpoint.folder} is damaged and was not loaded: {'; '.join(problems)}; run again to go on from an older one"
            )

    def _agree(self, action: Callable[[], T]) -> list[T]:
        """Run `action` on every rank; all results on all ranks, or CheckpointNotWritten on all if any rank failed to write."""
        outcome: tuple[T | None, str]
        try:
            outcome = action(), ""
        except Exception as error:
            if not _is_write_error(error):
                raise
            outcome = None, f"rank {self.rank}: {type(error).__name__}: {error}"
        outcomes: list[Any] = [outcome]
        if self.world_size > 1:
            outcomes = [None] * self.world_size
            dist.all_gather_object(outcomes, outcome)
        failures = [failure for _, failure in outcomes if failure]
        if failures:
            raise CheckpointNotWritten("; ".join(failures))
        return [result for result, _ in outcomes]

    def _summed(self, sums: Mapping[str, Tensor | float]) -> dict[str, float]:
        if not sums:
            return {}
        names = sorted(sums)
        mine = torch.tensor([float(sums[name]) for name in names], dtype=torch.float64)
        if self.world_size == 1:
            return dict(zip(names, mine.tolist(), strict=True))
        # Gathered and added in the order of ranks: the same bits however the network is built.
        there = self._for_collective(mine)
        shares = [torch.empty_like(there) for _ in range(self.world_size)]
        dist.all_gather(shares, there)
        total = torch.zeros_like(mine)
        for share in shares:
            total += share.cpu()
        return dict(zip(names, total.tolist(), strict=True))

    def _for_collective(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device) if dist.get_backend() == "nccl" else tensor.cpu()

    def _keep(self, logged: list[tuple[str, Point]]) -> None:
        if logged:
            self._logged += logged
            self._on_event(Points(_curves(logged)))


def _curves(logged: Iterable[tuple[str, Point]]) -> Curves:
    curves: Curves = {}
    for name, point in logged:
        curves.setdefault(name, []).append(point)
    return curves


def _read_history(file: Path) -> list[tuple[str, Point]]:
    """A checkpoint's `history.json`: [[name, step, value, time_ms], ...] in the order in which the points were logged."""
    return [(name, Point(step, value, time_ms)) for name, step, value, time_ms in json.loads(file.read_bytes())]


def random_states() -> dict[str, Any]:
    """Python's, numpy's and torch's global generators as JSON; what a loop draws from its own generators is its own to restore."""
    version, inner, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(inner), gauss],
        "numpy": [name, [int(key) for key in keys], position, has_gauss, cached],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": torch.cuda.get_rng_state().numpy().tobytes().hex() if torch.cuda.is_available() else None,
    }


def set_random_states(states: Mapping[str, Any]) -> None:
    version, inner, gauss = states["python"]
    random.setstate((version, tuple(inner), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_bytes_tensor(states["torch"]))
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes_tensor(states["cuda"]))


def _bytes_tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


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
    # torch's writer hides a full disk behind RuntimeErrors of its own, from two places in its C++ code.
    return isinstance(error, OSError) or any(sign in repr(error) for sign in ("PytorchStreamWriter", "unexpected pos", "SafetensorError"))
