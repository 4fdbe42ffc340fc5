"""`StageContext` as the runner implements it: how a stage reaches its sources, its gang and the store."""

from __future__ import annotations

import hashlib
import importlib
import io
import os
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from cluster.events import Curves, Notice, Point, Points, Progress, StageEvent
from cluster.metric_names import check_metric_name
from gpt.settings import Settings, TrainSettings
from pipelines.artifacts import Artifact
from pipelines.plan.environment import versions
from pipelines.plan.kinds import ENGINES
from pipelines.plan.user_code import load_function
from pipelines.run.job import Job, Outcome
from pipelines.stage import Source, StageFailure
from pipelines.store.events import now_ms
from pipelines.store.runs import RunFolder
from pipelines.store.store import Store

A = TypeVar("A", bound=Artifact)
R = TypeVar("R")

PROGRESS_EVERY_S = 0.5
REJECTS = "rejects.jsonl"


class Stopped(BaseException):
    """Unwinds a stage whose gang was asked to stop; a BaseException, so that no stage catches it by accident."""


class Context:
    """What a stage is given as its `StageContext`."""

    def __init__(
        self, job: Job, config: Settings, store: Store, emit: Callable[[StageEvent], None], should_stop: Callable[[], bool]
    ) -> None:
        self.seed = job.seed
        self.device = "cuda" if job.resources.gpus else "cpu"
        self.sources = job.sources
        self.outcome = Outcome(host=socket.gethostname(), pid=os.getpid(), versions=versions())
        self._job = job
        self._config = config
        self._store = store
        self._emit = emit
        self._should_stop = should_stop
        self._output: Path | None = None
        self._readers: list[_PlannedSource] = []
        self._shown_at_s = 0.0

    @property
    def output(self) -> Path:
        if self._output is None:
            self._output = self._store.new_folder()
        return self._output

    def open(self, source: Source) -> BinaryIO:
        reader = _PlannedSource(source)
        self._readers.append(reader)
        return cast(BinaryIO, io.BufferedReader(reader, buffer_size=1 << 20))

    def function(self, reference: str) -> Callable[..., Any]:
        if reference not in self._job.functions:
            raise ValueError(
                f"expected the value of a UserFunction setting, found {reference!r}; {self._job.uses} has {list(self._job.functions)}"
            )
        return load_function(self._job.functions[reference], self._job.user_folder)[0]

    def progress(self, done: int, total: int, unit: str) -> None:
        if self._should_stop():
            raise Stopped
        if done >= total or time.monotonic() - self._shown_at_s > PROGRESS_EVERY_S:
            self._shown_at_s = time.monotonic()
            self._emit(Progress(_count(done), _count(total), unit))

    def note(self, text: str) -> None:
        self._emit(Notice(text))

    def log(self, step: int, values: dict[str, float]) -> None:
        time_ms = now_ms()
        curves = {name: [Point(int(step), _number(name, value), time_ms)] for name, value in values.items()}
        self._keep(curves)
        self._emit(Points(curves))

    def figure(self, name: str, value: float) -> None:
        self.outcome = replace(self.outcome, figures=self.outcome.figures | {name: _number(name, value)})

    def gang(self, function: Callable[..., R | None], *arguments: Any) -> R:
        from cluster.gang import run_gang, run_inline
        from cluster.gang_spec import GangSpec

        job, resources = self._job, self._job.resources
        config = self._config
        assert isinstance(config, TrainSettings), "only a kind whose config is a TrainSettings trains"
        module, name = ENGINES["torch" if job.inline else config.engine].split(":")
        spec = GangSpec(
            name=job.stage,
            ranks=1 if job.inline else resources.ranks,
            cpus_per_rank=resources.cpus_per_rank,
            gpus_per_rank=resources.gpus_per_rank,
            memory_gib=resources.memory_gib,
            labels=resources.labels,
            accelerator=resources.accelerator,
            make_engine=getattr(importlib.import_module(module), name),
            work=self._store.work(job.key),
            series=job.series,
            identity=job.identity,
            max_restarts=config.max_restarts,
            start_deadline_s=config.start_deadline_s,
        )
        run = run_inline if job.inline else run_gang
        result = run(function, (*arguments,), spec=spec, on_event=self._emit, should_stop=self._should_stop)
        self._keep(result.history)
        self.outcome = replace(self.outcome, restarts=result.restarts, resumed_from_step=result.resumed_from_step)
        if result.stopped:
            raise Stopped
        return cast(R, result.value)

    def publish(self, kind: type[A], **metadata: Any) -> A:
        if not any(self.output.iterdir()):
            raise StageFailure(f"{self._job.uses} publishes {kind.kind}, but wrote nothing into stage.output")
        for reader in self._readers:
            reader.verify()
        if fault := _breach(kind, self.output, metadata):
            raise StageFailure(f"{self._job.uses} publishes {kind.kind} {fault}")
        published = self._store.publish(self.output, kind.kind, metadata)
        self._output = None
        return kind(published.path, published.digest, published.metadata)

    def keep_rejects(self) -> str:
        """Save the records that a failed stage rejected beside its traceback; the end of a sentence that says where."""
        rejects = None if self._output is None else self._output / REJECTS
        if rejects is None or not rejects.is_file() or not rejects.stat().st_size:
            return ""
        name = RunFolder(self._store, self._job.run).name(f"{self._job.stage}.{REJECTS}")
        self._store.backend.put(name, rejects)
        return f" (the rejected records: {self._store}/{name})"

    def discard(self) -> None:
        """Delete what was written and never published."""
        if self._output is not None:
            shutil.rmtree(self._output, ignore_errors=True)

    def _keep(self, curves: Curves) -> None:
        kept = {name: list(points) for name, points in self.outcome.curves.items()}
        for name, points in curves.items():
            kept.setdefault(name, []).extend(points)
        self.outcome = replace(self.outcome, curves=kept)


