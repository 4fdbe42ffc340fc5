"""One stage carried out: the worker's side of the line.

`stream` is the body of the Ray task; `execute` does the same in this very process, for `--inline` and a debugger. Both make the
artifacts and the config anew from a `Job`, which is plain data, give the kind its `StageContext`, and say what came of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from cluster.gang import GangFailure
from cluster.metric_names import check_metric_name
from pipelines.artifacts import Artifact
from pipelines.plan.config import Resources
from pipelines.plan.environment import versions
from pipelines.plan.kinds import ENGINES, load_kind
from pipelines.plan.user_code import load_function
from pipelines.stage import Source, StageFailure
from pipelines.store.store import Store

A = TypeVar("A", bound=Artifact)
Event = dict[str, Any]

PROGRESS_EVERY_S = 0.5


@dataclass(frozen=True)
class Job:
    """Everything that a worker needs to know of a stage."""

    run: str
    stage: str
    uses: str
    user_folder: Path
    """What a `uses` that names a file is relative to."""
    functions: dict[str, str]
    """The user's code, as the config names it to where it lies, relative to `user_folder`."""
    config: dict[str, Any]
    inputs: dict[str, list[str]]
    sources: list[Source]
    seed: int
    store: Path
    key: str
    series: int
    resources: Resources
    identity: dict[str, Any]
    """What a checkpoint must share with its gang; empty for stages that do not train."""
    inline: bool


@dataclass(frozen=True)
class Outcome:
    """What came of a stage: an output, a stop, or an error."""

    output: str | None = None
    output_kind: str | None = None
    stopped: bool = False
    error: str | None = None
    """One paragraph for a person."""
    traceback: str | None = None
    figures: dict[str, float] = field(default_factory=dict)
    curves: dict[str, list[tuple[int, float, int]]] = field(default_factory=dict)
    restarts: int = 0
    resumed_from_step: int | None = None
    host: str | None = None
    """Where it ran, under which pid, and with what. None and nothing where its process never came so far."""
    pid: int | None = None
    versions: dict[str, str] = field(default_factory=dict)


class Stopped(BaseException):
    """Unwinds a stage whose gang was asked to stop; a BaseException, so that no stage swallows it."""


def stream(job: Job) -> Generator[Event, None, Outcome]:
    """The Ray task of a stage: yields its events, returns its outcome."""
    from cluster.ray_session import streamed

    asked = StopFile(Store(job.store), job.run)
    return (yield from streamed(lambda emit: execute(job, emit, asked)))


class StopFile:
    """The run's stop mark in the store, looked at now and then: how a stop reaches a worker, from the driver or from anywhere."""

    def __init__(self, store: Store, run: str) -> None:
        self._store = store
        self._name = f"runs/{run}/stop"
        self._looked_at_s = 0.0
        self._set = False

    def __call__(self) -> bool:
        if not self._set and time.monotonic() - self._looked_at_s > 0.3:
            self._set = self._store.backend.get(self._name) is not None
            self._looked_at_s = time.monotonic()
        return self._set


def execute(job: Job, emit: Callable[[Event], None], should_stop: Callable[[], bool]) -> Outcome:
    """Run a stage's function; never raises but for KeyboardInterrupt."""
    context = None
    try:
        store = Store(job.store)
        kind = load_kind(job.uses, job.user_folder)
        context = Context(job, store, emit, should_stop)
        arguments: dict[str, Any] = {}
        if kind.config_parameter:
            arguments[kind.config_parameter] = kind.config.model_validate(job.config)
        if kind.stage_parameter:
            arguments[kind.stage_parameter] = context
        for name, wanted in kind.inputs.items():
            given = [store.artifact(digest, wanted.artifact) for digest in job.inputs.get(name, [])]
            arguments[name] = given if wanted.many else given[0] if given else None
        with _threads(job.resources.cpus_per_rank if kind.trains() else job.resources.cpus):
            result = kind.function(**arguments)
        if not isinstance(result, kind.output) or not result.digest:
            raise StageFailure(
                f"{job.uses} returned {_of_type(result)}, its signature says {kind.output.__name__}: "
                f"end it with `return stage.publish({kind.output.__name__}, ...)`"
            )
        return replace(context.outcome, output=result.digest, output_kind=result.kind)
    except Stopped:
        return Outcome(stopped=True)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a stage that calls sys.exit has failed like any other
        # a gang's failure brings its own paragraph and the rank's traceback
        trace = getattr(error, "traceback", None) or traceback.format_exc()
        return replace(context.outcome if context else Outcome(), error=_in_words(error, job), traceback=trace)
    finally:
        if context is not None:
            context.discard()


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """As many threads as the stage holds CPUs: the same bits need the same threads.

    What a library has not read yet stands in the environment; torch, once it is loaded, has to be told.
    """
    names = ("OMP_NUM_THREADS", "RAYON_NUM_THREADS")  # torch's, and those of tokenizers
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, str(count)))
    torch = sys.modules.get("torch")
    threads_before = torch.get_num_threads() if torch else None
    if torch:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        if torch:
            torch.set_num_threads(threads_before)


