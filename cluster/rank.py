"""One process of a gang, as a training loop sees it: `ProcessRank` has the shape of gpt's Rank.

It serves a rank of many, once torch.distributed is initialised, and a single rank inline. A loop calls its methods in the
same order on all ranks; only `heartbeat` is called by a second thread. Starting and ending processes: `cluster/gang.py`.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from cluster import rank_checkpoint
from cluster.checkpoint import Checkpoint, step_folder
from cluster.collectives import Collectives
from cluster.events import CheckpointSaved, Curves, Notice, Point, Points, Progress, StageEvent
from cluster.metric_names import check_metric_name
from cluster.rank_checkpoint import CheckpointNotWritten

_ENGINE_NAME = re.compile(r"[a-z][a-z0-9_]*")
_MISSES_IN_A_ROW = 3
_PROGRESS_EVERY_S = 0.5


@dataclass(frozen=True)
class Heartbeat:
    """What a rank is doing: the open section nearest to its deadline.

    Between sections it is "after" the last one, with the same deadline, since a rank can hang in a collective there as well.
    """

    section: str | None
    """None before the first section."""
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

        `checkpoints` is this start's folder, `resume_from` a checkpoint of an earlier start. `identity` goes into each
        checkpoint's manifest and says which gang can load it.
        """
        assert world_size == 1 or dist.is_initialized(), "several ranks need torch.distributed first"
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self._collectives = Collectives(rank, world_size, device)
        self._make_engine = make_engine
        self._checkpoints = checkpoints
        self._resume_from = resume_from
        self._on_event = on_event
        self._stop_requested = stop_requested
        self._identity = dict(identity)
        self._engines: dict[str, Any] = {}
        self._sections: tuple[tuple[str, float, float], ...] = ()
        """Name, deadline and start of the open sections; if none is open, of the time after the last one."""
        self._open = 0
        self._step = 0
        self._shown_at_s = 0.0
        """When progress was reported last."""
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
                f"expected a new engine name of lower-case letters, digits and _, found {name!r}; this loop already has "
                f"{sorted(self._engines)}"
            )
        engine = self._make_engine(model, parameter_groups, settings, device=self.device, world_size=self.world_size)
        self._engines[name] = engine
        return engine

    def log(self, step: int, *, sums: Mapping[str, Tensor | float] | None = None, values: Mapping[str, float] | None = None) -> None:
        for name in [*(sums or {}), *(values or {})]:
            check_metric_name(name)
        self._step = step
        totals = self._collectives.sum_numbers(sums or {})
        if self.rank == 0:
            now_ms = int(time.time() * 1000)
            self._keep([(name, Point(step, float(value), now_ms)) for name, value in {**totals, **(values or {})}.items()])

    def warn(self, text: str) -> None:
        if self.rank == 0:
            self._on_event(Notice(text))

    def progress(self, done: int, total: int, unit: str) -> None:
        if self.rank == 0 and (done >= total or time.monotonic() - self._shown_at_s > _PROGRESS_EVERY_S):
            self._shown_at_s = time.monotonic()
            self._on_event(Progress(done, total, unit))

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
        """Called by the second thread. It needs no lock, since the tuple of sections is only ever replaced as a whole."""
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
        return self._collectives.sum(tensor)

    def save(self, finished_steps: int) -> None:
        """Commit a checkpoint of all engines.

        If a write fails, training continues with the older checkpoints and a notice says so; the third failure in a row raises.
        """
        self._step = finished_steps
        self._saves += 1
        started_at_s = time.monotonic()
        final = step_folder(self._checkpoints, finished_steps)
        # All ranks must use the same name, so it can't be random. Only one gang ever writes into the folder of a start.
        temporary = final.with_name(f"{final.name}.tmp-{self._saves}")
        try:
            written = rank_checkpoint.write(
                self._collectives,
                temporary,
                final,
                finished_steps=finished_steps,
                engines=self._engines,
                identity=self._identity,
                logged=self._logged,
            )
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
        rank_checkpoint.load(self._collectives, checkpoint, self._engines)
        if self.rank == 0:
            self._keep(rank_checkpoint.logged_before(checkpoint))
        self._step = checkpoint.step
        self._last_saved = checkpoint.step
        return checkpoint.step

    def _missed(self, step: int, temporary: Path, error: CheckpointNotWritten) -> None:
        self._misses += 1
        if self.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            free_gib = shutil.disk_usage(self._checkpoints).free / 2**30
            newest = "there is no earlier one" if self._last_saved is None else f"the newest one is of step {self._last_saved}"
            then = "training continues" if self._misses < _MISSES_IN_A_ROW else f"training stops after {self._misses} failures in a row"
            self.warn(
                f"the checkpoint at step {step} could not be written: {error} ({free_gib:.1f} GiB free at {self._checkpoints}); "
                f"{newest}; {then}"
            )
        if self._misses >= _MISSES_IN_A_ROW:
            raise CheckpointNotWritten(
                f"{self._misses} checkpoints in a row could not be written, so training was stopped; make {self._checkpoints} writable "
                f"or free space, then run again: {error}"
            ) from error

    def _keep(self, logged: list[tuple[str, Point]]) -> None:
        if logged:
            self._logged += logged
            self._on_event(Points(_curves(logged)))


def _curves(logged: Iterable[tuple[str, Point]]) -> Curves:
    curves: Curves = {}
    for name, point in logged:
        curves.setdefault(name, []).append(point)
    return curves