class _PlannedSource(io.RawIOBase):
    """A source being read. What was read must have the digest that the stage's key holds."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._file = open(source.path, "rb", buffering=0)  # noqa: SIM115  (closed in close)
        self._hash = hashlib.sha256()
        self._fault: StageFailure | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer)
        self._hash.update(memoryview(buffer)[:count])
        return count or 0

    def close(self) -> None:
        if self.closed:
            return
        super().close()
        while chunk := self._file.read(1 << 20):  # also what a reader that stopped early did not read
            self._hash.update(chunk)
        self._file.close()
        if self._hash.hexdigest() != self._source.sha256:
            self._fault = StageFailure(f"{self._source.name} was changed after this run was planned; run again to read it as it is now")
            raise self._fault

    def verify(self) -> None:
        """Raise what `close` raised: Python closes a forgotten file by itself and drops the exception."""
        self.close()
        if self._fault is not None:
            raise self._fault


def _breach(kind: type[Artifact], folder: Path, metadata: dict[str, Any]) -> str | None:
    """How a folder and its metadata break the contract of their artifact type, as the end of a sentence; None if they keep it."""
    for name in kind.files:
        if not (folder / name).is_file():
            return f"without {name}: write it into stage.output; {kind.__name__} holds {', '.join(kind.files)}"
    for name, example in kind.required.items():
        if not _same_shape(metadata.get(name), example):
            found = f"with metadata {name} = {metadata[name]!r}" if name in metadata else f"without metadata {name}"
            others = "".join(f", {other}=..." for other in kind.required if other != name)
            return f"{found}; expected, for example, stage.publish({kind.__name__}, {name}={example!r}{others})"
    return None


def _same_shape(found: Any, example: Any) -> bool:
    if isinstance(example, dict):
        return isinstance(found, dict) and all(_same_shape(found.get(name), part) for name, part in example.items())
    return isinstance(found, type(example))


def _number(name: str, value: Any) -> float:
    check_metric_name(name)
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"metric {name!r}: expected a number, found {value!r}") from None


def _count(value: Any) -> float:
    """A plain number, where numpy's may be given: events become JSON in a process without numpy."""
    number = float(value)
    return int(number) if number.is_integer() else number