class Context:
    """`StageContext` as the runner implements it."""

    def __init__(self, job: Job, store: Store, emit: Callable[[Event], None], should_stop: Callable[[], bool]) -> None:
        self.seed = job.seed
        self.device = "cuda" if job.resources.gpus else "cpu"
        self.sources = job.sources
        self.outcome = Outcome(host=socket.gethostname(), pid=os.getpid(), versions=versions())
        self._job = job
        self._store = store
        self._emit = emit
        self._should_stop = should_stop
        self._output: Path | None = None
        self._readers: list[_Planned] = []
        self._shown_at_s = 0.0

    @property
    def output(self) -> Path:
        if self._output is None:
            self._output = self._store.new_folder()
        return self._output

    def open(self, source: Source) -> BinaryIO:
        reader = _Planned(source)
        self._readers.append(reader)
        return cast(BinaryIO, io.BufferedReader(reader, buffer_size=1 << 20))

    def function(self, reference: str) -> Callable[..., Any]:
        if reference not in self._job.functions:
            raise ValueError(
                f"{reference!r} is no value of a setting of type UserFunction; {self._job.uses} has {list(self._job.functions)}"
            )
        return load_function(self._job.functions[reference], self._job.user_folder)[0]

    def progress(self, done: int, total: int, unit: str) -> None:
        if self._should_stop():
            raise Stopped
        if done >= total or time.monotonic() - self._shown_at_s > PROGRESS_EVERY_S:
            self._shown_at_s = time.monotonic()
            self._emit({"type": "progress", "done": _count(done), "total": _count(total), "unit": unit})

    def log(self, step: int, values: dict[str, float]) -> None:
        values = {name: _number(name, value) for name, value in values.items()}
        step = int(step)
        now_ms = time.time_ns() // 1_000_000
        self._keep([[name, step, value, now_ms] for name, value in values.items()])
        self._emit({"type": "points", "points": [[name, step, value, now_ms] for name, value in values.items()]})

    def figure(self, name: str, value: float) -> None:
        self.outcome = replace(self.outcome, figures=self.outcome.figures | {name: _number(name, value)})

    def gang(self, function: Callable[..., dict[str, Any] | None], *arguments: Any) -> dict[str, Any]:
        from cluster.gang import GangSpec, run_gang, run_inline

        job, resources, config = self._job, self._job.resources, self._job.config
        module, name = ENGINES["torch" if job.inline else config["engine"]].split(":")
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
            max_restarts=config["max_restarts"],
            start_deadline_s=config["start_deadline_s"],
        )
        run = run_inline if job.inline else run_gang
        result = run(function, (*arguments,), spec=spec, on_event=self._emit, should_stop=self._should_stop)
        self._keep(result.history)
        self.outcome = replace(self.outcome, restarts=result.restarts, resumed_from_step=result.resumed_from_step)
        if result.stopped:
            raise Stopped
        return cast(dict[str, Any], result.value)

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

    def discard(self) -> None:
        """Drop what was written and never published."""
        if self._output is not None:
            import shutil

            shutil.rmtree(self._output, ignore_errors=True)

    def _keep(self, points: list[list[Any]]) -> None:
        curves = {name: list(points) for name, points in self.outcome.curves.items()}
        for name, step, value, time_ms in points:
            curves.setdefault(name, []).append((step, value, time_ms))
        self.outcome = replace(self.outcome, curves=curves)


class _Planned(io.RawIOBase):
    """A source as it is read; what was read must be what the stage's key holds."""

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
        while chunk := self._file.read(1 << 20):  # a reader that stopped early still must have read what was planned
            self._hash.update(chunk)
        self._file.close()
        if self._hash.hexdigest() != self._source.sha256:
            self._fault = StageFailure(f"{self._source.name} was changed after this run was planned; run again to read it as it is now")
            raise self._fault

    def verify(self) -> None:
        """What `close` raised, also where nobody heard it: Python closes a forgotten file, and drops what that raises."""
        self.close()
        if self._fault is not None:
            raise self._fault


def _breach(kind: type[Artifact], folder: Path, metadata: dict[str, Any]) -> str | None:
    """How a folder and its metadata fall short of their kind, as the end of a sentence; None when they are what the kind promises."""
    for name in kind.files:
        if not (folder / name).is_file():
            return f"without {name}: write it into stage.output; {kind.__name__} holds {', '.join(kind.files)}"
    for name, example in kind.required.items():
        if not _alike(metadata.get(name), example):
            found = f"with metadata {name} = {metadata[name]!r}" if name in metadata else f"without metadata {name}"
            others = "".join(f", {other}=..." for other in kind.required if other != name)
            return f"{found}; wanted, for example, stage.publish({kind.__name__}, {name}={example!r}{others})"
    return None


def _alike(found: Any, example: Any) -> bool:
    if isinstance(example, dict):
        return isinstance(found, dict) and all(_alike(found.get(name), part) for name, part in example.items())
    return isinstance(found, type(example))


def _number(name: str, value: Any) -> float:
    check_metric_name(name)
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"metric {name!r} is {value!r}, wanted a number") from None


def _count(value: Any) -> float:
    """A plain number of what may be numpy's: events are written as JSON, by a process that knows none of those."""
    number = float(value)
    return int(number) if number.is_integer() else number


def _in_words(error: BaseException, job: Job) -> str:
    if isinstance(error, (StageFailure, GangFailure)):
        return str(error)
    places = [frame for frame in traceback.extract_tb(error.__traceback__) if "site-packages" not in frame.filename]
    own = [frame for frame in places if Path(frame.filename).is_relative_to(job.user_folder)]  # a user's own line says most
    places = own or places
    where = f" ({Path(places[-1].filename).name}, line {places[-1].lineno})" if places else ""
    try:
        message = str(error)
    except Exception:
        message = "an exception without words"
    return f"{type(error).__name__}: {message}{where}"


def _of_type(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, Artifact):
        return f"artifact {type(value).__name__}" if value.digest else f"an unpublished {type(value).__name__}"
    return f"a {type(value).__name__}"
