"""Which MLflow a run belongs to, and whether it can be reached. Imports nothing heavy."""

from __future__ import annotations

import http.client
from urllib.parse import urlsplit

from pipelines.store.runs import RunFolder
from pipelines.store.store import Store

CONNECT_S, ANSWER_S = 2.0, 5.0
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # with the default of 7, one call to a dead server blocks for 246 s
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # or each run that ends prints two lines with pictures
    "MLFLOW_ALLOW_MODEL_CODE_EXECUTION": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
}
"""What MLflow reads when it is imported. Variables that the user has set take precedence."""


def resolve_uri(uri: str, store: Store) -> str:
    """The address in MLflow's terms: `sqlite` means the store's own database."""
    return f"sqlite:///{store.machine_file('mlflow.db').resolve()}" if uri == "sqlite" else uri


def short_uri(uri: str, store: Store) -> str:
    """`sqlite` for the store's own database, however it was given, so that a cursor stays valid when the store is moved."""
    return "sqlite" if uri == resolve_uri("sqlite", store) else uri


def run_uri(store: Store, run: str) -> str:
    """The MLflow that a run was started with."""
    return short_uri(RunFolder(store, run).record().tracking.get("uri", "sqlite"), store)


def unreachable(uri: str) -> str | None:
    """Why a server can't be reached, found within seconds; None if it answers, or if it is a database."""
    address = urlsplit(uri)
    if address.scheme not in ("http", "https"):
        return None
    connection_class = http.client.HTTPSConnection if address.scheme == "https" else http.client.HTTPConnection
    connection = connection_class(address.hostname or "", address.port, timeout=CONNECT_S)
    try:
        connection.connect()
        if connection.sock is not None:
            connection.sock.settimeout(ANSWER_S)
        connection.request("GET", f"{address.path.rstrip('/')}/health")
        status = connection.getresponse().status
    except TimeoutError:
        return "no answer in time"
    except OSError as error:
        return (error.strerror or str(error) or type(error).__name__).lower()
    except http.client.HTTPException as error:
        return f"not an HTTP answer: {error!r}"
    finally:
        connection.close()
    return f"it answers with HTTP {status}" if status >= 500 else None
