"""The process that a user's reward function runs in: it loads one file, and scores a response whenever its rank asks.

    python gpt/reward_process.py CONNECTION RANK      (the number of an open file, and a process id; `gpt/scorers.py` starts it)

It imports nothing of ours and no torch, so that it starts at once and its memory limit is the function's own. What is printed in it goes
to stderr: nobody reads answers there. It ends with its rank, however that ends. Left out: a sandbox. The function is its owner's own code
and may read files and reach the network; what a model writes must not be executed here.
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
_MOST_CHARS = 200
"""Of an exception's message, which may quote all that the function was given."""


def serve(connection: Connection, rank: int) -> None:
    """Answer until the rank is gone. The first message says what to load, each later one is a response to score."""
    # The rank may be killed while the function computes, and so never see that its connection is closed.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != rank:
        return
    with contextlib.suppress(EOFError):
        order = json.loads(connection.recv_bytes())
        try:
            function = load(order)
        except BaseException as error:
            connection.send_bytes(_encoded({"failure": in_words(error, order["file"])}))
            return
        connection.send_bytes(_encoded({}))
        while True:
            asked = json.loads(connection.recv_bytes())
            connection.send_bytes(_encoded(judge(function, order["file"], asked["response"], asked["record"])))


def load(order: dict[str, Any]) -> Callable[..., Any]:
    """The function of `{"file": ..., "module": ..., "function": ..., "path": sys.path of the rank, "memory_bytes": ...}`."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Not RLIMIT_AS: libraries reserve far more addresses than they ever use.
    resource.setrlimit(resource.RLIMIT_DATA, (order["memory_bytes"], order["memory_bytes"]))
    # As where the file was first imported: our packages from the run's code, the file's neighbours last, where they shadow nothing.
    folder = os.path.dirname(order["file"])
    sys.path[:] = [*(each for each in order["path"] if each != folder), folder]
    spec = importlib.util.spec_from_file_location(order["module"], order["file"])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[order["module"]] = module
    spec.loader.exec_module(module)
    return getattr(module, order["function"])


def judge(function: Callable[..., Any], file: str, response: str, record: dict[str, Any]) -> dict[str, Any]:
    """`{"score": 0.5}`, or `{"failure": "ZeroDivisionError: division by zero (reward.py, line 3)"}`."""
    try:
        value = function(record["prompt"], response, record)
        if _is_number(value):
            return {"score": float(value)}
        return {"failure": f"returned {reprlib.repr(value)}, wanted a finite number"}
    except BaseException as error:  # one that calls sys.exit has failed like any other
        return {"failure": in_words(error, file)}


def in_words(error: BaseException, file: str) -> str:
    """The exception and the last line of the user's own file on its way."""
    try:
        message = str(error)[:_MOST_CHARS]
    except Exception:
        message = "an exception without words"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    where = f" ({os.path.basename(file)}, line {lines[-1]})" if lines else ""
    return f"{type(error).__name__}: {message}{where}"


def _is_number(value: Any) -> bool:
    """False too for a whole number that no float can hold, and for text that spells one."""
    try:
        return math.isfinite(value)
    except (TypeError, OverflowError):
        return False


def _encoded(answer: dict[str, Any]) -> bytes:
    return json.dumps(answer).encode()


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])), int(sys.argv[2]))
