"""What surrounds a run's loop: the Ray session, opened when the first stage needs it, and the signals that stop the run."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType, TracebackType

from pipelines.plan.config import Fault
from pipelines.plan.graph import Graph, Stage
from pipelines.run.preflight import lacks_in_cluster, unshared
from pipelines.store.store import Store


class Interrupts:
    """Turns SIGINT and SIGTERM into a request to stop; a second signal raises KeyboardInterrupt."""

    def __init__(self, at_once: Callable[[], bool] = lambda: False) -> None:
        """`at_once` says whether even the first signal must raise: an inline stage that does not train has no step to finish."""
        self.number: int | None = None
        """The signal that the run is to end with; None while it is to go on."""
        self._at_once = at_once

    def request(self, number: int) -> None:
        """Stop as if this signal had been received, unless one was received before."""
        self.number = self.number or number

    @contextlib.contextmanager
    def handled(self) -> Iterator[None]:
        before = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            raise KeyboardInterrupt
        self.number = number
        if self._at_once():
            raise KeyboardInterrupt


class Session:
    """The context of a run's loop: `with Session(...) as session`. It starts or joins Ray only when a stage needs it."""

    def __init__(
        self, graph: Graph, store: Store, code: Path, interrupts: Interrupts, announce: Callable[[str], None], *, inline: bool
    ) -> None:
        """`code` is the snapshot that workers import from."""
        self._graph = graph
        self._store = store
        self._code = code
        self._interrupts = interrupts
        self._announce = announce
        self._inline = inline
        self._joined = False
        self._handles_signals = False
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Session:
        if self._inline:
            self._stack.enter_context(_importable(self._code))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, trace)

    def open_for(self, stages: list[Stage]) -> None:
        """Be ready to run these stages. ConfigError says which of them the machines can never hold; waiting would never end."""
        if stages and not self._inline and not self._joined:
            self._joined = True
            self._stack.enter_context(self._ray())
            if faults := [*lacks_in_cluster(stages), *(unshared(self._store) if self._is_remote() else [])]:
                raise self._graph.loaded.error(faults)
            self._handles_signals = False  # Ray installed a SIGTERM handler of its own
        if not self._handles_signals:
            self._handles_signals = True
            self._stack.enter_context(self._interrupts.handled())

    def on_exit(self, action: Callable[[], object]) -> None:
        """Call this when the session ends, before Ray is left."""
        self._stack.callback(action)

    def _is_remote(self) -> bool:
        return self._graph.loaded.file.cluster.address != "local"

    @contextlib.contextmanager
    def _ray(self) -> Iterator[None]:
        from cluster import ray_session

        address = self._graph.loaded.file.cluster.address
        self._announce("starting Ray on this machine" if address == "local" else f"joining the Ray cluster {address}")
        environment = {"PYTHONDONTWRITEBYTECODE": "1"}  # the snapshot is an artifact: nothing may write into it
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(ray_session.start(address, code_path=self._code, environment=environment))
            except (OSError, RuntimeError, ValueError) as error:
                what = f"{address!r} can't be joined: {error}" if address != "local" else f"Ray does not start here: {error}"
                raise self._graph.loaded.error([Fault("cluster.address", what)]) from error
            yield


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Let processes that an inline stage starts find the user's code where those of a Ray worker find it."""
    sys.path.append(str(folder))  # last: everything else in it is importable already
    try:
        yield
    finally:
        sys.path[:] = [each for each in sys.path if each != str(folder)]  # whatever a stage did to it


def faults_here(stages: Iterable[Stage], graph: Graph, *, inline: bool) -> list[Fault]:
    """What this machine can never hold of stages that would run on it."""
    from pipelines.run.preflight import lacks_here

    return [] if inline or graph.loaded.file.cluster.address != "local" else lacks_here(stages)
