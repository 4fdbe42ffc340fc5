"""Rewards from a user's own function: `def score(prompt, response, record): ...` in a file beside the pipeline's.

    prompt      the messages, [{"role": "user", "content": "What is 2 + 2?"}]
    response    the policy's answer, as text
    record      the prompt's whole record: its `reference` (None if it has none), its `source`, the fields that the prompts stage kept
    -> a finite number

The function is called once for each finished response, and should depend on its arguments only: what it remembers between calls or draws
at random is not restored when a run resumes. It runs in a separate process beside each rank (`gpt/rl/reward_process.py`), with a time
limit per call and a memory limit for the process. A call fails if it raises, returns anything but a finite number, exceeds its time limit,
or ends its process. After the last two, a new process is started for the next response. How many calls may fail is the loop's decision.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import reprlib
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from gpt.rl import reward_process
from gpt.rl.scoring import Rollout, Scores

START_LIMIT_S = 60.0
"""Time in which a new process must import the function's file."""


@dataclass
class FunctionScorer:
    """`FunctionScorer.of(score, max_failures=3, timeout_s=5.0, memory_gib=2.0)`.

    It holds the function's name, so the rank that receives it does not import the function's file.
    """

    file: str
    module: str
    function: str
    max_failures: int
    """After one more failure, the rest of the step's responses are not tried: the loop will stop anyway, and a function that hangs would
    hold it up for hours."""
    timeout_s: float
    memory_gib: float

    @classmethod
    def of(cls, function: Callable[..., Any], **limits: Any) -> FunctionScorer:
        """Name a function at the top level of its file, as `StageContext.function` returns it."""
        return cls(str(sys.modules[function.__module__].__file__), function.__module__, function.__name__, **limits)

    def open(self, device: torch.device) -> None:
        self._process: _Process | None = self._start()

    def scores(self, rollouts: Sequence[Rollout]) -> Scores:
        scores = torch.full((len(rollouts),), math.nan, dtype=torch.float64)  # (B,) as wide as Python's own floats
        failures: dict[int, str] = {}
        for row, rollout in enumerate(rollouts):
            if len(failures) > self.max_failures:
                failures[row] = f"not tried after {len(failures)} failures"
                continue
            reply = self._score(rollout)
            if "score" in reply:
                scores[row] = reply["score"]
            else:
                failures[row] = f"{self.function}() of {os.path.basename(self.file)} on {reprlib.repr(rollout.text)}: {reply['failure']}"
        return Scores(scores, failures)

    def _score(self, rollout: Rollout) -> dict[str, Any]:
        if self._process is None:
            self._process = self._start()
        try:
            request = {"response": rollout.text, "record": rollout.record}
            return self._process.request(request, self.timeout_s, f"reward_timeout_s = {self.timeout_s:g} s")
        except _ProcessLost as error:
            self._process = None
            return {"failure": str(error)}

    def _start(self) -> _Process:
        process = _Process()
        request = {
            "file": self.file,
            "module": self.module,
            "function": self.function,
            "path": sys.path,
            "memory_bytes": int(self.memory_gib * 2**30),
        }
        try:
            reply = process.request(request, START_LIMIT_S, f"{START_LIMIT_S:g} s")
        except _ProcessLost as error:
            reply = {"failure": str(error)}
        if "failure" in reply:
            raise ValueError(
                f"{self.file} cannot be imported in its own process with reward_memory_gib = {self.memory_gib:g}: {reply['failure']}; "
                "fix the file, or raise reward_memory_gib"
            )
        return process


class _ProcessLost(Exception):
    """The process gave no reply and is gone; the message says how."""


class _Process:
    """A process that runs `gpt/rl/reward_process.py`. It ends when this object is garbage-collected."""

    def __init__(self) -> None:
        self._connection, child_end = multiprocessing.Pipe()
        with child_end:
            self._process = subprocess.Popen(
                [sys.executable, "-B", "-P", reward_process.__file__, str(child_end.fileno()), str(os.getpid())],
                pass_fds=[child_end.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,
                # Ctrl-C is for the rank to handle. Whatever the function starts ends with this session, unless it begins its own.
                start_new_session=True,
                # So that the order of a set is the same when a run resumes.
                env={**os.environ, "PYTHONHASHSEED": "0"},
            )
        self._end = weakref.finalize(self, _end, self._process, self._connection)

    def request(self, content: dict[str, Any], limit_s: float, limit: str) -> dict[str, Any]:
        """Return the reply; _ProcessLost if there is none within `limit_s`, which `limit` names in the message."""
        try:
            self._connection.send_bytes(json.dumps(content).encode())
            if self._connection.poll(limit_s):
                return json.loads(self._connection.recv_bytes())
            reason = f"did not return within {limit}"
        except (EOFError, OSError):
            reason = self._how_it_ended()
        self._end()
        raise _ProcessLost(reason)

    def _how_it_ended(self) -> str:
        try:
            status = self._process.wait(timeout=1)  # its end of the connection closes a moment before the process is gone
        except subprocess.TimeoutExpired:
            return "closed the connection to its rank"
        return f"ended its process by {signal.Signals(-status).name}" if status < 0 else f"ended its process with exit status {status}"


def _end(process: subprocess.Popen[bytes], connection: Connection) -> None:
    connection.close()
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
