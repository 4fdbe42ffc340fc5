"""The door to a job server: which addresses it takes, which token it shows, and what it says of those who answer otherwise."""

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
    """No token anywhere."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("127.0.0.1:8265", r"'127.0.0.1:8265' is no URL; .*; did you mean http://127.0.0.1:8265\?$"),
        ("head", r"'head' is no URL; wanted the address of a cluster's dashboard, such as http://127.0.0.1:8265$"),
        ("ray://head:10001", "'ray://head:10001' is no URL"),
        ("http://", "'http://' is no URL"),
        ("http://head:port", "'http://head:port' is no URL"),
        ("http://[::1:8265", "is no URL"),
        ("http://ada:secret@127.0.0.1:8265", "^--address holds a password, and addresses are recorded"),
    ],
)
def test_what_is_no_address_of_a_dashboard_is_refused_with_one_that_is(address: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Jobs(address)


def test_a_password_in_an_address_is_not_repeated() -> None:
    with pytest.raises(ValueError, match="holds a password") as caught:
        Jobs("http://ada:secret@127.0.0.1:8265")
    assert "secret" not in str(caught.value)


def test_another_machine_gets_nothing_without_a_token() -> None:
    with pytest.raises(
        ValueError, match=r"^http://192.0.2.7:8265 is another machine, and there is no token for it: .* or write --insecure$"
    ):
        Jobs("http://192.0.2.7:8265")


@pytest.mark.parametrize(
    ("host", "is_here"),
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
def test_this_machine_is_known_by_its_loopback_addresses(host: str, is_here: bool) -> None:
    assert on_loopback(host) is is_here


def test_the_token_is_taken_from_where_ray_takes_it_in_rays_order(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_token_file_that_was_named_and_is_not_there_is_a_fault(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(home / "nowhere"))
    with pytest.raises(ValueError, match="nowhere can't be read"):
        token()


class Dashboard(ThreadingHTTPServer):
    """Answers by path, and keeps what it was asked: (method, path, Authorization header, body)."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.answers: dict[str, tuple[int, str]] = {"/api/version": (200, json.dumps({"ray_version": "2.60.0"}))}
        self.asked: list[tuple[str, str, str | None, str]] = []
        self.address = f"http://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    server: Dashboard

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        self.server.asked.append((self.command, self.path, self.headers.get("Authorization"), body))
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
def test_a_job_is_sent_once_with_its_own_name_a_long_stop_and_the_token(dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "s3cret")
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    dashboard.answers["/api/jobs/"] = (200, json.dumps({"job_id": "run-1", "submission_id": "run-1"}))
    Jobs(f"{dashboard.address}/").submit("run-1", "exec true", {"NAME": "value"})
    (sent,) = [asked for asked in dashboard.asked if asked[0] == "POST"]
    assert sent[1:3] == ("/api/jobs/", "Bearer s3cret")
    body = json.loads(sent[3])
    assert (body["submission_id"], body["entrypoint"]) == ("run-1", "exec true")
    assert body["runtime_env"]["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "60", "NAME": "value"}
    assert os.environ["RAY_ADDRESS"] == "http://127.0.0.1:1"


@pytest.mark.slow
def test_a_jobs_state_log_and_stop_are_asked_by_its_name(dashboard: Dashboard) -> None:
    jobs = Jobs(dashboard.address)
    assert (jobs.state("run-1"), jobs.log("run-1")) == (None, "")
    jobs.stop("run-1")
    dashboard.answers["/api/jobs/run-1"] = (200, details(status="FAILED", message="exit code -9", driver_exit_code=-9))
    dashboard.answers["/api/jobs/run-1/logs"] = (200, json.dumps({"logs": "a line\n"}))
    assert jobs.state("run-1") == JobState("FAILED", "exit code -9", -9)
    assert jobs.log("run-1") == "a line\n"
    assert dashboard.asked[4][:2] == ("POST", "/api/jobs/run-1/stop")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "given", "words"),
    [
        (401, "", "wants a token, and there is none: put it into RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token$"),
        (403, "another", "refuses the token that it was given; mend the one of RAY_AUTH_TOKEN"),
    ],
)
def test_a_cluster_that_wants_another_token_is_quoted_in_words(
    dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch, code: int, given: str, words: str
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", given)
    dashboard.answers["/api/version"] = (code, "no")
    with pytest.raises(PermissionError, match=words):
        Jobs(dashboard.address)


@pytest.mark.slow
@pytest.mark.parametrize("answer", [(404, "no such page"), (500, "out of order"), (200, "<html>"), (200, "{}")])
def test_a_server_that_is_no_dashboard_is_told_from_one(dashboard: Dashboard, answer: tuple[int, str]) -> None:
    dashboard.answers["/api/version"] = answer
    with pytest.raises(ConnectionError, match=r"does not answer as Ray's dashboard does .* wanted the dashboard's address, port 8265"):
        Jobs(dashboard.address)


@pytest.mark.slow
def test_what_the_cluster_can_not_do_is_told_in_its_own_last_words(dashboard: Dashboard) -> None:
    dashboard.answers["/api/jobs/"] = (500, 'Traceback (most recent call last):\n  File "a.py"\nValueError: Job run-1 already exists\n')
    with pytest.raises(ConnectionError, match="can't do that: ValueError: Job run-1 already exists"):
        Jobs(dashboard.address).submit("run-1", "exec true", {})


@pytest.mark.slow
def test_where_nothing_listens_is_said_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(ConnectionError, match=rf"^nothing listens at http://127.0.0.1:{port} \(connection refused\)"):
        Jobs(f"http://127.0.0.1:{port}")


@pytest.mark.slow
def test_what_listens_and_speaks_no_http_is_no_dashboard(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def hang_up(accept: Callable[[], tuple[socket.socket, object]]) -> None:
            for _ in range(2):
                accept()[0].close()

        thread = threading.Thread(target=hang_up, args=(server.accept,), daemon=True)
        thread.start()
        with pytest.raises(ConnectionError, match="does not answer as Ray's dashboard does"):
            Jobs(f"http://127.0.0.1:{server.getsockname()[1]}")
