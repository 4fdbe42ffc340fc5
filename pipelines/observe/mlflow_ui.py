"""Serves MLflow's web pages for `gptline ui`."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress

from pipelines.observe.delivery import sync
from pipelines.observe.mlflow_address import ENVIRONMENT, resolve_uri, run_uri, unreachable
from pipelines.store.store import Store

EXPERIMENTS = "#/experiments?workflowType=machine_learning"
"""The page of training runs. The server's root shows another kind of work."""


def serve_ui(store: Store, uri: str | None, port: int, say: Callable[[str], None], dead: Iterable[str] = ()) -> int:
    """Deliver what MLflow lacks, then serve its pages on this machine until Ctrl-C. The exit code.

    A server elsewhere is only named. Without a `uri` it is the MLflow of the newest run, and servers of older ones are named too.
    """
    for line in sync(store, uri, dead):
        say(line)
    uris = [uri] if uri is not None else [*dict.fromkeys(run_uri(store, run) for run in reversed(store.runs()))] or ["sqlite"]
    servers = [each for each in uris if each.startswith(("http://", "https://"))]
    databases = [each for each in uris if each not in servers]
    for each in servers:
        say(f"{each.rstrip('/')}/{EXPERIMENTS}")
    if not databases:
        return 0
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            say(f"port {port} of 127.0.0.1 can't be used ({error.strerror}); give another one with --port")
            return 2
    server = subprocess.Popen(
        ui_command(store, databases[0], port), env={**ENVIRONMENT, **os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    )
    try:
        while server.poll() is None and unreachable(f"http://127.0.0.1:{port}") is not None:
            time.sleep(0.3)
        if server.poll() is None:
            say(f"http://127.0.0.1:{port}/{EXPERIMENTS}   (Ctrl-C ends it)")
        return server.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        server.terminate()
        with suppress(subprocess.TimeoutExpired):
            server.wait(10)
        server.kill()


def ui_command(store: Store, uri: str, port: int) -> list[str]:
    """The server's command: one worker and no job runners, which makes 2 processes instead of 15."""
    return [
        *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", resolve_uri(uri, store)),
        *("--artifacts-destination", str(store.machine_file("mlflow-artifacts").resolve())),
    ]
