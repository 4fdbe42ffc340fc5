"""Where rewards come from besides a reward model: a function of the user's own, and a verifier of numbers.

A user's function is `def score(prompt, response, record): ...` in a file beside the pipeline's:

    prompt      the messages, [{"role": "user", "content": "What is 2 + 2?"}]
    response    what the policy answered, as text
    record      the prompt's whole record: its `reference` (None where it has none), its `source`, the fields that ingest kept
    -> a finite number

It is called once for each finished response, and should depend on nothing but what it is given: what it remembers between calls or draws
at random is not restored when a run resumes. It runs in a process of its own beside each rank (`gpt/reward_process.py`), with a limit of
time for each call and of memory for the process. A call that raises, returns no finite number, runs past its limit or ends its process has
failed; after the last two the process is started again for the next response. What share of calls may fail is the loop's to say.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import re
import reprlib
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from multiprocessing.connection import Connection
from typing import Any

import torch

from gpt import reward_process
from gpt.rl import Rollout, Scores

START_LIMIT_S = 60.0
"""For a fresh process to import the function's file."""

_NUMBER = re.compile(
    r"""\s*
    ([-+]?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+))
    (?![.,/:-]?[0-9]|[eE][-+]?[0-9])  # not the beginning of a date, a fraction, 1,23 or 1e5
    """,
    re.VERBOSE,
)


@dataclass
class FunctionScorer:
    """`FunctionScorer.of(score, max_failures=3, timeout_s=5.0, memory_gib=2.0)`.

    It names the function, so that the rank that it is sent to does not import its file.
    """

    file: str
    module: str
    function: str
    max_failures: int
    """After one more the other responses of a step are not tried: the loop stops anyway, and a function that hangs would take all day."""
    timeout_s: float
    memory_gib: float

    @classmethod
    def of(cls, function: Callable[..., Any], **limits: Any) -> FunctionScorer:
        """Of a function at the top of its file, as `StageContext.function` gives it."""
        return cls(str(sys.modules[function.__module__].__file__), function.__module__, function.__name__, **limits)

    def open(self, device: torch.device) -> None:
        self._process: _Process | None = self._start()

    def scores(self, rollouts: Sequence[Rollout]) -> Scores:
        scores = torch.full((len(rollouts),), math.nan, dtype=torch.float64)  # (B,) as wide as Python's own numbers
        failures: dict[int, str] = {}
        for row, rollout in enumerate(rollouts):
            if len(failures) > self.max_failures:
                failures[row] = f"not tried after {len(failures)} failures"
                continue
            answer = self._ask(rollout)
            if "score" in answer:
                scores[row] = answer["score"]
            else:
                failures[row] = f"{self.function}() of {os.path.basename(self.file)} on {reprlib.repr(rollout.text)}: {answer['failure']}"
        return Scores(scores, failures)

    def _ask(self, rollout: Rollout) -> dict[str, Any]:
        if self._process is None:
            self._process = self._start()
        try:
            question = {"response": rollout.text, "record": rollout.record}
            return self._process.ask(question, self.timeout_s, f"reward_timeout_s = {self.timeout_s:g} s")
        except _Lost as lost:
            self._process = None
            return {"failure": str(lost)}

    def _start(self) -> _Process:
        process = _Process()
        order = {
            "file": self.file,
            "module": self.module,
            "function": self.function,
            "path": sys.path,
            "memory_bytes": int(self.memory_gib * 2**30),
        }
        try:
            answer = process.ask(order, START_LIMIT_S, f"{START_LIMIT_S:g} s")
        except _Lost as lost:
            answer = {"failure": str(lost)}
        if "failure" in answer:
            raise ValueError(
                f"{self.file} can't be imported in a process of its own with reward_memory_gib = {self.memory_gib:g}: {answer['failure']}; "
                "mend the file, or give it more memory"
            )
        return process


class _Lost(Exception):
    """A process that gave no answer, and is gone. In words."""


class _Process:
    """One process of `gpt/reward_process.py`. It ends when nobody holds this any more."""

    def __init__(self) -> None:
        self._connection, theirs = multiprocessing.Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-B", "-P", reward_process.__file__, str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,
                # A Ctrl-C is the rank's to hear, and what the function starts ends with it, but for what begins a session of its own.
                start_new_session=True,
                # So that the order of a set does not differ when a run resumes.
                env={**os.environ, "PYTHONHASHSEED": "0"},
            )
        self._end = weakref.finalize(self, _end, self._process, self._connection)

    def ask(self, question: dict[str, Any], limit_s: float, limit: str) -> dict[str, Any]:
        """The answer; _Lost where there was none within the limit, which is `limit` in words."""
        try:
            self._connection.send_bytes(json.dumps(question).encode())
            if self._connection.poll(limit_s):
                return json.loads(self._connection.recv_bytes())
            words = f"gave no answer within {limit}"
        except (EOFError, OSError):
            words = self._how_it_ended()
        self._end()
        raise _Lost(words)

    def _how_it_ended(self) -> str:
        try:
            status = self._process.wait(timeout=1)  # its end of the connection closes a moment before it is gone
        except subprocess.TimeoutExpired:
            return "closed the connection to its rank"
        return f"ended its process by {signal.Signals(-status).name}" if status < 0 else f"ended its process with exit status {status}"


def _end(process: subprocess.Popen[bytes], connection: Connection) -> None:
    connection.close()
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@dataclass(frozen=True)
class NumberScorer:
    """1 for a response whose number after the last marker equals the reference's, else 0: `NumberScorer("####")`, as in GSM8K.

    Cobbe et al. 2021 (arXiv:2110.14168).
    """

    marker: str

    def open(self, device: torch.device) -> None: ...

    def scores(self, rollouts: Sequence[Rollout]) -> Scores:
        return Scores(torch.tensor([float(self._is_right(rollout)) for rollout in rollouts]))

    def _is_right(self, rollout: Rollout) -> bool:
        reference = reference_number(rollout.record.get("reference"), self.marker)
        assert reference is not None, f"the record {rollout.record} has no number, which the stage should have refused"
        return number_after(rollout.text, self.marker) == reference


def number_after(text: str, marker: str) -> Decimal | None:
    """The number that follows the last marker: 1234 for "so #### 1,234 apples". None where no marker or no number does."""
    _, found, rest = text.rpartition(marker)
    number = _NUMBER.match(rest)
    return Decimal(number[1].replace(",", "")) if found and number else None


def reference_number(reference: str | None, marker: str) -> Decimal | None:
    """Of a reference that is a number, or a worked answer with the marker before it."""
    if reference is None:
        return None
    if marker in reference:
        return number_after(reference, marker)
    number = _NUMBER.fullmatch(reference.rstrip())
    return Decimal(number[1].replace(",", "")) if number else None
