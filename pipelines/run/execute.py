"""The worker's side of a stage: rebuild its arguments from a `Job`, call its function, report how it ended.

`stream` is the body of the Ray task; `execute` does the same in this process, for `--inline` and a debugger.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.events import StageEvent
from cluster.failures import GangFailure
from gpt.settings import Settings
from pipelines.artifacts import Artifact
from pipelines.plan.kinds import Kind, load_kind
from pipelines.run.context import Context, Stopped
from pipelines.run.job import Job, Outcome
from pipelines.stage import StageFailure
from pipelines.store.runs import StopMark
from pipelines.store.store import Store


def stream(job: Job) -> Generator[StageEvent, None, Outcome]:
    """The Ray task of a stage: yields its events, returns its outcome."""
    from cluster.ray_session import streamed

    should_stop = StopMark(Store(job.store), job.run)

    def work(emit: Callable[[StageEvent], None]) -> Outcome:
        return execute(job, emit, should_stop)

    return (yield from streamed(work))


def execute(job: Job, emit: Callable[[StageEvent], None], should_stop: Callable[[], bool]) -> Outcome:
    """Run a stage's function. Raises nothing but KeyboardInterrupt."""
    context = None
    try:
        store = Store(job.store)
        kind = load_kind(job.uses, job.user_folder)
        config = kind.config.model_validate(job.config)
        context = Context(job, config, store, emit, should_stop)
        with _threads(job.resources.cpus_per_rank if kind.trains() else job.resources.cpus):
            result = kind.function(**_arguments(job, kind, config, store, context))
        if not isinstance(result, kind.output) or not result.digest:
            raise StageFailure(
                f"{job.uses} returned {_type_in_words(result)}, its signature says {kind.output.__name__}: "
                f"end it with `return stage.publish({kind.output.__name__}, ...)`"
            )
        return replace(context.outcome, output=result.digest, output_kind=result.kind)
    except Stopped:
        return Outcome(stopped=True)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a stage that calls sys.exit has failed like any other
        # a gang's failure brings its own paragraph and its rank's traceback
        trace = getattr(error, "traceback", None) or traceback.format_exc()
        kept = context.keep_rejects() if context else ""
        return replace(context.outcome if context else Outcome(), error=_in_words(error, job) + kept, traceback=trace)
    finally:
        if context is not None:
            context.discard()


def _arguments(job: Job, kind: Kind, config: Settings, store: Store, context: Context) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    if kind.config_parameter:
        arguments[kind.config_parameter] = config
    if kind.stage_parameter:
        arguments[kind.stage_parameter] = context
    for name, parameter in kind.inputs.items():
        given = [store.artifact(digest, parameter.artifact) for digest in job.inputs.get(name, [])]
        arguments[name] = given if parameter.many else given[0] if given else None
    return arguments


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """Use as many threads as the stage holds CPUs: the same bits need the same threads.

    Libraries that are not loaded yet read the environment; torch, once loaded, must be told directly.
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


def _in_words(error: BaseException, job: Job) -> str:
    if isinstance(error, (StageFailure, GangFailure)):
        return str(error)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "site-packages" not in frame.filename]
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(job.user_folder)]  # a line of the user's own says most
    frames = own or frames
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    try:
        message = str(error)
    except Exception:
        message = "its message can't be printed"
    return f"{type(error).__name__}: {message}{where}"


def _type_in_words(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, Artifact):
        return f"artifact {type(value).__name__}" if value.digest else f"an unpublished {type(value).__name__}"
    return f"a {type(value).__name__}"
