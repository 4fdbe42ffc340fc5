"""A session on a Ray cluster: open one, run a function as a task that streams its events back, query the nodes.

Workers import our packages from the code snapshot passed to `start`, so edits during a run have no effect. Leaves out gangs
(`cluster/gang.py`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import secrets
import socket
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from cluster.failures import describe_death
from cluster.room import remove_groups_of

LOOPBACK = ("127.", "localhost", "[::1]")
CONNECT_TIMEOUT_S = 5.0
START_ATTEMPTS = 2
E = TypeVar("E")
"""Type of the events that a task sends."""
R = TypeVar("R")
"""Type of its return value."""


class TaskDied(Exception):
    """A task's process ended without an answer: it was killed, crashed, ran out of memory, or its node was lost."""


@dataclass(frozen=True)
class Session:
    address: str
    """The address to which other drivers would connect."""
    local: bool
    """True if the session was started here; it then ends with this process."""


@contextlib.contextmanager
def start(
    address: str = "local",
    *,
    code_path: Path,
    cpus: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Session]:
    """Open a session for the `with` block: `local` starts one on the loopback interface, another address joins that cluster.

    Workers import `pipelines`, `gpt` and `cluster` from `code_path`. `environment` is set for every worker; folders in its
    PYTHONPATH come after `code_path`.
    """
    code_path = code_path.resolve()
    if not (code_path / "cluster").is_dir():
        raise ValueError(f"code_path = {code_path} has no folder cluster/; expected the folder that holds pipelines/, gpt/ and cluster/")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if address != "local":
        _check_reachable(address)
    if address == "local":
        _set_secret()
    if address == "local" or address.startswith(LOOPBACK):
        # Off, this switch of Ray's makes all of its processes listen only on the loopback interface. It is read when ray is imported.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    import ray

    if ray.is_initialized():
        raise RuntimeError("this process already has a Ray session; close it before starting another")
    options: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": logging.WARNING}
    workers = _worker_environment(code_path, environment or {})
    if address == "local":
        # Local workers inherit this process's environment: with a runtime_env, Ray couldn't start them ahead of time (1 s each).
        options |= {"num_cpus": cpus, "include_dashboard": False, "_node_ip_address": "127.0.0.1"}
        inherited = workers
    else:
        options["runtime_env"] = {"env_vars": workers}
        inherited = {}
    try:
        # Ray puts the folder in which the driver called init first on every worker's sys.path, before PYTHONPATH and editable installs.
        with contextlib.chdir(code_path), _environment(inherited):
            _init(options)
        session = Session(address=ray.get_runtime_context().gcs_address, local=address == "local")
        if session.local and not session.address.startswith(LOOPBACK):
            raise RuntimeError(
                f"the local Ray session would listen on {session.address}, expected a loopback address; call start before importing ray"
            )
        yield session
    finally:
        ray.shutdown()


def _init(options: Mapping[str, Any]) -> None:
    """Call `ray.init`, and once more if its processes were too slow: it gives them 30 s, which can't be configured."""
    import ray

    for _ in range(START_ATTEMPTS):
        try:
            ray.init(configure_logging=False, **options)
            return
        except Exception as error:  # Ray raises a bare Exception
            if "timed out during startup" not in str(error):
                raise
            ray.shutdown()
    raise RuntimeError(
        f"its processes did not start within 30 s, in {START_ATTEMPTS} attempts; the machine is too busy: end other work on it and retry"
    )


def _check_reachable(address: str) -> None:
    """Raise OSError at once if nothing listens, or after CONNECT_TIMEOUT_S without an answer; Ray itself would try for minutes.

    Names such as "auto" are left to Ray.
    """
    host, colon, port = address.rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()


def _worker_environment(code_path: Path, environment: Mapping[str, str]) -> dict[str, str]:
    path = os.pathsep.join(part for part in (str(code_path), environment.get("PYTHONPATH")) if part)
    return {**environment, "PYTHONPATH": path, "RAY_USAGE_STATS_ENABLED": "0"}


@contextlib.contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _set_secret() -> None:
    """Protect a local session with a token that is never written to a file, unless the user chose one.

    Without this, Ray would write a token into the home folder. Set once per process, since Ray's C++ side reads it once.
    """
    if "RAY_AUTH_MODE" not in os.environ and "RAY_AUTH_TOKEN" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


class Task(Generic[E, R]):
    """A submitted function. `poll` never blocks, so one driver can watch many tasks."""

    def __init__(self, name: str, stream: Any) -> None:
        self.name = name
        self.done = False
        self._stream = stream
        self._worker_id: str | None = None
        self._cancelled = False
        self._value: Any = None
        self._error: BaseException | None = None

    @property
    def started(self) -> bool:
        """Whether it was running at the last poll, rather than waiting for resources."""
        return self._worker_id is not None

    def poll(self) -> list[E]:
        """The events since the last poll."""
        import ray

        events: list[E] = []
        while not self.done:
            try:
                ready, _ = ray.wait([self._stream], timeout=0)
                if not ready:
                    break
                item = ray.get(next(self._stream))
            except StopIteration:
                self._finish(TaskDied(f"{self.name}: the task ended without a result; run again"))
            except Exception as error:
                self._finish(_readable_error(self.name, error))
            else:
                if isinstance(item, _Started):
                    self._worker_id = item.worker_id
                elif isinstance(item, _Finished):
                    self._value = item.value
                    self.done = True
                else:
                    events.append(item)
        return events

    def result(self) -> R:
        """The function's return value. Raises the function's exception, or TaskDied. Only valid once `done` is True."""
        assert self.done, "call poll() until done before result()"
        if self._error is not None:
            raise self._error
        return cast(R, self._value)

    def cancel(self) -> None:
        """End the task's process and everything it started; then `poll` until `done`."""
        import ray

        if not self.done:
            self._cancelled = True
            ray.cancel(self._stream, force=True)

    def _finish(self, error: BaseException) -> None:
        if isinstance(error, TaskDied):
            error = TaskDied(f"{self.name}: cancelled") if self._cancelled else error
        self._error = error
        self.done = True
        if isinstance(error, TaskDied) and self._worker_id is not None:
            with contextlib.suppress(Exception):  # a lost cluster has nothing to free, and the task's end is reported all the same
                remove_groups_of(self._worker_id)


