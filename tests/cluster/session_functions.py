"""Functions that the tests run as tasks."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

from cluster import ray_session
from cluster.gang import run_gang
from cluster.gang_spec import GangSpec


def whereabouts(rank: Any) -> dict[str, Any]:
    import cluster.marker

    import gpt.settings

    return {"marker": cluster.marker.VALUE, "gpt": gpt.settings.__file__}


def count(payload: int) -> Generator[dict[str, Any], None, str]:
    for number in range(payload):
        yield {"number": number}
    return f"counted to {payload}"


def sleep(payload: float) -> Generator[dict[str, Any], None, None]:
    yield {"asleep": True}
    time.sleep(payload)


def where_code_comes_from(payload: str) -> Generator[dict[str, Any], None, dict[str, Any]]:
    from gpt.torch_engine import TorchEngine

    yield {"task": whereabouts(None)}
    spec = GangSpec(name="where", make_engine=TorchEngine, work=Path(payload), identity={})
    result = yield from ray_session.streamed(lambda emit: run_gang(whereabouts, (), spec=spec, on_event=emit, should_stop=lambda: False))
    return result.value


def fail(payload: str) -> Generator[dict[str, Any], None, None]:
    yield {"before": "the end"}
    raise ValueError(payload)


def die(payload: str) -> Generator[dict[str, Any], None, None]:
    yield {"before": "the end"}
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)


def leave(payload: str) -> Generator[dict[str, Any], None, None]:
    yield {"before": "the end"}
    os._exit(3)


def break_output(payload: str) -> Generator[dict[str, Any], None, str]:
    def work(emit: Any) -> str:
        if payload == "closed":
            sys.stdout.close()
            sys.stderr.close()
        elif payload == "none":
            sys.stdout = sys.stderr = None  # type: ignore[assignment]
        else:
            os.close(1)
            os.close(2)
        emit({"broken": payload})
        return "done"

    return (yield from ray_session.streamed(work))


def wait_for_ever(rank: Any) -> None:
    with rank.section("wait", 600):
        time.sleep(600)


def stage_with_a_gang(payload: str) -> Generator[dict[str, Any], None, None]:
    from gpt.torch_engine import TorchEngine

    yield {"pid": os.getpid()}
    spec = GangSpec(name="pretrain", ranks=2, make_engine=TorchEngine, work=Path(payload), identity={})
    yield from ray_session.streamed(lambda emit: run_gang(wait_for_ever, (), spec=spec, on_event=emit, should_stop=lambda: False))
