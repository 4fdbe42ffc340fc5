"""The process in which a user's reward function runs: it loads one file, then scores each response that its rank sends.

    python gpt/rl/reward_process.py CONNECTION RANK    (an open file descriptor and a process id; `gpt/rl/user_reward.py` starts it)

It imports neither torch nor anything of ours, so that it starts at once and its memory limit covers only the function. Output printed
here goes to stderr, since replies do not use stdout. The process ends with its rank, however that ends. Left out: a sandbox. The function
is the user's own code and may read files and use the network; never execute here what a model writes.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import math
import os
import reprlib
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_MAX_CHARS = 200
"""Characters of an exception's message that are kept: it may quote everything that the function was given."""


def serve(connection: Connection, rank: int) -> None:
    """Reply to requests until the rank is gone. The first one names the function, each later one is a response to score."""
    # The rank may be killed while the function computes; then nothing here would notice the closed connection.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != rank:
        return
    with contextlib.suppress(EOFError):
        first = json.loads(connection.recv_bytes())
        try:
            function = load(first)
        except BaseException as error:
            connection.send_bytes(_encoded({"failure": describe(error, first["file"])}))
            return
        connection.send_bytes(_encoded({}))
        while True:
            request = json.loads(connection.recv_bytes())
            connection.send_bytes(_encoded(judge(function, first["file"], request["response"], request["record"])))


def load(request: dict[str, Any]) -> Callable[..., Any]:
    """Load the function of `{"file": ..., "module": ..., "function": ..., "path": the rank's sys.path, "memory_bytes": ...}`."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Not RLIMIT_AS: libraries reserve far more address space than they ever use.
    resource.setrlimit(resource.RLIMIT_DATA, (request["memory_bytes"], request["memory_bytes"]))
    # As where the file was first imported: our packages come from the run's code, and the file's neighbours come last, where they
    # shadow nothing.
    folder = os.path.dirname(request["file"])
    sys.path[:] = [*(each for each in request["path"] if each != folder), folder]
    spec = importlib.util.spec_from_file_location(request["module"], request["file"])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[request["module"]] = module
    spec.loader.exec_module(module)
    return getattr(module, request["function"])


def judge(function: Callable[..., Any], file: str, response: str, record: dict[str, Any]) -> dict[str, Any]:
    """Return `{"score": 0.5}`, or `{"failure": "ZeroDivisionError: division by zero (reward.py, line 3)"}`."""
    try:
        value = function(record["prompt"], response, record)
        if _is_number(value):
            return {"score": float(value)}
        return {"failure": f"expected a finite number, found {reprlib.repr(value)}"}
    except BaseException as error:  # a function that calls sys.exit has failed like any other
        return {"failure": describe(error, file)}


def describe(error: BaseException, file: str) -> str:
    """The exception, and the last line of the user's own file in its traceback."""
    try:
        message = str(error)[:_MAX_CHARS]
    except Exception:
        message = "an exception whose message cannot be read"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    location = f" ({os.path.basename(file)}, line {lines[-1]})" if lines else ""
    return f"{type(error).__name__}: {message}{location}"


def _is_number(value: Any) -> bool:
    """Whether the value is a finite number. False for an integer too large for a float, and for text that spells a number."""
    try:
        return math.isfinite(value)
    except (TypeError, OverflowError):
        return False


def _encoded(reply: dict[str, Any]) -> bytes:
    return json.dumps(reply).encode()


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])), int(sys.argv[2]))