@dataclass(frozen=True)
class _Started:
    worker_id: str


@dataclass(frozen=True)
class _Finished:
    value: Any


def submit(
    function: Callable[[Any], Generator[E, None, R]],
    payload: Any,
    *,
    name: str,
    cpus: float = 1,
    gpus: float = 0,
    memory_gib: float | None = None,
    labels: Mapping[str, str] | None = None,
    accelerator: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> Task[E, R]:
    """Run a module-level generator function as a task: it yields events and returns the result.

    Ray never retries it; the caller decides. A stage that runs a gang requests 0 CPUs, since the gang reserves its own.
    """
    import ray

    assert ray.is_initialized(), "open a session first, or Ray would start its own with other settings"
    options: dict[str, Any] = {
        "name": name,
        "num_cpus": cpus,
        "num_gpus": gpus,
        "max_retries": 0,
        "num_returns": "streaming",
        "memory": None if memory_gib is None else int(memory_gib * 2**30),
        "label_selector": dict(labels) if labels else None,
        "accelerator_type": accelerator,
        "runtime_env": {"env_vars": dict(environment)} if environment else None,
    }
    chosen = {key: value for key, value in options.items() if value is not None}
    body: Any = _stream  # Ray's annotations can't follow a generic function
    return Task(name, ray.remote(body).options(**chosen).remote(function, payload))


def _stream(function: Callable[[Any], Generator[E, None, Any]], payload: Any) -> Iterator[E | _Started | _Finished]:
    import ray

    yield _Started(ray.get_runtime_context().get_worker_id())
    value = yield from function(payload)
    yield _Finished(value)


def streamed(work: Callable[[Callable[[E], None]], R]) -> Generator[E, None, R]:
    """Run `work(emit)` in a thread and yield each event that it emits; returns its return value."""
    events: queue.SimpleQueue[E | None] = queue.SimpleQueue()
    outcome: list[Any] = []

    def run() -> None:
        try:
            with _private_output():
                outcome[:] = [True, work(events.put)]
        except BaseException as error:
            outcome[:] = [False, error]
        finally:
            events.put(None)

    thread = threading.Thread(target=run, name="stage", daemon=True)
    thread.start()
    while (event := events.get()) is not None:
        yield event
    thread.join()
    succeeded, value = outcome
    if not succeeded:
        raise value
    return cast(R, value)


@contextlib.contextmanager
def _private_output() -> Iterator[None]:
    """Undo changes to stdout and stderr at the end: Ray writes to them before each later task of this process, and fails if it can't."""
    kept = {number: os.dup(number) for number in (1, 2)}
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, errors="backslashreplace", closefd=False) for number in kept)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for number, copy in kept.items():
            os.dup2(copy, number)
            os.close(copy)


def _readable_error(name: str, error: Exception) -> BaseException:
    """The function's own exception, or a TaskDied whose message says why the process ended."""
    from ray import exceptions as rays

    if isinstance(error, rays.RayTaskError):
        cause = error.as_instanceof_cause().cause if hasattr(error, "as_instanceof_cause") else error.cause
        return cause if isinstance(cause, BaseException) else error
    return TaskDied(f"{name}: its process {describe_death(error)}")


def ask_nodes(question: Callable[[], str | None], deadline_s: float) -> dict[str, str]:
    """Run `question` on every node, without reserving resources: {"node7 (10.0.0.7)": its answer}; answers of None are left out.

    A node that raises or doesn't answer within `deadline_s` seconds has that as its answer. To reach nodes that lack our packages,
    define `question` inside another function and let it import what it needs: then Ray sends its code rather than its name.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    names = {}
    for node in (node for node in ray.nodes() if node["Alive"]):
        on_node = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ref = ray.remote(question).options(num_cpus=0, max_retries=0, scheduling_strategy=on_node).remote()
        names[ref] = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
    answered, silent = ray.wait(list(names), num_returns=len(names), timeout=deadline_s)
    answers: dict[str, str | None] = {}
    for ref in answered:
        try:
            answers[names[ref]] = ray.get(ref)
        except Exception as error:
            answers[names[ref]] = f"can't answer: {_readable_error('the question', error)}"
    for ref in silent:
        ray.cancel(ref, force=True)
        answers[names[ref]] = f"did not answer within {deadline_s:g} s"
    return {node: answer for node, answer in answers.items() if answer is not None}
