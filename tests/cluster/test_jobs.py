"""The client of a job server: which addresses it accepts, which token it sends, and how it reports other servers."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cluster.jobs import Jobs, JobState, on_loopback, token


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder and an environment without a token."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:8265", r"'127.0.0.1:8265' is not a URL; .*; did you mean http://127.0.0.1:8265\?$"),
        ("head", r"'head' is not a URL; expected the URL of a cluster's dashboard, such as http://127.0.0.1:8265$"),
        ("ray://head:10001", "'ray://head:10001' is not a URL"),
        ("http://", "'http://' is not a URL"),
        ("http://head:port", "'http://head:port' is not a URL"),
        ("http://[::1:8265", "is not a URL"),
        ("http://ada:secret@127.0.0.1:8265", "^--address contains a password, but addresses are recorded"),
    ],
)
def test_an_address_that_is_not_a_dashboards_is_refused_with_an_example(address: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Jobs(address)


def test_a_password_in_an_address_is_not_repeated() -> None:
    with pytest.raises(ValueError, match="contains a password") as caught:
        Jobs("http://ada:secret@127.0.0.1:8265")
    assert "secret" not in str(caught.value)


def test_no_job_is_sent_to_another_machine_without_a_token() -> None:
    with pytest.raises(ValueError, match=r"^http://192.0.2.7:8265 is another machine and no token was found: .* or pass --insecure$"):
        Jobs("http://192.0.2.7:8265")


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("10.0.0.5", False),
        ("head", False),
    ],
)
def test_only_loopback_addresses_count_as_this_machine(host: str, expected: bool) -> None:
    assert on_loopback(host) is expected


def test_the_token_is_looked_up_in_rays_order(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert token() is None
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("of the home folder\n")
    assert token() == "of the home folder"
    (home / "named").write_text("of the file\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(home / "named"))
    assert token() == "of the file"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of the environment")
    assert token() == "of the environment"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert token() is None


def test_a_missing_token_file_that_a_variable_names_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(home / "nowhere"))
    with pytest.raises(ValueError, match="nowhere can't be read"):
        token()


class Dashboard(ThreadingHTTPServer):
    """Answers by path, and records requests: (method, path, Authorization header, body)."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.answers: dict[str, tuple[int, str]] = {"/api/version": (200, json.dumps({"ray_version": "2.60.0"}))}
        self.requests: list[tuple[str, str, str | None, str]] = []
        self.address = f"http://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    server: Dashboard

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        self.server.requests.append((self.command, self.path, self.headers.get("Authorization"), body))
        code, text = self.server.answers.get(self.path, (404, "no such page"))
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text.encode())

    do_POST = do_GET

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def dashboard() -> Iterator[Dashboard]:
    server = Dashboard()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def details(**fields: object) -> str:
    return json.dumps({"type": "SUBMISSION", "submission_id": "run-1", "entrypoint": "exec true", "status": "PENDING"} | fields)


@pytest.mark.slow
def test_a_job_is_sent_once_with_its_name_60_s_to_stop_and_the_token(dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "s3cret")
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    dashboard.answers["/api/jobs/"] = (200, json.dumps({"job_id": "run-1", "submission_id": "run-1"}))
    Jobs(f"{dashboard.address}/").submit("run-1", "exec true", {"NAME": "value"})
    (sent,) = [request for request in dashboard.requests if request[0] == "POST"]
    assert sent[1:3] == ("/api/jobs/", "Bearer s3cret")
    body = json.loads(sent[3])
    assert (body["submission_id"], body["entrypoint"]) == ("run-1", "exec true")
    assert body["runtime_env"]["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "60", "NAME": "value"}
    assert os.environ["RAY_ADDRESS"] == "http://127.0.0.1:1"


@pytest.mark.slow
def test_a_jobs_state_log_and_stop_are_requested_by_its_name(dashboard: Dashboard) -> None:
    jobs = Jobs(dashboard.address)
    assert (jobs.state("run-1"), jobs.log("run-1")) == (None, "")
    jobs.stop("run-1")
    dashboard.answers["/api/jobs/run-1"] = (200, details(status="FAILED", message="exit code -9", driver_exit_code=-9))
    dashboard.answers["/api/jobs/run-1/logs"] = (200, json.dumps({"logs": "a line\n"}))
    assert jobs.state("run-1") == JobState("FAILED", "exit code -9", -9)
    assert jobs.log("run-1") == "a line\n"
    assert dashboard.requests[4][:2] == ("POST", "/api/jobs/run-1/stop")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "given", "message"),
    [
        (401, "", "requires a token and none was found; set it in RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token$"),
        (403, "another", "rejects this token; correct it in RAY_AUTH_TOKEN"),
    ],
)
def test_a_missing_and_a_wrong_token_are_reported_as_such(
    dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch, code: int, given: str, message: str
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", given)
    dashboard.answers["/api/version"] = (code, "no")
    with pytest.raises(PermissionError, match=message):
        Jobs(dashboard.address)


@pytest.mark.slow
@pytest.mark.parametrize("answer", [(404, "no such page"), (500, "out of order"), (200, "<html>"), (200, "{}")])
def test_a_server_that_is_not_a_dashboard_is_reported_as_such(dashboard: Dashboard, answer: tuple[int, str]) -> None:
    dashboard.answers["/api/version"] = answer
    with pytest.raises(ConnectionError, match=r"does not answer like Ray's dashboard .* expected the dashboard's address, port 8265"):
        Jobs(dashboard.address)


@pytest.mark.slow
def test_a_refusal_by_the_cluster_quotes_the_last_line_of_its_traceback(dashboard: Dashboard) -> None:
    dashboard.answers["/api/jobs/"] = (500, 'Traceback (most recent call last):\n  File "a.py"\nValueError: Job run-1 already exists\n')
    with pytest.raises(ConnectionError, match="refused: ValueError: Job run-1 already exists"):
        Jobs(dashboard.address).submit("run-1", "exec true", {})


@pytest.mark.slow
def test_an_address_where_nothing_listens_is_reported_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(ConnectionError, match=rf"^nothing listens at http://127.0.0.1:{port} \(connection refused\)"):
        Jobs(f"http://127.0.0.1:{port}")


@pytest.mark.slow
def test_a_server_that_closes_connections_is_reported_as_not_a_dashboard(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def hang_up(accept: Callable[[], tuple[socket.socket, object]]) -> None:
            for _ in range(2):
                accept()[0].close()

        thread = threading.Thread(target=hang_up, args=(server.accept,), daemon=True)
        thread.start()
        with pytest.raises(ConnectionError, match="does not answer like Ray's dashboard"):
            Jobs(f"http://127.0.0.1:{server.getsockname()[1]}")
